"""The pass rule itself: it must not pass what is wrong."""

import pytest
import torch
from oracle import assert_close_2x

EXACT = torch.tensor([1.0, -2.0, 3.0, torch.nan], dtype=torch.float64)
ROUNDED = EXACT + torch.tensor([0.0, 0.01, 0.0, 0.0])


def test_twice_the_error_of_plain_torch_passes():
    assert_close_2x(EXACT + 0.0199, EXACT, ROUNDED)
    assert_close_2x(EXACT[:0], EXACT[:0], EXACT[:0])


@pytest.mark.parametrize(
    "actual, exact, same_precision, message",
    [
        (EXACT + 0.0201, EXACT, ROUNDED, "error .* allowed 2 "),
        (EXACT, EXACT, EXACT + 0.31, "one of them is wrong"),  # an oracle that agrees with a wrong op
        (EXACT.nan_to_num(0.0), EXACT, ROUNDED, "NaN in other places"),
        (EXACT, EXACT, ROUNDED.nan_to_num(0.0), "differ in where NaN is"),
        (EXACT[None], EXACT, ROUNDED, "shape"),
        (EXACT, EXACT, ROUNDED[None], "differ in shape"),
    ],
)
def test_anything_else_fails(actual, exact, same_precision, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_2x(actual, exact, same_precision)
