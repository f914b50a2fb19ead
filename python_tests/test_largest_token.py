"""largest_token against the first of the largest in plain torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedkv_ext.ops import largest_token

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INF, NAN = float("inf"), float("nan")


def plain(logits) -> torch.Tensor:
    x = logits.double().cpu()
    largest = x.nan_to_num(nan=-INF, posinf=INF, neginf=-INF).amax(-1, keepdim=True)
    wanted = torch.where(x.isnan().any(-1, keepdim=True), x.isnan(), x == largest)
    places = torch.arange(x.shape[-1]).expand_as(x)
    return torch.where(wanted, places, x.shape[-1]).amin(-1)


def check(logits) -> None:
    out = largest_token(logits)
    assert out.dtype == torch.int64 and out.shape == logits.shape[:1] and out.device == logits.device
    assert torch.equal(out.cpu(), plain(logits))


# On Hopper a cluster takes a row, but for more rows than there are SMs.
@pytest.mark.parametrize("batch", [0, 1, 3, 64, 300])
@pytest.mark.parametrize("vocab", [1, 7, 8, 1000, 4097, 32000, 128_000, 151_937])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_oracle(device, dtype, vocab, batch):
    if batch * vocab > 2**22:
        batch = 9
    check(torch.randn(batch, vocab, device=device).to(dtype))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 9),
    vocab=st.integers(1, 3000),
    offset=st.integers(0, 9),
    gap=st.integers(0, 9),
    values=st.lists(st.sampled_from([-INF, -2.0, -0.0, 0.0, 1.0, INF, NAN]), min_size=1, max_size=7),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_ties_and_layouts(device, batch, vocab, offset, gap, values, dtype, seed):
    """Few values, so that most are equal, in rows that start anywhere, between NaN."""
    torch.manual_seed(seed)
    wide = torch.full((offset + batch * (vocab + gap),), NAN)
    drawn = torch.tensor(values)[torch.randint(len(values), (batch, vocab))]
    wide[offset:].view(batch, vocab + gap)[:, :vocab] = drawn
    logits = wide.to(device, dtype)[offset:].view(batch, vocab + gap)[:, :vocab]
    check(logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_larger_anywhere(device, dtype):
    """Every place of a row, whatever thread reads it."""
    vocab = 1037
    logits = torch.zeros(vocab, vocab, device=device, dtype=dtype).fill_diagonal_(1.0)
    assert torch.equal(largest_token(logits), torch.arange(vocab, device=device))
    few = torch.zeros(8, 40_003, device=device, dtype=dtype)
    places = torch.tensor([0, 1, 7, 8, 20_000, 39_999, 40_001, 40_002], device=device)
    few[torch.arange(8, device=device), places] = 1.0
    assert torch.equal(largest_token(few), places)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(device, dtype):
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4
    rows = [
        ([low, high, INF, high], 2),
        ([-INF, -INF, -INF, -INF], 0),
        ([-INF, low, -INF, low], 1),
        ([-0.0, 0.0, -0.0, -1.0], 0),
        ([-1.0, 0.0, -0.0, 0.0], 1),
        ([0.0, tiny, -tiny, 0.0], 1),
        ([-tiny, -2 * tiny, -tiny, -1.0], 0),
        ([1.0, INF, NAN, NAN], 2),
        ([NAN, INF, NAN, -NAN], 0),
        ([1.0, -NAN, NAN, INF], 1),
    ]
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64).to(device, dtype)
    assert largest_token(logits).tolist() == [place for _, place in rows]


def test_any_row_stride(device):
    row = torch.randn(1, 100, device=device)
    check(row.expand(5, -1))
    check(torch.randn(10, 100, device=device)[::3])


def test_opcheck(device):
    logits = torch.randn(3, 50, device=device).half()
    for x in (logits, logits[:, 3:40]):
        torch.library.opcheck(torch.ops.fusedkv.largest_token.default, (x,))


@pytest.mark.parametrize(
    "logits, message",
    [
        (torch.zeros(4).half(), r"expected shape \[\*, \*\], got \[4\]"),
        (torch.zeros(2, 0).half(), r"expected 1 to 2\^30 tokens, got 0"),
        (torch.zeros(2, 4, dtype=torch.int64), "expected dtype .*, got int64"),
        (torch.zeros(2, 4).to(torch.float8_e4m3fn), "expected dtype .*, got float8_e4m3fn"),
        (torch.zeros(4, 2).half().t(), "expected stride 1 in the last dimension, got 2"),
    ],
)
def test_bad_argument(device, logits, message):
    with pytest.raises(ValueError, match="^largest_token: logits: " + message):
        largest_token(logits.to(device))


@pytest.mark.cuda
def test_cuda_has_no_float64():
    with pytest.raises(ValueError, match="expected dtype float16 or bfloat16 or float32, got float64"):
        largest_token(torch.zeros(2, 4, device="cuda", dtype=torch.float64))


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [2, 300])
def test_graph_replays_with_new_values(batch):
    x = torch.randn(batch, 64, device="cuda").bfloat16()
    weight = torch.randn(64, 5000, device="cuda").bfloat16()

    def chain():  # the kernel waits for those before it, and those after it for the kernel
        return weight.t()[largest_token(x @ weight)].float().sum(-1)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(captured, chain())
