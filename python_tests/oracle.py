"""The pass rule of the numerical tests."""

import torch
from torch import Tensor

# e4m3, the coarsest format of the tests, rounds a value by up to 1/16 of it. Plain torch that is further from
# `exact` than that does other maths, and must not widen what is allowed.
WORST_ROUNDING = 0.1


def assert_close_2x(actual: Tensor, exact: Tensor, same_precision: Tensor, absolute: float = 1e-5) -> None:
    """Pass when the error is at most twice that of the same maths in plain torch at the same precision.

    actual: what the op gave. exact: the maths on float64 inputs, computed by the test. same_precision: plain
    torch at the precision of `actual`. absolute: for values so small that both errors are zero.
    """
    actual, exact, same_precision = (x.detach().double().cpu() for x in (actual, exact, same_precision))
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert same_precision.shape == exact.shape, "the two oracles differ in shape"
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN in other places than the oracle's"
    assert torch.equal(same_precision.isnan(), exact.isnan()), "the two oracles differ in where NaN is"
    if exact.numel() == 0:
        return
    error = (actual - exact).nan_to_num(0.0).abs().max().item()
    allowed = (same_precision - exact).nan_to_num(0.0).abs().max().item()
    largest = exact.nan_to_num(0.0).abs().max().item()
    assert allowed <= WORST_ROUNDING * max(1.0, largest), (
        f"the two oracles differ by {allowed:.3e} in values of up to {largest:.3e}: one of them is wrong"
    )
    assert error <= 2 * allowed + absolute, f"error {error:.3e}, allowed 2 * {allowed:.3e} + {absolute:.0e}"
