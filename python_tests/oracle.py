"""The pass rule of the numerical tests."""

import torch
from torch import Tensor


def assert_close_2x(actual: Tensor, exact: Tensor, same_precision: Tensor, absolute: float = 1e-5) -> None:
    """Pass when the error is at most twice that of the same maths in plain torch at the same precision.

    actual: what the op gave. exact: the reference on float64 inputs. same_precision: plain torch at the
    precision of `actual`. absolute: for values so small that both errors are zero.
    """
    actual, exact, same_precision = (x.detach().double().cpu() for x in (actual, exact, same_precision))
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN in other places than the oracle's"
    error = (actual - exact).nan_to_num(0.0).abs().max().item() if exact.numel() else 0.0
    allowed = (same_precision - exact).nan_to_num(0.0).abs().max().item() if exact.numel() else 0.0
    assert error <= 2 * allowed + absolute, f"error {error:.3e}, allowed 2 * {allowed:.3e} + {absolute:.0e}"
