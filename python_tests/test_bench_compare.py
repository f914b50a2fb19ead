"""The Python comparison with peers in bench/: contenders, their oracle, tables, JSON and plots."""

import json
import sys
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import attention_contenders  # noqa: E402
import compare  # noqa: E402
import compare_attention  # noqa: E402
import plot  # noqa: E402
from attention_contenders import BF16, Case, Contender, Heads, Mismatch, Pages, verify  # noqa: E402
from compare_attention import CUDNN, FLASH, FLASHINFER, ONE_BF16, ONE_E4M3, TWO_BF16, TWO_E4M3  # noqa: E402

E4M3 = torch.float8_e4m3fn
SMALL = Heads(4, 2, 16)


class FakeDecodeWrapper:
    """FlashInfer's documented interface, in plain torch: what `plan` was given decides what `run` reads."""

    def __init__(self, workspace, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert workspace.dtype == torch.uint8 and not workspace.any() and kv_layout == "NHD"
        if use_tensor_cores:
            raise RuntimeError("no tensor cores here\nsecond line")

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        q_data_type="float16",
        kv_data_type=None,
    ):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert q_data_type == kv_data_type == BF16
        self.pages = [indices[a:b].long() for a, b in pairwise(indptr)]
        self.lengths = [
            (len(pages) - 1) * page_size + int(last)
            for pages, last in zip(self.pages, last_page_len, strict=True)
        ]
        self.heads = (num_qo_heads, num_kv_heads, head_dim)

    def run(self, q, paged_kv_cache):
        num_q, num_kv, d = self.heads
        assert q.shape == (len(self.pages), num_q, d)
        rows = []
        for query, pages, length in zip(q.float(), self.pages, self.lengths, strict=True):
            k, v = (
                cache[pages].flatten(0, 1)[:length].float().repeat_interleave(num_q // num_kv, 1)
                for cache in paged_kv_cache
            )
            weights = (torch.einsum("hd,thd->ht", query, k) / d**0.5).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack(rows).to(q.dtype)


@pytest.fixture
def fake_flashinfer(monkeypatch):
    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=FakeDecodeWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(attention_contenders, "FLASHINFER_WORKSPACE", 16)


# ------------------------------------------------------------------------------------------------ compare.py


def test_cold_sets_exceed_four_times_the_l2():
    assert compare.cold_sets(10**9, l2_bytes=60 * 2**20) == 2
    assert compare.cold_sets(2**20, l2_bytes=60 * 2**20) == 242
    assert compare.cold_sets(1, l2_bytes=60 * 2**20) == compare.cold_sets(0, 60 * 2**20) == compare.MAX_SETS


def test_quantiles_do_not_depend_on_the_order():
    assert compare.quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 3.0, 5.0)
    assert compare.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_markdown_table():
    text = compare.markdown_table(["a", "b"], [[1234.56, None], [22.64, "x"], [1.0449, 7], [0.9514, 0.0]])
    assert text.splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1235 | - |",
        "| 22.6 | x |",
        "| 1.04 | 7 |",
        "| 0.951 | 0.000 |",
    ]


def test_geometric_mean():
    assert compare.geometric_mean([0.5, 2.0, 1.0]) == pytest.approx(1.0)
    assert compare.geometric_mean([4.0, 1.0]) == pytest.approx(2.0)


def test_environment_names_versions_and_date():
    text = compare.environment()
    assert f"torch {torch.__version__}" in text and "FlashInfer" in text and "cuDNN" in text
    assert text.count("\n") == 0


@pytest.mark.cuda
def test_every_launch_of_every_contender_runs():
    sizes = (3, 40)
    counters = [[torch.zeros((), device="cuda") for _ in range(size)] for size in sizes]
    launches = [[lambda c=c: c.add_(1) for c in own] for own in counters]
    for timing in compare.time_in_turns(launches, repeats=5):
        assert 0 < timing.p10 <= timing.median <= timing.p90
    for size, own in zip(sizes, counters, strict=True):
        rounds = -(-compare.MIN_LAUNCHES // size)
        assert [int(c) for c in own] == [1 + rounds * (compare.WARM_UP + 5)] * size


@pytest.mark.cuda
def test_times_are_those_of_their_contender():
    small, large = torch.zeros(1, device="cuda"), torch.zeros(1 << 28, device="cuda")  # 0.5 ms at the least
    timings = compare.time_in_turns([[small.zero_], [large.zero_]], repeats=5)
    assert 10 * timings[0].median < timings[1].median


# ------------------------------------------------------------------------------- contenders and their oracle


@pytest.mark.parametrize("sources, dtype", compare_attention.OURS.values())
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(16, 4, 64)])
@pytest.mark.parametrize("lengths, queries, page_size", [((40, 7, 64), 1, 64), ((100, 17), 16, 16)])
def test_fusedkv_gives_what_its_oracle_expects(device, sources, dtype, heads, lengths, queries, page_size):
    case = Case(heads, lengths, queries)
    contender = attention_contenders.fusedkv(case, sources, dtype, page_size, 2, device)
    verify("fusedkv", contender)
    assert contender.bytes == 2 * sources * sum(lengths) * heads.num_kv * heads.dim * dtype.itemsize
    first, second = (launch() for launch in contender.launches)
    assert not torch.equal(first, second), "the sets share their data"


@pytest.mark.parametrize("heads", [SMALL, Heads(2, 2, 16)])
def test_sdpa_gives_what_its_oracle_expects(device, heads):
    case = Case(heads, (33, 33, 33))
    contender = attention_contenders.sdpa(case, SDPBackend.MATH, 2, device)
    verify("sdpa", contender)
    assert contender.bytes == case.cache_bytes() == 2 * 99 * 2 * 16 * 2
    assert len(contender.launches) == 2


@pytest.mark.parametrize("lengths", [(64, 64), (5, 32, 33)])
def test_flashinfer_is_told_the_pages(fake_flashinfer, lengths):
    case = Case(SMALL, lengths)
    contender = attention_contenders.flashinfer(case, 16, False, 2, "cpu")
    verify("flashinfer", contender)
    assert contender.bytes == case.cache_bytes()


def test_pages_cover_every_sequence_once(device):
    pages = Pages((5, 32, 33), 16, device)
    assert pages.count == 6 and sorted(pages.indices.tolist()) == list(range(6))
    assert pages.indptr.tolist() == [0, 1, 3, 6] and pages.last_page_len.tolist() == [5, 16, 1]
    table = pages.block_table.tolist()
    assert [len([page for page in row if page < 6]) for row in table] == [1, 2, 3]
    used = chain.from_iterable(row[:n] for row, n in zip(table, (1, 2, 3), strict=True))
    assert list(used) == pages.indices.tolist()
    assert pages.block_table.dtype == pages.seq_lens.dtype == torch.int32


def test_verify_finds_wrong_outputs():
    right = attention_contenders.fusedkv(Case(SMALL, (300, 300)), 1, BF16, 64, 1, "cpu")
    out = right.launches[0]()

    def changed(change) -> Contender:
        wrong = out.clone()
        change(wrong)
        return right._replace(launches=[lambda: wrong])

    verify("unchanged", changed(lambda x: None))
    for change in (
        lambda x: x[1, 0, 2].mul_(1.03),
        lambda x: x[0, 0, 0, 3].fill_(float("nan")),
        lambda x: x.copy_(x.flip(0)),
    ):
        with pytest.raises(Mismatch, match="changed: relative error"):
            verify("changed", changed(change))


def test_verify_finds_a_lost_block():
    case = Case(Heads(2, 1, 64), (8192,))
    contender = attention_contenders.fusedkv(case, 1, BF16, 64, 1, "cpu")
    arguments = list(contender.launches[0].args)
    table = arguments[5] = arguments[5].clone()
    table[0, 17] = attention_contenders.INVISIBLE_PAGE
    launch = contender.launches[0].func
    with pytest.raises(Mismatch):
        verify("lost", contender._replace(launches=[lambda: launch(*arguments)]))


# ------------------------------------------------------------------------------------------ the whole script


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Everything but the timing: contenders run and are checked, times are made up from the bytes."""
    verified = []

    def timing(launches, repeats):
        verified.append(len(launches))
        return compare.Timing(9.0, 10.0, 11.0)

    monkeypatch.setattr(compare_attention, "DEVICE", "cpu")
    monkeypatch.setattr(compare_attention, "cold_sets", lambda size: 2)
    monkeypatch.setattr(compare_attention, "time_graph", timing)
    monkeypatch.setattr(compare_attention, "environment", lambda: "GPU, versions, date")
    monkeypatch.setattr(compare_attention, "EVEN", (48, 48))
    monkeypatch.setattr(compare_attention, "RAGGED", (64, 32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return verified


def test_whole_script(on_the_cpu, fake_flashinfer, tmp_path, capsys):
    file = tmp_path / "attention.json"
    arguments = ["--heads", "4,2,16", "2,2,16", "--shapes", "1x48,2x24,1x96", "--read-ceiling", "4600"]
    assert compare_attention.main([*arguments, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert set(results) >= {"environment", "command", "read_ceiling_gb_s", *compare_attention.SECTIONS}

    rows = {(r["heads"], r["batch"], r["tokens"], r["contender"]): r for r in results["attention"]}
    assert len(rows) == len(results["attention"]), "a measurement was repeated"
    ours = rows["4/2/16", 2, 24, TWO_E4M3]
    assert ours["bytes"] == 2 * 2 * 48 * 2 * 16 and ours["us"] == 10.0
    assert (ours["p10_us"], ours["p90_us"]) == (9.0, 11.0)
    assert ours["gb_s"] == pytest.approx(ours["bytes"] / 10.0 / 1e3)
    peer = rows["4/2/16", 2, 48, FLASHINFER]
    assert peer["bytes"] == rows["4/2/16", 2, 24, TWO_BF16]["bytes"]
    assert peer["note"] == "page 16, CUDA cores"
    assert {r["query_tokens"] for r in results["query_tokens"]} == {1, 4, 8, 16}
    assert {r["heads"] for r in results["query_tokens"]} == {"4/2/16"}
    assert len(results["ragged"]) == 2 * 3 * 2
    assert set(on_the_cpu) == {2}, "every contender rotates over its sets"

    text, progress = capsys.readouterr()
    for heading in ("One bf16 source", "Two bf16 sources", "e4m3 sources", "Query tokens", "Ragged"):
        assert f"### {heading}" in text
    assert "FlashInfer: page 16, CUDA cores" in text and "GPU, versions, date" in text
    assert "4/2/16, 2 x 24" in progress


def test_a_failing_contender_is_a_footnote_and_ours_the_exit_code(on_the_cpu, monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("fused_attention: k_sources[0]: expected something else\nmore")

    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(compare_attention, "fusedkv", refuse)
    arguments = ["--heads", "4,2,16", "--shapes", "1x32", "--sections", "attention", "ragged"]
    assert compare_attention.main(arguments) == 1
    text = capsys.readouterr().out
    assert "FlashInfer: ModuleNotFoundError: " in text
    assert f"{ONE_BF16}: ValueError: fused_attention: k_sources[0]: expected something else" in text
    assert "more" not in text and "nothing to compare" in text


def test_a_wrong_contender_ends_the_run(on_the_cpu, monkeypatch):
    right = compare_attention.sdpa

    def wrong(*arguments) -> Contender:
        contender = right(*arguments)
        return contender._replace(launches=[lambda: 1.1 * contender.expected()])

    monkeypatch.setattr(compare_attention, "sdpa", wrong)
    with pytest.raises(Mismatch, match=f"{CUDNN}.*4/2/16, 1 x 32 to 32 tokens"):
        compare_attention.main(["--heads", "4,2,16", "--shapes", "1x32", "--sections", "attention"])


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--heads", "32,8", "Hq,Hkv,D"),
        ("--heads", "32,7,128", "multiple of Hkv"),
        ("--heads", "32,0,128", "multiple of Hkv"),
        ("--heads", "a,b,c", "Hq,Hkv,D"),
        ("--shapes", "1x", "batch x tokens"),
        ("--shapes", "1x4096x2", "batch x tokens"),
        ("--shapes", "0x4096", "batch x tokens"),
        ("--shapes", "8x15", "16 tokens or more"),
        ("--sections", "all", "invalid choice"),
    ],
)
def test_bad_options(option, value, expected, capsys):
    with pytest.raises(SystemExit) as error:
        compare_attention.main([option, value])
    assert error.value.code == 2 and expected in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- tables


def made_up_rows() -> list[dict]:
    """Two shapes of one head shape; peers' times by tokens, so that twice the tokens can be told apart."""
    rows = []
    for batch, tokens, us in ((1, 100, 10.0), (2, 400, 40.0)):
        times = {ONE_BF16: (tokens, us), TWO_BF16: (tokens, 1.9 * us)}
        times |= {TWO_E4M3: (tokens, 1.02 * us), ONE_E4M3: (tokens, us / 2)}
        for name, (length, time) in times.items():
            rows.append({"contender": name, "tokens": length, "us": time, "batch": batch, "note": ""})
        for length, scale in ((tokens, 1), (2 * tokens, 2)):
            for name, time in (
                (CUDNN, 1.25 * us),
                (FLASH, None),
                (FLASHINFER, us * (1.0 if batch == 1 else 2)),
            ):
                note = {FLASH: "RuntimeError: no", FLASHINFER: "page 64"}.get(name, "")
                time = time and time * scale
                rows.append({"contender": name, "tokens": length, "us": time, "batch": batch, "note": note})
    for row in rows:
        row["heads"] = "8/2/64"
        sources, itemsize = {TWO_BF16: (2, 2), TWO_E4M3: (2, 1), ONE_E4M3: (1, 1)}.get(
            row["contender"], (1, 2)
        )
        row["bytes"] = 2 * sources * row["batch"] * row["tokens"] * 128 * itemsize * 10**3
        row["gb_s"] = row["us"] and row["bytes"] / row["us"] / 1e3
    return rows


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]


def test_table_of_one_source():
    tables = compare_attention.AttentionTables(made_up_rows(), read_ceiling=10240.0)
    text = tables.with_peers(ONE_BF16)
    header, _, first, second = cells(text)
    assert dict(zip(header, first, strict=True)) == {
        "Hq/Hkv/D": "8/2/64",
        "B x S": "1 x 100",
        "MB": "51",
        "fusedkv, µs": "10.0",
        "GB/s": "5120",
        "% of read ceiling": "50.0%",
        "SDPA cuDNN, µs": "12.5",
        "SDPA flash, µs": "- [1]",
        "FlashInfer, µs": "10.0 [2]",
        "fusedkv / best peer": "1.00",
    }
    assert second[-4:] == ["50.0", "- [1]", "80.0 [2]", "0.800"]
    assert "geometric mean 0.894, worst 1.000 (8/2/64, 1 x 100)" in text
    assert tables.footnotes().splitlines() == [
        "[1] SDPA flash: RuntimeError: no  ",
        "[2] FlashInfer: page 64  ",
    ]


def test_table_of_two_sources_takes_peers_on_as_many_bytes():
    text = compare_attention.AttentionTables(made_up_rows()).with_peers(TWO_BF16)
    header, _, first, second = cells(text)
    row = dict(zip(header, first, strict=True))
    assert row["MB"] == "102" and row["SDPA cuDNN, µs"] == "25.0" and row["FlashInfer, µs"] == "20.0 [2]"
    assert row["of 1 source's time"] == "1.90" and row["fusedkv / best peer"] == "0.950"
    assert "% of read ceiling" not in row and second[-1] == "0.760"
    assert "two sources / one source: geometric mean 1.900" in text


def test_table_of_e4m3():
    text = compare_attention.AttentionTables(made_up_rows()).e4m3()
    assert cells(text)[2] == ["8/2/64", "1 x 100", "10.0", "10.2", "5020", "1.02", "5.0", "5120", "0.500"]
    assert f"{ONE_E4M3} / {ONE_BF16}: geometric mean 0.500" in text


def test_tables_of_query_tokens_and_ragged_lengths():
    rows = [
        {"heads": "8/2/64", "batch": 1, "tokens": 64, "contender": ONE_BF16, "query_tokens": q, "us": us}
        for q, us in ((1, 10.0), (4, 11.0), (8, None), (16, 20.0))
    ]
    line = cells(compare_attention.query_tokens_table(rows))[2]
    assert line == ["8/2/64", "1 x 64", ONE_BF16, "10.0", "11.0", "1.10", "-", "-", "20.0", "2.00"]

    rows = [
        {"heads": "8/2/64", "contender": FLASHINFER, "lengths": name, "us": us, "note": note}
        for name, us, note in (("even", 10.0, "page 16"), ("ragged", 15.0, "page 64"))
    ]
    line = cells(compare_attention.ragged_table(rows))[2]
    assert line == ["8/2/64", FLASHINFER, "10.0", "15.0", "1.50", "page 16; page 64"]
    assert sum(compare_attention.EVEN) == sum(compare_attention.RAGGED) == 81408


# ------------------------------------------------------------------------------------------------------ plots


def test_every_contender_has_a_style():
    assert set(plot.STYLES) == {*compare_attention.OURS, *compare_attention.PEERS}
    assert len(set(plot.STYLES.values())) == len(plot.STYLES)


def test_curves_are_sorted_and_take_the_fastest():
    rows = [
        {"heads": "8/2/64", "contender": FLASHINFER, "bytes": size, "us": us}
        for size, us in ((400, 4.0), (100, 1.0), (400, 3.0), (200, None))
    ]
    other = {"heads": "8/8/64", "contender": CUDNN, "bytes": 1, "us": 1.0}
    assert plot.curves([*rows, other], "8/2/64") == {FLASHINFER: [(100, 1.0), (400, 3.0)]}


def test_plot_writes_one_picture_a_head_shape(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = made_up_rows()
    rows += [row | {"heads": "8/8/64"} for row in rows]
    results = {"environment": "GPU", "read_ceiling_gb_s": 4600.0, "attention": rows}
    compare.write_json(tmp_path / "in.json", results)
    plot.main([str(tmp_path / "in.json"), "--output-dir", str(tmp_path / "out"), "--format", "svg"])
    pictures = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in pictures] == ["attention_8_2_64.svg", "attention_8_8_64.svg"]
    text = pictures[0].read_text()
    assert all(f"<!-- {name} -->" in text for name in (*plot.STYLES, "read ceiling") if name != FLASH)
