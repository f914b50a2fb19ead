"""What the paper proves, checked on the ops."""

from __future__ import annotations

import pytest
import torch
from rope_cases import cos_sin_table

from fusedkv_ext import ops

D = 16


def score(q, k, key_weights, query_position: int, key_position: int, interleaved: bool) -> torch.Tensor:
    """rope(q) . (a * rope(k)), in float64: what a reconstruction layer computes from a cached key."""
    table = cos_sin_table(64, D, "cpu", torch.float64)
    positions = torch.tensor([query_position, key_position])
    identity = torch.eye(D, dtype=torch.float64)
    q, k = ops.rope_key_projection(torch.stack((q, k)), identity, positions, table, interleaved=interleaved)
    return (q * key_weights * k).sum()


def pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (x[0::2], x[1::2]) if interleaved else (x[: D // 2], x[D // 2 :])


def tied(weights: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The first weight of every rotated pair for both of its channels."""
    first, _ = pairs(weights, interleaved)
    return first.repeat_interleave(2) if interleaved else first.repeat(2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_untied_key_weights_make_the_score_depend_on_m_plus_n(interleaved):
    """Eq. (7), term by term, and the shift that keeps m - n: only tied weights give the same score."""
    q, k, a = torch.randn(3, D, dtype=torch.float64)
    theta = 1e4 ** (-torch.arange(0, D, 2).double() / D)
    q1, q2 = pairs(q, interleaved)
    k1, k2 = pairs(k, interleaved)
    for weights, is_tied in ((a, False), (tied(a, interleaved), True)):
        w1, w2 = pairs(weights, interleaved)
        scores = []
        for m, n in ((9, 4), (29, 24)):
            minus, plus = (m - n) * theta, (m + n) * theta
            relative = (q1 * k1 + q2 * k2) * minus.cos() + (q1 * k2 - q2 * k1) * minus.sin()
            absolute = (q1 * k1 - q2 * k2) * plus.cos() - (q1 * k2 + q2 * k1) * plus.sin()
            expected = ((w1 + w2) / 2 * relative + (w1 - w2) / 2 * absolute).sum()
            scores.append(score(q, k, weights, m, n, interleaved))
            torch.testing.assert_close(scores[-1], expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(*scores, rtol=1e-12, atol=1e-12) == is_tied


def test_pairs_of_the_other_convention_are_not_tied():
    """Weights tied for rotate-half are untied for interleaved pairs, and the other way round."""
    q, k, a = torch.randn(3, D, dtype=torch.float64)
    for interleaved in (False, True):
        weights = tied(a, not interleaved)
        near, far = (score(q, k, weights, m, m - 5, interleaved) for m in (9, 29))
        assert not torch.allclose(near, far, rtol=1e-3)
