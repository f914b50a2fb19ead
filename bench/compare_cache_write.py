"""The cache write of a storage layer beside what torch.compile makes of it, on one GPU in one run.

    python bench/compare_cache_write.py --json cache_write.json

Contenders: `rope_write_kv`, and Inductor's kernels for the same in plain torch: norm and RoPE of queries and
keys, and two index_copy_ calls. Both are checked against float64 before they are timed; a wrong result ends
the run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from attention_contenders import Heads, Mismatch
from compare import cold_sets, environment, markdown_table, parse_arguments, time_graph, write_json
from compare_attention import parse_heads
from torch import Tensor

from fusedkv_ext import ops

BF16 = torch.bfloat16
EPS = 1e-6
MAX_POSITIONS = 32768
OURS, INDUCTOR = "fusedkv", "Inductor"

# Largest error of a head, relative to its length: two roundings to bf16, where one is unavoidable.
TOLERANCE = 2 * 2.0**-9

Row = dict[str, object]  # one measurement, as it is written to JSON


class Shared(NamedTuple):
    """What the layers of a model share: the table, the positions of the tokens, and here the norms too."""

    positions: Tensor  # int64 [T]
    cos_sin: Tensor  # float32 [positions, D]
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]


class Buffers(NamedTuple):
    """One set: what one launch reads and writes."""

    qkv: Tensor  # [T, Hq + 2 Hkv, D]
    q_out: Tensor  # [T, Hq, D]
    k_cache: Tensor  # [pages, page_size, Hkv, D]
    v_cache: Tensor
    slots: Tensor  # int64 [T], all different, in random order


def make_shared(heads: Heads, tokens: int, device: str) -> Shared:
    angles = torch.arange(MAX_POSITIONS).double()[:, None] * 1e4 ** (
        -torch.arange(0, heads.dim, 2).double() / heads.dim
    )
    norms = (1 + 0.1 * torch.randn(2, heads.dim, device=device)).to(BF16)
    positions = torch.randint(MAX_POSITIONS, (tokens,), device=device)
    return Shared(positions, torch.cat((angles.cos(), angles.sin()), -1).float().to(device), *norms)


def make_buffers(heads: Heads, tokens: int, page_size: int, device: str) -> Buffers:
    pages = -(-tokens // page_size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=BF16, device=device)

    caches = (random(pages, page_size, heads.num_kv, heads.dim) for _ in range(2))
    slots = torch.randperm(pages * page_size, device=device)[:tokens]
    qkv = random(tokens, heads.num_q + 2 * heads.num_kv, heads.dim)
    return Buffers(qkv, random(tokens, heads.num_q, heads.dim), *caches, slots)


def num_bytes(heads: Heads, tokens: int) -> int:
    """Bytes that must move: qkv once in and once out, and a token's row of the table, position and slot."""
    return tokens * (4 * (heads.num_q + 2 * heads.num_kv) * heads.dim + 4 * heads.dim + 16)


# -------------------------------------------------------------------------------------------- contenders


def fused(shared: Shared, b: Buffers) -> Tensor:
    ops.rope_write_kv(
        b.qkv,
        b.q_out,
        b.k_cache,
        b.v_cache,
        shared.positions,
        shared.cos_sin,
        shared.q_norm,
        shared.k_norm,
        EPS,
        slot_mapping=b.slots,
    )
    return b.q_out


def plain(shared: Shared, b: Buffers) -> Tensor:
    """The same in torch, computed in float32 (float64 for float64), queries in a new tensor."""
    wide = torch.promote_types(b.qkv.dtype, torch.float32)
    num_kv = b.k_cache.shape[2]
    q, k, v = b.qkv.split([b.qkv.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
    cos, sin = shared.cos_sin[shared.positions][:, None].to(wide).chunk(2, -1)

    def norm_and_rotate(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(wide)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(wide)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(b.qkv.dtype)

    b.k_cache.flatten(0, 1).index_copy_(0, b.slots, norm_and_rotate(k, shared.k_norm))
    b.v_cache.flatten(0, 1).index_copy_(0, b.slots, v)
    return norm_and_rotate(q, shared.q_norm)


def inductor() -> Callable[[Shared, Buffers], Tensor]:
    torch.compiler.reset()  # a shape more would else run into the limit of recompilations
    return torch.compile(plain, fullgraph=True, dynamic=False)


CONTENDERS = {OURS: lambda: fused, INDUCTOR: inductor}

# --------------------------------------------------------------------------------------------- measuring


def verify(name: str, write: Callable[[Shared, Buffers], Tensor], shared: Shared, b: Buffers) -> None:
    """Raise Mismatch unless `write` gives what plain torch gives in float64, up to rounding to bf16."""
    wide = b._replace(**{f: getattr(b, f).double() for f in ("qkv", "k_cache", "v_cache")})
    expected = {"q": plain(shared, wide), "k_cache": wide.k_cache, "v_cache": wide.v_cache}
    actual = {"q": write(shared, b), "k_cache": b.k_cache, "v_cache": b.v_cache}
    for output, want in expected.items():
        error = ((actual[output].double() - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
        if not error <= TOLERANCE:  # also when it is NaN
            raise Mismatch(f"{name}, {output}: relative error {error:.2e} in a head, allowed {TOLERANCE:.2e}")


def measure(heads: Heads, tokens: int, page_size: int, repeats: int, device: str) -> list[Row]:
    traffic = num_bytes(heads, tokens)
    shared = make_shared(heads, tokens, device)
    sets = [make_buffers(heads, tokens, page_size, device) for _ in range(cold_sets(traffic))]
    rows = []
    for name, make in CONTENDERS.items():
        write = make()
        verify(f"{name}, {heads}, {tokens} tokens", write, shared, sets[0])
        timing = time_graph([partial(write, shared, b) for b in sets], repeats)
        labels = {"heads": str(heads), "tokens": tokens, "contender": name, "bytes": traffic}
        times = {"us": timing.median, "p10_us": timing.p10, "p90_us": timing.p90}
        rows.append(labels | times | {"gb_s": traffic / timing.median / 1e3})
    return rows


def report(results: dict) -> str:
    """Everything that was measured, as Markdown."""
    ceiling = results["copy_ceiling_gb_s"]
    header = ["Hq/Hkv/D", "tokens", "MB", f"{OURS}, µs", "GB/s"]
    header += ["% of copy ceiling"] if ceiling else []
    header += [f"{INDUCTOR}, µs", f"{INDUCTOR} / {OURS}"]
    pairs: dict[tuple, dict[str, Row]] = {}
    for row in results["rows"]:
        pairs.setdefault((row["heads"], row["tokens"]), {})[row["contender"]] = row
    lines = []
    for shape, pair in pairs.items():
        own, other = pair[OURS], pair[INDUCTOR]
        line = [*shape, own["bytes"] / 1e6, own["us"], own["gb_s"]]
        line += [f"{own['gb_s'] / ceiling:.1%}"] if ceiling else []
        lines.append([*line, other["us"], other["us"] / own["us"]])
    return "\n\n".join([results["environment"], f"`{results['command']}`", markdown_table(header, lines)])


def parse_tokens(text: str) -> list[int]:
    try:
        tokens = [int(item) for item in text.split(",")]
        if min(tokens) > 0:
            return tokens
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected positive integers, got {text!r}")


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
    parser.add_argument("--tokens", type=parse_tokens, metavar="T,...", default=[64, 512, 8192])
    args = parse_arguments(parser, "copy", "bench_cache_write", arguments)

    torch.manual_seed(0)
    results = {
        "environment": environment(),
        "command": shlex.join(["python", *sys.argv]),
        "copy_ceiling_gb_s": args.copy_ceiling,
        "rows": [],
    }
    for heads in args.heads:
        for tokens in args.tokens:
            results["rows"] += measure(heads, tokens, args.page_size, args.repeats, "cuda")
            print(f"{heads}, {tokens} tokens: done", file=sys.stderr, flush=True)
    print(report(results))
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
