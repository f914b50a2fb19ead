"""Decode attention beside what else a user could call, on one GPU in one run.

    python bench/compare_attention.py --json attention.json

Contenders: this package with one and two sources in bf16 and in e4m3, torch's SDPA (cuDNN and flash), and
FlashInfer where it can be imported. Two sources are twice the bytes, so their peers run on sequences of twice
the length. Every contender's output is checked before it is timed; a wrong one ends the run. The exit code is
1 when one of this package's own measurements is missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from attention_contenders import BF16, Case, Contender, Heads, Mismatch, flashinfer, fusedkv, sdpa, verify
from compare import (
    cold_sets,
    environment,
    geometric_mean,
    markdown_table,
    parse_arguments,
    time_graph,
    write_json,
)
from torch.nn.attention import SDPBackend

ONE_BF16, TWO_BF16 = "fusedkv, 1 bf16 source", "fusedkv, 2 bf16 sources"
ONE_E4M3, TWO_E4M3 = "fusedkv, 1 e4m3 source", "fusedkv, 2 e4m3 sources"
OURS = {  # sources of keys and of values, and their dtype
    ONE_BF16: (1, BF16),
    TWO_BF16: (2, BF16),
    ONE_E4M3: (1, torch.float8_e4m3fn),
    TWO_E4M3: (2, torch.float8_e4m3fn),
}
CUDNN, FLASH, FLASHINFER = "SDPA cuDNN", "SDPA flash", "FlashInfer"
PEERS = (CUDNN, FLASH, FLASHINFER)
DEVICE = "cuda"
QUERY_TOKENS = (1, 4, 8, 16)
RAGGED = (65536, *[512] * 31)
EVEN = (sum(RAGGED) // len(RAGGED),) * len(RAGGED)  # of the same bytes

Row = dict[str, object]  # one measurement, as it is written to JSON

# ---------------------------------------------------------------------------------------------- measuring


def variants(case: Case, name: str, page_size: int) -> dict[str, Callable[[], Contender]]:
    """The ways to run a contender, of which the fastest counts. page_size: of this package's caches."""
    if name in OURS:
        sources, dtype = OURS[name]
        sets = cold_sets(case.cache_bytes(sources, dtype))
        return {"": partial(fusedkv, case, sources, dtype, page_size, sets, DEVICE)}
    sets = cold_sets(case.cache_bytes())
    if name == FLASHINFER:
        return {
            f"page {size}, {'tensor' if tensor_cores else 'CUDA'} cores": partial(
                flashinfer, case, size, tensor_cores, sets, DEVICE
            )
            for size in (16, 64)
            for tensor_cores in (True, False)
        }
    backend = SDPBackend.CUDNN_ATTENTION if name == CUDNN else SDPBackend.FLASH_ATTENTION
    return {"": partial(sdpa, case, backend, sets, DEVICE)}


def measure_variant(name: str, build: Callable[[], Contender], repeats: int) -> Row:
    contender = build()
    verify(name, contender)
    timing = time_graph(contender.launches, repeats)
    return {
        "bytes": contender.bytes,
        "us": timing.median,
        "p10_us": timing.p10,
        "p90_us": timing.p90,
        "gb_s": contender.bytes / timing.median / 1e3,
    }


def measure(case: Case, name: str, args: argparse.Namespace) -> Row:
    """Time, and as the note the fastest variant; when none runs, no time, and the reasons as the note."""
    results, reasons = [], {}
    for variant, build in variants(case, name, args.page_size).items():
        what = f"{name} {variant}, {case}"
        try:
            results.append(measure_variant(what, build, args.repeats) | {"note": variant})
        except Mismatch:
            raise
        except Exception as error:  # a contender may lack a shape, or itself, in any way it likes
            first_line = str(error).strip().partition("\n")[0]
            reasons[f"{type(error).__name__}: {first_line[:200]}"] = None
    if not results:
        return {"us": None, "gb_s": None, "note": "; ".join(reasons)}
    return min(results, key=lambda result: result["us"])


def progress(what: str, start: float, rows: Sequence[Row]) -> None:
    """A line a shape, so that an interrupted run is not lost."""
    times = "  ".join("-" if row["us"] is None else f"{row['us']:.1f}" for row in rows)
    print(f"{what}: {times} µs ({time.perf_counter() - start:.1f} s)", file=sys.stderr, flush=True)


def measure_attention(args: argparse.Namespace) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for heads in args.heads:
        for batch, tokens in args.shapes:
            start = time.perf_counter()
            keys = [(str(heads), batch, tokens, name) for name in OURS]
            keys += [(str(heads), batch, length, name) for length in (tokens, 2 * tokens) for name in PEERS]
            for key in keys:
                if key not in rows:  # a peer on twice the tokens of one shape may be there for another
                    *_, length, name = key
                    labels = {"heads": str(heads), "batch": batch, "tokens": length, "contender": name}
                    rows[key] = labels | measure(Case(heads, (length,) * batch), name, args)
            progress(f"{heads}, {batch} x {tokens}", start, [rows[key] for key in keys])
    return list(rows.values())


def measure_query_tokens(args: argparse.Namespace) -> list[Row]:
    rows = []
    for heads in args.heads:
        if heads.num_q == heads.num_kv:
            continue  # the tokens of grouped heads fill a tile; without groups there is room for them anyway
        for batch, tokens in args.shapes:
            start, first = time.perf_counter(), len(rows)
            for name in (ONE_BF16, TWO_BF16):
                for count in QUERY_TOKENS:
                    labels = {"heads": str(heads), "batch": batch, "tokens": tokens, "contender": name}
                    case = Case(heads, (tokens,) * batch, count)
                    rows.append(labels | {"query_tokens": count} | measure(case, name, args))
            progress(f"{heads}, {batch} x {tokens}, query tokens", start, rows[first:])
    return rows


def measure_ragged(args: argparse.Namespace) -> list[Row]:
    rows = []
    for heads in args.heads:
        start, first = time.perf_counter(), len(rows)
        for name in (ONE_BF16, TWO_BF16, FLASHINFER):
            for lengths, batch in ((EVEN, "even"), (RAGGED, "ragged")):
                labels = {"heads": str(heads), "contender": name, "lengths": batch}
                rows.append(labels | measure(Case(heads, lengths), name, args))
        progress(f"{heads}, ragged", start, rows[first:])
    return rows


# ----------------------------------------------------------------------------------------------- reporting


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


class AttentionTables:
    """The tables of the section `attention`, in Markdown."""

    def __init__(self, rows: Sequence[Row], read_ceiling: float | None = None):
        self.rows = {(r["heads"], r["batch"], r["tokens"], r["contender"]): r for r in rows}
        self.shapes = [shape for *shape, name in self.rows if name == ONE_BF16]
        self.read_ceiling = read_ceiling
        self.notes: list[str] = []

    def cell(self, row: Row) -> str:
        """The time, with its footnote."""
        text = "-" if row["us"] is None else f"{row['us']:.1f}"
        if not row["note"]:
            return text
        note = f"{row['contender']}: {row['note']}"
        if note not in self.notes:
            self.notes.append(note)
        return f"{text} [{self.notes.index(note) + 1}]"

    def with_peers(self, name: str) -> str:
        """One row a shape: this package, the peers on the same number of bytes, and the ratio of times."""
        sources, _ = OURS[name]
        header = ["Hq/Hkv/D", "B x S", "MB", "fusedkv, µs", "GB/s"]
        header += ["% of read ceiling"] if self.read_ceiling else []
        header += ["of 1 source's time"] if sources > 1 else []
        header += [f"{peer}, µs" for peer in PEERS] + ["fusedkv / best peer"]
        lines, to_peer, to_one_source = [], {}, {}
        for heads, batch, tokens in self.shapes:
            shape = (heads, f"{batch} x {tokens}")
            own = self.rows[heads, batch, tokens, name]
            peers = [self.rows[heads, batch, sources * tokens, peer] for peer in PEERS]
            best = min((row["us"] for row in peers if row["us"] is not None), default=None)
            to_peer[shape] = ratio(own["us"], best)
            to_one_source[shape] = ratio(own["us"], self.rows[heads, batch, tokens, ONE_BF16]["us"])
            megabytes = None if own["us"] is None else round(own["bytes"] / 1e6)
            line = [*shape, megabytes, self.cell(own), own["gb_s"]]
            if self.read_ceiling:
                of_ceiling = ratio(own["gb_s"], self.read_ceiling)
                line.append(None if of_ceiling is None else f"{of_ceiling:.1%}")
            line += [to_one_source[shape]] if sources > 1 else []
            lines.append([*line, *map(self.cell, peers), to_peer[shape]])
        text = markdown_table(header, lines) + summary("fusedkv / best peer on the same bytes", to_peer)
        return text + (summary("two sources / one source", to_one_source) if sources > 1 else "")

    def e4m3(self) -> str:
        """One row a shape: e4m3 sources beside one bf16 source, all of this package."""
        header = ["Hq/Hkv/D", "B x S", "1 bf16, µs"]
        for name in ("2 e4m3", "1 e4m3"):
            header += [f"{name}, µs", "GB/s", "of 1 bf16's time"]
        lines, ratios = [], {TWO_E4M3: {}, ONE_E4M3: {}}
        for heads, batch, tokens in self.shapes:
            shape = (heads, f"{batch} x {tokens}")
            bf16 = self.rows[heads, batch, tokens, ONE_BF16]
            line = [*shape, self.cell(bf16)]
            for name, of_shape in ratios.items():
                own = self.rows[heads, batch, tokens, name]
                of_shape[shape] = ratio(own["us"], bf16["us"])
                line += [self.cell(own), own["gb_s"], of_shape[shape]]
            lines.append(line)
        text = markdown_table(header, lines)
        return text + "".join(summary(f"{name} / {ONE_BF16}", r) for name, r in ratios.items())

    def footnotes(self) -> str:
        return "\n".join(f"[{i}] {note}  " for i, note in enumerate(self.notes, 1))


def summary(what: str, ratios: dict[tuple[str, str], float | None]) -> str:
    measured = {shape: value for shape, value in ratios.items() if value is not None}
    if not measured:
        return f"\n\n{what}: nothing to compare"
    shape, worst = max(measured.items(), key=lambda item: item[1])
    mean = geometric_mean(list(measured.values()))
    return f"\n\n{what}: geometric mean {mean:.3f}, worst {worst:.3f} ({', '.join(shape)})"


def query_tokens_table(rows: Sequence[Row]) -> str:
    times: dict[tuple, list[float | None]] = {}
    for row in rows:
        key = (row["heads"], f"{row['batch']} x {row['tokens']}", row["contender"])
        times.setdefault(key, []).append(row["us"])
    header = ["Hq/Hkv/D", "B x S", "", "1 query token, µs"]
    for count in QUERY_TOKENS[1:]:
        header += [f"{count}, µs", "of 1"]
    lines = [[*key, us[0], *(c for t in us[1:] for c in (t, ratio(t, us[0])))] for key, us in times.items()]
    return markdown_table(header, lines)


def ragged_table(rows: Sequence[Row]) -> str:
    pairs: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row["heads"], row["contender"]), {})[row["lengths"]] = row
    lines = []
    for key, pair in pairs.items():
        even, ragged = pair["even"], pair["ragged"]
        notes = "; ".join(dict.fromkeys(row["note"] for row in (even, ragged) if row["note"]))
        lines.append([*key, even["us"], ragged["us"], ratio(ragged["us"], even["us"]), notes])
    even = f"{len(EVEN)} x {EVEN[0]}, µs"
    ragged = f"1 x {RAGGED[0]} and {len(RAGGED) - 1} x {RAGGED[-1]}, µs"
    return markdown_table(["Hq/Hkv/D", "", even, ragged, "ragged / even", ""], lines)


def report(results: dict) -> str:
    """Everything that was measured, as Markdown."""
    parts = [results["environment"], f"`{results['command']}`"]
    if rows := results.get("attention"):
        tables = AttentionTables(rows, results["read_ceiling_gb_s"])
        parts += ["### One bf16 source", tables.with_peers(ONE_BF16)]
        parts += ["### Two bf16 sources, peers on sequences of twice the length", tables.with_peers(TWO_BF16)]
        parts += ["### e4m3 sources", tables.e4m3(), tables.footnotes()]
    if rows := results.get("query_tokens"):
        parts += ["### Query tokens a sequence", query_tokens_table(rows)]
    if rows := results.get("ragged"):
        parts += ["### Ragged lengths", ragged_table(rows)]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------- running


def parse_heads(text: str) -> Heads:
    try:
        heads = Heads(*map(int, text.split(",")))
        if min(heads) > 0 and heads.num_q % heads.num_kv == 0:
            return heads
    except (TypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"expected Hq,Hkv,D with Hq a multiple of Hkv, got {text!r}")


def parse_shapes(text: str) -> list[tuple[int, int]]:
    least = max(QUERY_TOKENS)  # a query token must see something
    try:
        shapes = [
            (int(batch), int(tokens)) for batch, tokens in (item.split("x") for item in text.split(","))
        ]
        if all(batch > 0 and tokens >= least for batch, tokens in shapes):
            return shapes
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected batch x tokens, ... of {least} tokens or more, got {text!r}")


SECTIONS = {
    "attention": measure_attention,
    "query_tokens": measure_query_tokens,
    "ragged": measure_ragged,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads",
        type=parse_heads,
        nargs="+",
        metavar="HQ,HKV,D",
        default=[Heads(32, 8, 128), Heads(16, 16, 128), Heads(16, 4, 64)],
    )
    parser.add_argument(
        "--shapes",
        type=parse_shapes,
        metavar="BxS,...",
        default=parse_shapes("1x4096,1x32768,1x131072,8x8192,32x8192,128x4096"),
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parse_arguments(parser, "read", "bench_fused_attention", arguments)

    torch.manual_seed(0)
    results = {
        "environment": environment(),
        "command": shlex.join(["python", *sys.argv]),
        "read_ceiling_gb_s": args.read_ceiling,
    }
    results |= {section: SECTIONS[section](args) for section in args.sections}
    if args.json:
        write_json(args.json, results)
    print(report(results))
    ours = [row for section in args.sections for row in results[section] if row["contender"] in OURS]
    return int(any(row["us"] is None for row in ours))


if __name__ == "__main__":
    sys.exit(main())
