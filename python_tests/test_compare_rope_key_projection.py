"""The Python comparison of projections in bench/: contenders, their check, and the table."""

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import compare_rope_key_projection as compare  # noqa: E402
from attention_contenders import Heads, Mismatch  # noqa: E402

SMALL, KEYS_AND_VALUES = Heads(4, 2, 64), Heads(0, 2, 64)


def inputs(device, heads=SMALL):
    return compare.make_shared(heads, 40, device), compare.make_buffers(heads, 40, 72, 16, device)


@pytest.mark.parametrize("heads", [SMALL, KEYS_AND_VALUES])
@pytest.mark.parametrize("write", [compare.fused, compare.plain])
def test_contenders_agree_with_float64(device, write, heads):
    compare.verify("contender", write, *inputs(device, heads))


@pytest.mark.parametrize("output", ["q", "k_cache", "v_cache"])
def test_a_wrong_output_is_found(device, output):
    def write(shared, buffers):
        q = compare.fused(shared, buffers)
        wrong = q[3, 1] if output == "q" else getattr(buffers, output).flatten(0, 1)[buffers.slots[3], 1]
        wrong[5] += 1
        return q

    with pytest.raises(Mismatch, match=f"broken, {output}: relative error"):
        compare.verify("broken", write, *inputs(device))


def test_the_matmul_is_the_product_of_the_others(device):
    shared, b = inputs(device)
    values = compare.matmul(shared, b).unflatten(-1, (-1, 64))[:, -2:]
    compare.plain(shared, b)
    assert torch.equal(b.v_cache.flatten(0, 1)[b.slots], values)


@pytest.mark.parametrize("heads", [SMALL, KEYS_AND_VALUES])
def test_bytes_are_those_of_the_buffers(heads):
    shared, b = inputs("cpu", heads)
    table = 40 * shared.cos_sin[0].nbytes
    moved = (b.x, b.weight, b.q_out, b.slots, shared.positions)
    written = 2 * 40 * heads.num_kv * heads.dim * 2
    assert compare.num_bytes(heads, 40, 72) == sum(x.nbytes for x in moved) + table + written


def test_report():
    labels = {"heads": "0/4/128", "rows": 1024, "tokens": 8, "hidden": 2048}
    rows = [
        labels | {"contender": name, "us": us, "gb_s": 4e3 / us, "tflop_s": 40 / us}
        for name, us in ((compare.OURS, 4.0), (compare.MATMUL, 5.0), (compare.INDUCTOR, 10.0))
    ]
    results = {"environment": "a GPU", "command": "python x", "read_ceiling_gb_s": 4000.0, "rows": rows}
    text = compare.report(results)
    line = "| 0/4/128 | 1024 | 2048 | 8 | 4.00 | 10.0 | 1000 | 25.0% | 5.00 | 0.800 | 10.0 | 2.50 |"
    assert text.splitlines()[-1] == line
    assert "read ceiling" not in compare.report(results | {"read_ceiling_gb_s": None})


def test_arguments_are_checked(capsys):
    for bad in (["--tokens", "8,0"], ["--hidden", "x"], ["--heads", "4,0,64"]):
        with pytest.raises(SystemExit):
            compare.main(bad)
    message = capsys.readouterr().err
    assert "expected positive integers, got '8,0'" in message
    assert "expected Hq,Hkv,D with Hq 0 or more, got '4,0,64'" in message


@pytest.mark.cuda
def test_runs(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["--heads", "4,2,64", "--tokens", "40", "--hidden", "72", "--repeats", "2"]
    assert compare.main([*arguments, "--json", str(path)]) == 0
    assert path.stat().st_size > 0 and "4/2/64 | 512 | 72 | 40" in capsys.readouterr().out
