"""The fused projection of a storage layer beside the bare product and torch.compile, on one GPU in one run.

    python bench/compare_rope_key_projection.py --json rope_key_projection.json

Contenders: `rope_key_projection_write`; torch.matmul of the same product, without norm, RoPE and cache write;
and the matmul followed by Inductor's kernels for norm, RoPE and two index_copy_ calls. The first and the last
are checked against float64 before they are timed; a wrong result ends the run. Their CUDA graphs are replayed
in turn.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import compare_cache_write as cache_write
import torch
from attention_contenders import Heads, Mismatch
from compare import cold_sets, environment, markdown_table, parse_arguments, time_in_turns, write_json
from compare_cache_write import EPS, Row, Shared, make_shared, parse_tokens
from torch import Tensor

from fusedkv_ext import ops

OURS, MATMUL, INDUCTOR = "fusedkv", "matmul", "matmul + Inductor"


class Buffers(NamedTuple):
    """One set: what one launch reads and writes."""

    x: Tensor  # [T, hidden]
    weight: Tensor  # [(Hq + 2 Hkv) * D, hidden]
    q_out: Tensor  # [T, Hq, D]
    k_cache: Tensor  # [pages, page_size, Hkv, D]
    v_cache: Tensor
    slots: Tensor  # int64 [T], all different, in random order


def rows_of(heads: Heads) -> int:
    return (heads.num_q + 2 * heads.num_kv) * heads.dim


def make_buffers(heads: Heads, tokens: int, hidden: int, page_size: int, device: str) -> Buffers:
    b = cache_write.make_buffers(heads, tokens, page_size, device)
    x = torch.randn(tokens, hidden, dtype=b.qkv.dtype, device=device)
    weight = torch.randn(rows_of(heads), hidden, dtype=b.qkv.dtype, device=device) * hidden**-0.5
    return Buffers(x, weight, *b[1:])


def num_bytes(heads: Heads, tokens: int, hidden: int) -> int:
    """Bytes that must move: x, weight and heads once, and a token's row of the table, position and slot."""
    rows = rows_of(heads)
    return 2 * (tokens * hidden + rows * hidden + tokens * rows) + tokens * (4 * heads.dim + 16)


# -------------------------------------------------------------------------------------------- contenders


def fused(shared: Shared, b: Buffers) -> Tensor:
    ops.rope_key_projection_write(
        b.x,
        b.weight,
        b.q_out if b.q_out.shape[1] else None,
        b.k_cache,
        b.v_cache,
        shared.positions,
        shared.cos_sin,
        b.slots,
        shared.q_norm,
        shared.k_norm,
        EPS,
        early_weight=True,  # as a model calls it: its weights are there long before
    )
    return b.q_out


def matmul(shared: Shared, b: Buffers) -> Tensor:
    return b.x @ b.weight.t()


def plain(shared: Shared, b: Buffers) -> Tensor:
    """The same in torch, queries in a new tensor."""
    qkv = matmul(shared, b).unflatten(-1, (-1, shared.cos_sin.shape[1]))
    return cache_write.plain(shared, cache_write.Buffers(qkv, *b[2:]))


def inductor() -> Callable[[Shared, Buffers], Tensor]:
    torch.compiler.reset()  # a shape more would else run into the limit of recompilations
    return torch.compile(plain, fullgraph=True, dynamic=False)


CONTENDERS = {OURS: lambda: fused, MATMUL: lambda: matmul, INDUCTOR: inductor}

# --------------------------------------------------------------------------------------------- measuring


def verify(name: str, write: Callable[[Shared, Buffers], Tensor], shared: Shared, b: Buffers) -> None:
    """Raise Mismatch unless `write` gives what plain torch gives in float64, up to rounding to bf16."""
    wide = b._replace(**{f: getattr(b, f).double() for f in ("x", "weight", "k_cache", "v_cache")})
    expected = {"q": plain(shared, wide), "k_cache": wide.k_cache, "v_cache": wide.v_cache}
    actual = {"q": write(shared, b), "k_cache": b.k_cache, "v_cache": b.v_cache}
    allowed = cache_write.TOLERANCE
    for output, want in expected.items():
        if want.numel() == 0:  # no query heads
            continue
        error = ((actual[output].double() - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
        if not error <= allowed:  # also when it is NaN
            raise Mismatch(f"{name}, {output}: relative error {error:.2e} in a head, allowed {allowed:.2e}")


def measure(heads: Heads, tokens: int, hidden: int, page_size: int, repeats: int, device: str) -> list[Row]:
    traffic, flops = num_bytes(heads, tokens, hidden), 2 * tokens * hidden * rows_of(heads)
    shared = make_shared(heads, tokens, device)
    sets = [make_buffers(heads, tokens, hidden, page_size, device) for _ in range(cold_sets(traffic))]
    contenders = {name: make() for name, make in CONTENDERS.items()}
    for name, write in contenders.items():
        if name != MATMUL:
            verify(f"{name}, {heads}, {tokens} x {hidden}", write, shared, sets[0])
    timings = time_in_turns(
        [[partial(write, shared, b) for b in sets] for write in contenders.values()], repeats
    )
    rows = []
    for name, timing in zip(contenders, timings, strict=True):
        labels = {"heads": str(heads), "rows": rows_of(heads), "tokens": tokens, "hidden": hidden}
        times = {"us": timing.median, "p10_us": timing.p10, "p90_us": timing.p90}
        rates = {"gb_s": traffic / timing.median / 1e3, "tflop_s": flops / timing.median / 1e6}
        rows.append(labels | {"contender": name, "bytes": traffic, "flops": flops} | times | rates)
    return rows


def report(results: dict) -> str:
    """Everything that was measured, as Markdown."""
    ceiling = results["read_ceiling_gb_s"]
    header = ["Hq/Hkv/D", "N", "K", "M", f"{OURS}, µs", "TFLOP/s", "GB/s"]
    header += ["% of read ceiling"] if ceiling else []
    header += [f"{MATMUL}, µs", f"{OURS} / {MATMUL}", f"{INDUCTOR}, µs", f"{INDUCTOR} / {OURS}"]
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in results["rows"]:
        shape = (row["heads"], row["rows"], row["hidden"], row["tokens"])
        shapes.setdefault(shape, {})[row["contender"]] = row
    lines = []
    for shape, contenders in shapes.items():
        own, bare, user = (contenders[name] for name in CONTENDERS)
        line = [*shape, own["us"], own["tflop_s"], own["gb_s"]]
        line += [f"{own['gb_s'] / ceiling:.1%}"] if ceiling else []
        line += [bare["us"], own["us"] / bare["us"], user["us"], user["us"] / own["us"]]
        lines.append(line)
    return "\n\n".join([results["environment"], f"`{results['command']}`", markdown_table(header, lines)])


def parse_heads(text: str) -> Heads:
    try:
        heads = Heads(*map(int, text.split(",")))
        if heads.num_q >= 0 and min(heads.num_kv, heads.dim) > 0:
            return heads
    except (TypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"expected Hq,Hkv,D with Hq 0 or more, got {text!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads",
        type=parse_heads,
        nargs="+",
        metavar="HQ,HKV,D",
        # Keys and values alone, as for the prompt of the last storage layer, and whole packed projections.
        default=[Heads(0, 4, 128), Heads(0, 8, 128), Heads(16, 4, 128), Heads(32, 8, 128)],
        help="query heads (or 0), key/value heads, head dim",
    )
    default_tokens = [1, 8, 32, 64, 8192, 16384]
    parser.add_argument("--tokens", type=parse_tokens, metavar="M,...", default=default_tokens)
    parser.add_argument("--hidden", type=parse_tokens, metavar="K,...", default=[2048, 4096])
    args = parse_arguments(parser, "read", "bench_rope_key_projection", arguments)

    torch.manual_seed(0)
    results = {
        "environment": environment(),
        "command": shlex.join(["python", *sys.argv]),
        "read_ceiling_gb_s": args.read_ceiling,
        "rows": [],
    }
    for heads in args.heads:
        for hidden in args.hidden:
            for tokens in args.tokens:
                results["rows"] += measure(heads, tokens, hidden, args.page_size, args.repeats, "cuda")
                print(f"{heads}, {tokens} x {hidden}: done", file=sys.stderr, flush=True)
    print(report(results))
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
