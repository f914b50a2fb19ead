"""Training: attention of a reconstruction layer, forward and backward, beside plain attention, on one GPU.

    python bench/compare_reconstruction.py --json reconstruction.json

Contenders: torch's attention of q, k and v, what a vanilla layer runs; and that of keys and values that
`fuse_kv` forms of two sources, with its backward pass to q, both sources and the weights, keeping the fused
keys and values or forming them again. Gradients are first compared with those of plain torch in float64.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from attention_contenders import Heads, Mismatch
from compare import WARM_UP, Timing, environment, markdown_table, quantiles, write_json
from compare_attention import parse_heads
from torch import Tensor

from fusedkv_ext import attention

PLAIN, KEPT, AGAIN = "attention", "fuse_kv and attention", "the same, fused again in backward"
TOLERANCE = 4 * 2.0**-8  # of a gradient's length: four roundings to bf16
CHECKED_TOKENS = 512

Inputs = list[Tensor]  # q, k_1, k_n, v_1, v_n, a, b; all with gradients


def make_inputs(heads: Heads, tokens: int, device: str) -> Inputs:
    kv = (1, tokens, heads.num_kv, heads.dim)
    halves = [torch.randn(1, tokens, heads.num_q, heads.dim), *(torch.randn(kv) for _ in range(4))]
    weights = [torch.randn(2, heads.num_kv, heads.dim) * 0.7 for _ in range(2)]
    inputs = [x.to(device, torch.bfloat16) for x in halves] + [x.to(device) for x in weights]
    return [x.requires_grad_() for x in inputs]


def plain(q, k_1, k_n, v_1, v_n, a, b) -> Tensor:
    return attention.causal_attention(q, k_1, v_1)


def fused(q, k_1, k_n, v_1, v_n, a, b) -> Tensor:
    return attention.mixed_attention(q, [k_1, k_n], [v_1, v_n], a, b)


def fused_again(q, k_1, k_n, v_1, v_n, a, b) -> Tensor:
    return attention.recomputing_attention(q, [k_1, k_n], [v_1, v_n], a, b)


CONTENDERS: dict[str, Callable[..., Tensor]] = {PLAIN: plain, KEPT: fused, AGAIN: fused_again}


def definition(q, k_1, k_n, v_1, v_n, a, b) -> Tensor:
    """In float64, without any of our ops."""
    keys, values = a[0] * k_1 + a[1] * k_n, b[0] * v_1 + b[1] * v_n
    group = q.shape[2] // keys.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys.repeat_interleave(group, 2)) * q.shape[-1] ** -0.5
    hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values.repeat_interleave(group, 2))


def gradients(attend: Callable[..., Tensor], inputs: Inputs, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(attend(*inputs), inputs, grad, allow_unused=True)


def verify(name: str, attend: Callable[..., Tensor], heads: Heads, device: str) -> None:
    """Raise Mismatch unless every gradient is the definition's, up to rounding to bf16."""
    inputs = make_inputs(heads, CHECKED_TOKENS, device)
    grad = torch.randn_like(inputs[0])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = gradients(definition, wide, grad.double())
    names = ("q", "k_1", "k_n", "v_1", "v_n", "key weights", "value weights")
    for what, got, want in zip(names, gradients(attend, inputs, grad), expected, strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= TOLERANCE:  # also when it is NaN
            raise Mismatch(f"{name}, {heads}, gradient of {what}: relative error {error:.2e}")


def time_training(attend: Callable[..., Tensor], inputs: Inputs, repeats: int) -> Timing:
    """Milliseconds of forward and backward, one after the other without a pause."""
    grad = torch.randn_like(inputs[0])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + repeats + 1)]
    events[0].record()
    for event in events[1:]:
        gradients(attend, inputs, grad)
        event.record()
    torch.cuda.synchronize()
    return quantiles([a.elapsed_time(b) for a, b in pairwise(events[WARM_UP:])])


def report(results: dict) -> str:
    header = ["Hq/Hkv/D", "S", f"{PLAIN}, ms", f"{KEPT}, ms", "ratio", f"{AGAIN}, ms", "ratio"]
    shapes: dict[tuple, dict[str, float]] = {}
    for row in results["rows"]:
        shapes.setdefault((row["heads"], row["tokens"]), {})[row["contender"]] = row["ms"]
    lines = []
    for shape, ms in shapes.items():
        base = ms[PLAIN]
        lines.append([*shape, base, *(x for name in (KEPT, AGAIN) for x in (ms[name], ms[name] / base))])
    return "\n\n".join([results["environment"], f"`{results['command']}`", markdown_table(header, lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [Heads(32, 8, 128), Heads(16, 16, 128)]
    parser.add_argument("--heads", type=parse_heads, nargs="+", metavar="HQ,HKV,D", default=default)
    parser.add_argument("--tokens", type=int, default=8192, metavar="S")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes a measurement")
    parser.add_argument("--json", metavar="FILE", help="write every measurement to FILE")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")

    torch.manual_seed(0)
    command = shlex.join(["python", *sys.argv])
    results = {"environment": environment(), "command": command, "rows": []}
    for heads in args.heads:
        inputs = make_inputs(heads, args.tokens, "cuda")
        for name, attend in CONTENDERS.items():
            if name != PLAIN:
                verify(name, attend, heads, "cuda")
            timing = time_training(attend, inputs, args.repeats)
            labels = {"heads": str(heads), "tokens": args.tokens, "contender": name}
            times = {"ms": timing.median, "p10_ms": timing.p10, "p90_ms": timing.p90}
            results["rows"].append(labels | times)
    print(report(results))
    if args.json:
        write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
