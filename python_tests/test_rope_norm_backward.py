"""rope_norm_backward against float64 autograd through an oracle that turns complex numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x
from rope_cases import cos_sin_table, finish_heads, make_positions

from fusedkv_ext import ops

BF16, F16 = torch.bfloat16, torch.float16


def make(
    device: str,
    dtype: torch.dtype = BF16,
    tokens: int = 19,
    heads: int = 3,
    d: int = 64,
    norm: bool = True,
    interleaved: bool = False,
    position_dtype: torch.dtype = torch.int64,
) -> dict:
    """Keyword arguments of the op, all positions inside the table."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = 1.25 * cos_sin_table(50, d, device, wide)  # scaled, as yarn does
    return {
        "grad": torch.randn(tokens, heads, d).to(device, dtype),
        "heads": (2 * torch.randn(tokens, heads, d)).to(device, dtype) if norm else None,
        "positions": make_positions(tokens, table, position_dtype).clamp(0, 49),
        "cos_sin": table,
        "norm": (1 + 0.3 * torch.randn(d)).to(device, dtype) if norm else None,
        "eps": 1e-5,
        "interleaved": interleaved,
    }


def oracle(inputs: dict, wide: torch.dtype) -> list[torch.Tensor]:
    """Gradients by autograd at precision `wide`: of heads and, where there is one, of norm."""
    grad, norm = inputs["grad"].to(wide), inputs["norm"]
    heads = torch.zeros_like(grad) if inputs["heads"] is None else inputs["heads"].to(wide)
    leaves = [heads.requires_grad_()] + ([] if norm is None else [norm.to(wide).requires_grad_()])
    out = finish_heads(
        heads,
        inputs["positions"],
        inputs["cos_sin"],
        leaves[1] if norm is not None else None,
        inputs["eps"],
        inputs["interleaved"],
        wide,
    )
    return list(torch.autograd.grad(out, leaves, grad))


def check(inputs: dict) -> None:
    dtype = inputs["grad"].dtype
    grad_heads, grad_norm = ops.rope_norm_backward(**inputs)
    exact, rounded = oracle(inputs, torch.float64), oracle(inputs, torch.float32)
    assert grad_heads.dtype == dtype and grad_heads.is_contiguous()
    assert_close_2x(grad_heads, exact[0], rounded[0].to(dtype))
    assert grad_norm.dtype == inputs["cos_sin"].dtype
    if inputs["norm"] is None:
        assert grad_norm.shape == (0,)
    else:  # sums of many products in float32, each in its own order
        assert_close_2x(grad_norm, exact[1], rounded[1], absolute=1e-6 * exact[1].abs().max().item() + 1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("d", [64, 128])
# One head, more heads than a CTA takes at once, more tokens than a launch takes at once.
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (19, 3), (5, 70), (9000, 4)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_matches_autograd(device, dtype, tokens, heads, d, norm, interleaved):
    position_dtype = torch.int32 if tokens % 2 else torch.int64
    check(make(device, dtype, tokens, heads, d, norm, interleaved, position_dtype))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 80),
    heads=st.integers(1, 40),
    d=st.sampled_from([64, 128]),
    norm=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from([BF16, F16]),
)
def test_any_shape(device, tokens, heads, d, norm, interleaved, dtype):
    check(make(device, dtype, tokens, heads, d, norm, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_float64_is_exact(norm, interleaved):
    inputs = make("cpu", torch.float64, norm=norm, interleaved=interleaved, d=6)
    actual = ops.rope_norm_backward(**inputs)
    for a, e in zip(actual, oracle(inputs, torch.float64), strict=False):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_strided_inputs(device):
    inputs = make(device)
    for name in ("grad", "heads"):
        inputs[name] = torch.randn(3, 21, 64).to(device, BF16).transpose(0, 1)[2:]
    check(inputs)


@pytest.mark.parametrize("norm", [False, True])
def test_no_tokens(device, norm):
    grad_heads, grad_norm = ops.rope_norm_backward(**make(device, tokens=0, norm=norm))
    assert grad_heads.shape == (0, 3, 64)
    assert grad_norm.shape == (64 if norm else 0,) and not grad_norm.any()


def test_a_position_outside_the_table_gives_nan(device):
    inputs = make(device)
    inputs["positions"][4], inputs["positions"][9] = -1, 50
    grad_heads, grad_norm = ops.rope_norm_backward(**inputs)
    lost = torch.zeros(19, dtype=torch.bool, device=device)
    lost[[4, 9]] = True
    assert grad_heads[lost].isnan().all() and not grad_heads[~lost].isnan().any()
    assert grad_norm.isnan().all()


@pytest.mark.parametrize("d", [64, 128])
def test_two_runs_are_identical(device, d):
    inputs = make(device, tokens=3000, heads=5, d=d)
    first, second = (ops.rope_norm_backward(**inputs) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(device, norm):
    torch.library.opcheck(torch.ops.fusedkv.rope_norm_backward.default, (), make(device, norm=norm))


@pytest.mark.cuda
def test_graph_replays_with_new_values():
    inputs = make("cuda", tokens=300)
    ops.rope_norm_backward(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.rope_norm_backward(**inputs)
    for _ in range(3):
        inputs["grad"].normal_()
        inputs["heads"].normal_()
        inputs["positions"].copy_(inputs["positions"].roll(1))
        graph.replay()
        for got, wanted in zip(captured, ops.rope_norm_backward(**inputs), strict=True):
            assert torch.equal(got, wanted)


BAD = {
    "grad: expected dtype": lambda a: a | {"grad": a["grad"].int()},
    r"grad: expected shape \[\*, \*, \*\], got": lambda a: a | {"grad": a["grad"][0]},
    r"grad: expected shape \[\*, \*, 64\], got": lambda a: (
        a | {"grad": a["grad"][..., :32].contiguous(), "heads": a["heads"][..., :32].contiguous()}
    ),
    "grad: expected stride 1 in the last dimension": lambda a: (
        a | {"grad": torch.cat([a["grad"]] * 2, -1)[..., ::2]}
    ),
    r"heads: expected shape \[19, 3, 64\], got \[18, 3, 64\]": lambda a: a | {"heads": a["heads"][1:]},
    "heads: expected dtype bfloat16, got float32": lambda a: a | {"heads": a["heads"].float()},
    "heads, norm: expected both or none of them": lambda a: a | {"heads": None},
    r"norm: expected shape \[64\], got \[63\]": lambda a: a | {"norm": a["norm"][1:]},
    "norm: expected dtype bfloat16": lambda a: a | {"norm": a["norm"].float()},
    r"positions: expected shape \[19\], got \[18\]": lambda a: a | {"positions": a["positions"][1:]},
    "cos_sin: expected dtype float32": lambda a: a | {"cos_sin": a["cos_sin"].half()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_argument_is_named(device, message):
    with pytest.raises(ValueError, match=f"rope_norm_backward: {message}"):
        ops.rope_norm_backward(**BAD[message](make(device)))
