"""The Python comparison of cache writes in bench/: contenders, their check, and the table."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import compare_cache_write as compare  # noqa: E402
from attention_contenders import Heads, Mismatch  # noqa: E402

SMALL = Heads(4, 2, 64)


def inputs(device):
    return compare.make_shared(SMALL, 40, device), compare.make_buffers(SMALL, 40, 16, device)


@pytest.mark.parametrize("write", [compare.fused, compare.plain])
def test_contenders_agree_with_float64(device, write):
    compare.verify("contender", write, *inputs(device))


@pytest.mark.parametrize("output", ["q", "k_cache", "v_cache"])
def test_a_wrong_output_is_found(device, output):
    def write(shared, buffers):
        q = compare.fused(shared, buffers)
        wrong = q[3, 1] if output == "q" else getattr(buffers, output).flatten(0, 1)[buffers.slots[3], 1]
        wrong[5] += 1
        return q

    with pytest.raises(Mismatch, match=f"broken, {output}: relative error"):
        compare.verify("broken", write, *inputs(device))


def test_bytes_are_those_of_the_buffers():
    shared, b = inputs("cpu")
    table = 40 * shared.cos_sin[0].nbytes
    moved = (b.qkv, b.q_out, b.k_cache[:, :0], b.slots, shared.positions)
    written = 2 * 40 * SMALL.num_kv * SMALL.dim * 2
    assert compare.num_bytes(SMALL, 40) == sum(x.nbytes for x in moved) + table + written


def test_report():
    rows = [
        {"heads": "4/2/64", "tokens": 8, "contender": name, "bytes": 3e6, "us": us, "gb_s": 3e3 / us}
        for name, us in ((compare.OURS, 2.0), (compare.INDUCTOR, 5.0))
    ]
    results = {"environment": "a GPU", "command": "python x", "copy_ceiling_gb_s": 2000.0, "rows": rows}
    text = compare.report(results)
    assert text.splitlines()[-1] == "| 4/2/64 | 8 | 3.00 | 2.00 | 1500 | 75.0% | 5.00 | 2.50 |"
    assert "copy ceiling" not in compare.report(results | {"copy_ceiling_gb_s": None})


def test_arguments_are_checked(capsys):
    for bad in (["--tokens", "8,0"], ["--heads", "4,3,64"]):
        with pytest.raises(SystemExit):
            compare.main(bad)
    assert "expected positive integers, got '8,0'" in capsys.readouterr().err


@pytest.mark.cuda
def test_runs(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["--heads", "4,2,64", "--tokens", "40", "--repeats", "2", "--json", str(path)]
    assert compare.main(arguments) == 0
    assert path.stat().st_size > 0 and "4/2/64 | 40" in capsys.readouterr().out
