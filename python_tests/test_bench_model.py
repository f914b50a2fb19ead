"""The benchmark of whole models: byte counts, tables, plots, and a run of tiny models on the CPU."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import bench_model  # noqa: E402
import plot_model  # noqa: E402
from bench_model import VARIANTS, Report, largest_batch, step_read_bytes, token_cache_bytes  # noqa: E402

L, HKV, D = 4, 4, 16  # of the preset tiny
ARGUMENTS = ["--device", "cpu", "--presets", "tiny", "--kv-heads", "4", "--steps", "2", "--repeats", "1"]


def config(name: str) -> FusedKVConfig:
    return bench_model.model_config("tiny", HKV, VARIANTS[name], 64)


# Bytes of one channel of keys and one of values, over the layers, in bf16. Four layers, of which two store in
# all but vanilla and gqa; the first of them is no source in yoco.
READ = {
    "vanilla": 2 * L * 2,
    "gqa": 2 * L * 2 / 2,  # half the heads
    "cla2": 2 * L * 2,
    "yoco": 2 * L * 2,
    "lite": 2 * L * 2,
    "fusedkv": 2 * 2 * 2 + 2 * 4 * 2,  # two layers read one source, two read two
    "fusedkv fp8 copy": 2 * 2 * 2 + 2 * 4 * 1,
    "fusedkv fp8 only": 2 * 2 * 1 + 2 * 4 * 1,
    "lite fp8 only": 2 * L * 1,
}
HELD = {
    "vanilla": 2 * L * 2,
    "gqa": 2 * L * 2 / 2,
    "cla2": 2 * 2 * 2,
    "yoco": 2 * 2 * 2,
    "lite": 2 * 2 * 2,
    "fusedkv": 2 * 2 * 2,
    "fusedkv fp8 copy": 2 * 2 * 3,
    "fusedkv fp8 only": 2 * 2 * 1,
    "lite fp8 only": 2 * 2 * 1,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_that_a_step_reads_equal_a_hand_count(name):
    fp8 = VARIANTS[name].fp8_sources
    assert step_read_bytes(config(name), 10, 2, fp8) == READ[name] * 10 * HKV * D


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_of_a_cached_token_are_those_allocated(name):
    fp8 = VARIANTS[name].fp8_sources
    model = FusedKVForCausalLM(config(name)).bfloat16()
    cache = model.new_cache(3, page_size=8, fp8_sources=fp8)
    assert token_cache_bytes(config(name), 2, fp8) == HELD[name] * HKV * D == cache.nbytes / 24


def test_elements_that_a_step_reads_are_those_of_the_paper():
    """Of L layers FusedKV reads 3 L S Hkv D elements, vanilla and Lite 2 L S Hkv D."""
    configs = {
        name: bench_model.model_config("1.5b", 16, VARIANTS[name], 64)
        for name in ("vanilla", "lite", "fusedkv")
    }
    elements = 24 * 1000 * 16 * 128
    read = {name: step_read_bytes(config, 1000, 1) for name, config in configs.items()}
    assert read == {"vanilla": 2 * elements, "lite": 2 * elements, "fusedkv": 3 * elements}


def test_a_window_bounds_what_storage_layers_read_of_themselves():
    windowed = FusedKVConfig.from_dict({**bench_model.TINY, "plan": "yoco", "sliding_window": 4})
    assert step_read_bytes(windowed, 10, 2) == 2 * 2 * (2 * 4 + 2 * 10) * HKV * D
    assert step_read_bytes(windowed, 3, 2) == 2 * 2 * L * 3 * HKV * D


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_a_step_reads(tied):
    """An embedding is read as the output projection, or not at all but for a row a sequence."""
    values = {**bench_model.TINY, "plan": "fusedkv", "tie_word_embeddings": tied}
    model = FusedKVForCausalLM(FusedKVConfig.from_dict(values))
    hidden, inner, heads = 32, 64, HKV * D
    storage = 3 * heads * hidden + heads * hidden + 2 * D
    reconstruction = heads * hidden + heads * hidden + D + 2 * HKV * (D // 2 + D)
    every = 3 * inner * hidden + 2 * hidden
    expected = 2 * (storage + reconstruction) + L * every + hidden + 256 * hidden
    assert bench_model.step_weight_bytes(model) == 4 * expected


def test_largest_batch_counts_whole_pages():
    assert largest_batch(1000, 100, 2, 50, 50) == 9  # 100 bytes each
    assert largest_batch(1000, 100, 2, 51, 50) == 4
    assert largest_batch(199, 100, 2, 50, 50) == 0 == largest_batch(50, 100, 2, 50, 50)


# ------------------------------------------------------------------------------------------- tables and plots


def row(plan: str, section: str, batch: int, tokens: int, ms: float | None, **others) -> dict:
    labels = {"preset": "p", "heads": "16/16", "plan": plan, "section": section}
    return bench_model.complete({**labels, "batch": batch, "tokens": tokens}, {"ms": ms, **others})


ROWS = [
    row("vanilla", "ttft", 1, 2048, 8.0, peak_bytes=4 * 10**9),
    row("vanilla", "ttft", 1, 8192, 40.0, peak_bytes=5 * 10**9),
    row("vanilla", "tpot", 1, 2048, 2.0, floor_ms=1.0, tokens_per_s=500.0, peak_bytes=3 * 10**9),
    row("vanilla", "throughput", 20, 8192, 10.0, floor_ms=9.0, tokens_per_s=2000.0),
    row("fusedkv", "ttft", 1, 2048, 4.0, peak_bytes=2 * 10**9),
    row("fusedkv", "ttft", 1, 8192, None, note="no memory"),
    row("fusedkv", "tpot", 1, 2048, 2.5, floor_ms=1.25, tokens_per_s=400.0, peak_bytes=3 * 10**9),
    row("fusedkv", "throughput", 40, 8192, 16.0, floor_ms=15.0, tokens_per_s=2500.0),
]
RESULTS = {
    "environment": "a GPU",
    "commands": ["python bench_model.py"],
    "read_ceiling_gb_s": 4500.0,
    "ceiling_given": True,
    "budget_gb": 40.0,
    "rows": ROWS,
}


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def of(section: str) -> list[dict]:
    return [row for row in ROWS if row["section"] == section]


def test_table_of_ttft():
    report = Report(ROWS)
    _, _, vanilla, fusedkv = cells(report.ttft(of("ttft")))
    assert vanilla == ["vanilla", "8.00", "1.00", "4.00", "40.0", "1.00", "5.00"]
    assert fusedkv == ["fusedkv", "4.00", "0.500", "2.00", "- [1]", "-", "-"]
    assert report.notes == ["fusedkv: no memory"]


def test_table_of_tpot():
    header, _, _, line = cells(Report(ROWS).tpot(of("tpot")))
    values = dict(zip(header, line, strict=True))
    assert values["B x S"] == "1 x 2048" and values["of floor"] == "2.00"
    assert values["of vanilla's time"] == values["of vanilla's bytes"] == "1.25"


def test_table_of_throughput():
    header, _, _, line = cells(Report(ROWS).throughput(of("throughput")))
    assert line[:7] == ["fusedkv", "40", "8192", "2.00", "16.0", "2500", "1.25"] and len(header) == 9


def test_report_names_the_ceiling_and_the_footnotes():
    text = Report(ROWS).text(RESULTS)
    assert "Read ceiling 4500 GB/s, as given." in text and "[1] fusedkv: no memory" in text
    assert text.count("### p, 16/16 heads") == 3 and "with 40 GB for weights and cache" in text


def test_runs_merge_and_the_later_measurement_counts():
    later = RESULTS | {"commands": ["again"], "rows": [row("fusedkv", "ttft", 1, 8192, 20.0)]}
    merged = bench_model.merge([RESULTS, later])
    assert merged["commands"] == ["python bench_model.py", "again"] and len(merged["rows"]) == len(ROWS)
    assert [r["ms"] for r in merged["rows"] if r["plan"] == "fusedkv" and r["tokens"] == 8192] == [20.0, 16.0]
    with pytest.raises(ValueError, match="--from: environment: expected 'a GPU' in all, got 'another'"):
        bench_model.merge([RESULTS, RESULTS | {"environment": "another"}])


def test_every_plan_has_a_style():
    assert set(plot_model.STYLES) == {*VARIANTS, bench_model.TRANSFORMERS}
    assert len(set(plot_model.STYLES.values())) == len(plot_model.STYLES)


def test_curves_and_ratios_of_a_plot():
    assert plot_model.curves(ROWS, "ttft", "ms") == {
        "vanilla": [(2048, 8.0), (8192, 40.0)],
        "fusedkv": [(2048, 4.0)],
    }
    assert plot_model.ratios(ROWS) == {"TTFT 1 x 2k": {"fusedkv": 0.5}, "TPOT 1 x 2k": {"fusedkv": 1.25}}


# ------------------------------------------------------------------------------------------------------ runs


def test_a_tiny_run_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {name: str(tmp_path / f"model.{name}") for name in ("json", "csv", "markdown")}
    options = ["--ttft", "1x16,2x9", "--tpot", "1x16,3x8", "--page-size", "8", "--fill", "direct"]
    options += ["--budget-gb", "0.0004", "--budget-tokens", "16"]
    for name, file in files.items():
        options += [f"--{name}", file]
    assert bench_model.main([*ARGUMENTS, *options]) == 0
    printed = capsys.readouterr().out
    assert Path(files["markdown"]).read_text() == printed

    results = json.loads(Path(files["json"]).read_text())
    rows = results["rows"]
    assert len(rows) == len(VARIANTS) * 5 and all(row["ms"] > 0 and row["note"] is None for row in rows)
    with open(files["csv"], newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["ms"]) for row in written] == [row["ms"] for row in rows]

    batches = {row["plan"]: row["batch"] for row in rows if row["section"] == "throughput"}
    assert batches["fusedkv"] > batches["vanilla"] > 0
    (fusedkv,) = [row for row in rows if (row["plan"], row["tokens"]) == ("fusedkv", 8)]
    assert fusedkv["read_bytes"] == 3 * 8 * 2 * READ["fusedkv"] * HKV * D  # float32 here
    floor = (fusedkv["weight_bytes"] + fusedkv["read_bytes"]) / results["read_ceiling_gb_s"] / 1e6
    assert fusedkv["floor_ms"] == pytest.approx(floor) and fusedkv["filled"] == "directly"

    assert bench_model.main(["--from", files["json"]]) == 0
    assert capsys.readouterr().out == printed
    plot_model.main([files["json"], "--output-dir", str(tmp_path / "plots"), "--format", "svg"])
    (picture,) = (tmp_path / "plots").iterdir()
    assert picture.name == "model_tiny_4_4.svg" and "<!-- lite fp8 only -->" in picture.read_text()


def test_a_cache_filled_directly_decodes_as_many_tokens_as_a_prefilled_one():
    model = FusedKVForCausalLM(config("fusedkv fp8 copy"))
    cache = model.new_cache(6, page_size=8, max_batch=2, fp8_sources="copy")
    rows = cache.add([20, 20])
    bench_model.fill_directly(model, cache, rows, 17)
    assert [cache.length(row) for row in rows] == [17, 17] and cache.seq_lens.tolist() == [17, 17]
    assert model.decode(cache, rows, torch.tensor([1, 2])).isfinite().all()


def test_what_fails_gets_a_note_and_the_rest_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(
        bench_model.Measurements, "ttft", lambda *_: (_ for _ in ()).throw(MemoryError("full"))
    )
    options = ["--plans", "vanilla", "--ttft", "1x8", "--tpot", "1x8", "--sections", "ttft", "tpot"]
    assert bench_model.main([*ARGUMENTS, *options]) == 1
    text = capsys.readouterr().out
    assert "[1] vanilla: MemoryError: full" in text and "| 1 x 8 | vanilla | " in text


def test_a_budget_that_holds_no_sequence(capsys):
    options = ["--plans", "lite", "--budget-gb", "1e-6", "--sections", "throughput", "--budget-tokens", "8"]
    assert bench_model.main([*ARGUMENTS, *options]) == 1
    assert "lite: not one sequence fits the budget" in capsys.readouterr().out


def test_transformers_beside_ours(capsys):
    pytest.importorskip("transformers")
    options = ["--plans", "vanilla", "--transformers", "--ttft", "1x8", "--tpot", "2x8"]
    assert bench_model.main([*ARGUMENTS, *options, "--sections", "ttft", "tpot"]) == 0
    lines = cells(capsys.readouterr().out)
    measured = [line for line in lines if "transformers" in line[:2]]
    assert len(measured) == 2 and not any("[" in cell for line in measured for cell in line)


def test_without_transformers_there_is_a_footnote(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ["--plans", "vanilla", "--transformers", "--ttft", "1x8", "--sections", "ttft"]
    assert bench_model.main([*ARGUMENTS, *options]) == 0
    assert "[1] transformers: not measured, import of transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ttft", "8192"], "expected batch x tokens, ... as in 1x8192,32x8192, got '8192'"),
        (["--tpot", "0x8"], "expected batch x tokens, ... as in 1x8192,32x8192, got '0x8'"),
        (["--steps", "0"], "expected a positive integer, got '0'"),
        (["--budget-gb", "-1"], "expected a positive number, got '-1'"),
        (["--kv-heads", "3"], "--kv-heads: expected divisors of 4, even for gqa, got [3]"),
        (["--kv-heads", "1"], "--kv-heads: expected divisors of 4, even for gqa, got [1]"),
        (["--presets", "7b"], "invalid choice: '7b'"),
        (["--plans", "mla"], "invalid choice: 'mla'"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        bench_model.main([*ARGUMENTS, *options])
    assert message in capsys.readouterr().err


def test_cuda_is_the_default_and_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_model.main([])
    assert "--device: cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_tiny_run_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setitem(bench_model.TINY, "head_dim", 64)
    options = ["--device", "cuda", "--ttft", "1x64", "--tpot", "2x64", "--budget-gb", "0.01"]
    assert bench_model.main([*ARGUMENTS, *options, "--budget-tokens", "64"]) == 0
