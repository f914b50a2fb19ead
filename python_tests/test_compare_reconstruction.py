"""bench/compare_reconstruction.py, as far as it runs without a GPU, and on one."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import compare_reconstruction as compare
from attention_contenders import Heads, Mismatch

HEADS = Heads(4, 2, 16)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(compare, "CHECKED_TOKENS", 24)


@pytest.mark.parametrize("name", [compare.KEPT, compare.AGAIN])
def test_gradients_are_those_of_the_definition(name):
    compare.verify(name, compare.CONTENDERS[name], HEADS, "cpu")


def test_wrong_gradients_end_the_run():
    def swapped(q, k_1, k_n, v_1, v_n, a, b):
        return compare.fused(q, k_n, k_1, v_1, v_n, a, b)

    with pytest.raises(Mismatch, match=r"wrong, 4/2/16, gradient of q: relative error"):
        compare.verify("wrong", swapped, HEADS, "cpu")


def test_report_has_times_and_ratios():
    rows = [
        {"heads": "4/2/16", "tokens": 24, "contender": name, "ms": ms}
        for name, ms in ((compare.PLAIN, 2.0), (compare.KEPT, 2.2), (compare.AGAIN, 3.0))
    ]
    text = compare.report({"environment": "a GPU", "command": "c", "rows": rows})
    assert "| 4/2/16 | 24 | 2.00 | 2.20 | 1.10 | 3.00 | 1.50 |" in text


@pytest.mark.cuda
def test_runs_on_a_gpu(capsys):
    torch.cuda.empty_cache()
    assert compare.main(["--heads", "4,2,64", "--tokens", "256", "--repeats", "2"]) == 0
    assert "| 4/2/64 | 256 |" in capsys.readouterr().out
