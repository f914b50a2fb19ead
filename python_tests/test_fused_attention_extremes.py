"""fused_attention where the softmax is far from even: scores far apart, growing, jumping, very negative.

The kernel takes exponents from a running maximum that may lag behind the true one by 8 in log2, so what
counts is how the scores of a sequence move from token to token.
"""

import pytest
import torch
from attention_cases import BF16, BF16_E4M3, F16, F16_E4M3, SOURCES, check, make_case, over_dtypes, set_keys

EVERY_DTYPE = over_dtypes(F16, BF16, F16_E4M3, BF16_E4M3)


def jump(length):
    levels = torch.zeros(length)
    levels[-1:] = 400
    return levels


# Scores of the tokens of a sequence at rate 1.
LEVELS = {
    "growing": torch.arange,
    "falling": lambda length: 2000 - torch.arange(length),
    "jump at the end": jump,
    "jump at the start": lambda length: jump(length).flip(0),
    "very negative": lambda length: -2000 - 7 * torch.arange(length) % 64,
    "sawtooth": lambda length: 100 + torch.arange(length) % 90 * 3,
}


@EVERY_DTYPE
@pytest.mark.parametrize(
    "rate, sources, num_q, head_dim",
    [(1, 1, 1, 64), (2**-3, 2, 3, 64), (2**-5, 1, 6, 128), (2**-7, 2, 1, 128)],
)
@pytest.mark.parametrize("levels", LEVELS)
def test_moving_scores(device, dtypes, rate, sources, num_q, head_dim, levels):
    """Not all heads at the same rate, but alike: a head that raises its maximum raises those beside it."""
    case = make_case(device, dtypes, (1, 300, 3000), num_q, (8, 1), head_dim, 16, sources, sources)
    signs = torch.randint(2, (head_dim,)) * 2 - 1
    case.q.copy_(signs * rate * (1 - torch.arange(8)[:, None] / 16))
    # Integers that sum to the level over the channels, so that small steps survive e4m3 (integers up to 16).
    channel = torch.arange(head_dim)
    set_keys(case, lambda n: signs * ((LEVELS[levels](n)[:, None] + channel) // head_dim))
    case.key_weights.fill_(1 / sources)
    case.scale = 1.0
    # One copy leaves a worker of a GPU about a unit, and much to merge; many give it units in a row.
    for copies in (1, 60) if device == "cuda" else (1,):
        check(case, copies)


@EVERY_DTYPE
@pytest.mark.parametrize("num_k, num_v", SOURCES)
@pytest.mark.parametrize("scale", [None, -1.0])
def test_scores_far_apart(device, dtypes, num_k, num_v, scale):
    """Queries and keys of magnitude 192: a query row sees one token, or some with exactly the same score."""
    case = make_case(device, dtypes, (1, 17, 64, 500), 2, (8, 2), 128, 16, num_k, num_v)
    case.q.copy_((torch.randint(2, case.q.shape) * 2 - 1) * 192)
    case.key_weights.copy_(torch.tensor([1.0, -0.5])[:num_k, None, None])
    for source in case.k_sources:
        source.copy_(source.float().sign() * 192)  # NaN stays NaN
    case.scale = scale
    check(case)


@EVERY_DTYPE
@pytest.mark.parametrize("scale", [0.0, -0.1, 1e-3, 1.0])
def test_scale(device, dtypes, scale):
    case = make_case(device, dtypes, (0, 3, 200), num_q=2)
    case.scale = scale
    check(case)
