"""`evaluate`: loss and perplexity over a token file, with and without a cache, by position in the context.

python -m fusedkv_ext evaluate --model DIR --data validation.bin
python -m fusedkv_ext evaluate --model DIR --data validation.bin --cache decode --fp8-sources only
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fusedkv_ext.cache import FP8_SOURCES, PagedKVCache
from fusedkv_ext.checks import expect, integer
from fusedkv_ext.data import TokenFile, spread
from fusedkv_ext.extension import choose_device
from fusedkv_ext.model import FusedKVForCausalLM

CACHES = ("none", "prefill", "decode")
LOSS_TOKENS = 2048  # tokens whose logits are held at a time
FIRST_BUCKET = 64  # positions in the first bucket; every next one reaches twice as far
PAGE_SIZE = 64


@dataclass(frozen=True)
class Bucket:
    """Mean loss, in nats a token, of the predictions made at positions first to last of a context."""

    first: int
    last: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss > 709 else math.exp(self.loss)  # which raises beyond 709.8


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: the mean over all positions, and over each bucket of them."""

    cache: str
    fp8_sources: str
    total: Bucket
    buckets: tuple[Bucket, ...]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss in nats, float32 [...], of logits [..., vocab] for targets [...]."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def _uncached(model: FusedKVForCausalLM, windows: Tensor) -> Iterator[Tensor]:
    hidden, targets = model.model(windows[:, :-1]), windows[:, 1:]
    width = max(1, LOSS_TOKENS // len(windows))
    for x, y in zip(hidden.split(width, 1), targets.split(width, 1), strict=True):
        yield cross_entropy(model.logits(x), y)


def _prefilled(model: FusedKVForCausalLM, windows: Tensor, cache: PagedKVCache) -> Iterator[Tensor]:
    inputs, targets = windows[:, :-1], windows[:, 1:]
    rows = cache.add([inputs.shape[1]] * len(windows))
    width = max(1, LOSS_TOKENS // len(windows))
    for x, y in zip(inputs.split(width, 1), targets.split(width, 1), strict=True):
        yield cross_entropy(torch.stack(model.prefill(cache, rows, list(x), all_logits=True)), y)
    cache.free(rows)


def _decoded(model: FusedKVForCausalLM, windows: Tensor, cache: PagedKVCache) -> Iterator[Tensor]:
    inputs, targets = windows[:, :-1], windows[:, 1:]
    rows = cache.add([inputs.shape[1]] * len(windows))
    model.bind(cache)
    numbers = torch.tensor(rows, device=model.device)
    for x, y in zip(inputs.unbind(1), targets.unbind(1), strict=True):
        step = cache.decode_step(numbers)
        logits = model.decode_step(x, step)
        step.commit()
        yield cross_entropy(logits, y)[:, None]
    cache.free(rows)


@torch.no_grad()
def evaluate(
    model: FusedKVForCausalLM,
    data: TokenFile,
    context: int | None = None,
    cache: str = "none",
    fp8_sources: str = "none",
    batch: int = 8,
    max_windows: int | None = None,
    progress: bool | None = False,
) -> Evaluation:
    """The loss of a model over windows of a token file, each predicted from its own tokens alone.

    Args:
        model: any plan; its dtype and device are those of the run.
        data: the tokens.
        context: tokens a window; by default the model's max_position_embeddings.
        cache: "none" runs whole windows without a cache, as in training; "prefill" writes them to a cache,
            some tokens at a time, and attends to that; "decode" does so token by token, as in generation.
        fp8_sources: how a cache holds the layers that others read, see PagedKVCache.
        batch: windows at a time.
        max_windows: take so many at even distances; None takes all. What remains at the end of the file and
            fills no window is left out.
        progress: show a tqdm bar; None does so where a person watches.

    Raises:
        ValueError: an option out of range, a context longer than the model's or the file, ids beyond the
            vocabulary, or fp8_sources without a cache or for a plan that shares no layer.
    """
    op, config = "evaluate", model.config
    expect(cache in CACHES, op, "cache", " or ".join(CACHES), repr(cache))
    known = fp8_sources in FP8_SOURCES
    expect(known, op, "fp8_sources", " or ".join(FP8_SOURCES), repr(fp8_sources))
    cached = fp8_sources == "none" or cache != "none"
    expect(cached, op, "fp8_sources", "none without a cache", repr(fp8_sources))
    longest = config.max_position_embeddings
    context = longest if context is None else integer(context, op, "context", 1, longest)
    batch = integer(batch, op, "batch", 1)
    if max_windows is not None:
        integer(max_windows, op, "max_windows", 1)
    data.check_vocabulary(config.vocab_size)
    numbers = spread(data.num_windows(context), max_windows)

    losses: Callable[[Tensor], Iterator[Tensor]]
    if cache == "none":

        def losses(windows: Tensor) -> Iterator[Tensor]:
            return _uncached(model, windows)

    else:
        batch = min(batch, len(numbers))
        pages = model.new_cache(-(-context // PAGE_SIZE) * batch, PAGE_SIZE, batch, fp8_sources)
        through = _prefilled if cache == "prefill" else _decoded

        def losses(windows: Tensor) -> Iterator[Tensor]:
            return through(model, windows, pages)

    sums = torch.zeros(context, dtype=torch.float64, device=model.device)
    disable = None if progress is None else not progress
    with tqdm(total=len(numbers), desc=op, unit="window", disable=disable) as bar:
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            windows = data.windows(part, context, config.vocab_size).to(model.device)
            first = 0
            for x in losses(windows):
                sums[first : first + x.shape[1]] += x.double().sum(0)
                first += x.shape[1]
            bar.update(len(part))
    return Evaluation(cache, fp8_sources, *_buckets(sums.tolist(), len(numbers)))


def _buckets(sums: Sequence[float], windows: int) -> tuple[Bucket, tuple[Bucket, ...]]:
    """The total and the buckets, from the sum of the losses at every position."""

    def bucket(first: int, end: int) -> Bucket:
        tokens = (end - first) * windows
        return Bucket(first, end - 1, tokens, math.fsum(sums[first:end]) / tokens)

    buckets, first, end = [], 0, FIRST_BUCKET
    while first < len(sums):
        buckets.append(bucket(first, min(end, len(sums))))
        first, end = end, 2 * end
    return bucket(0, len(sums)), tuple(buckets)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m fusedkv_ext evaluate`."""
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="a model directory, as in RUN/model")
    add("--data", metavar="FILE", required=True, help="a token file that prepare wrote, as in validation.bin")
    add("--context", metavar="N", type=int, help="tokens a window; by default the longest of the model")
    add("--cache", choices=CACHES, default="none", help="attend through a cache (default: %(default)s)")
    add("--fp8-sources", choices=FP8_SOURCES, default="none", help="as in generate (default: %(default)s)")
    add("--batch", metavar="N", type=int, default=8, help="windows at a time (default: %(default)s)")
    add("--max-windows", metavar="N", type=int, help="take so many at even distances; by default all")
    add("--device", help="cpu or cuda; by default cuda where the kernels can run")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="by default bfloat16 on cuda, float32 on cpu",
    )
    add("--csv", metavar="FILE", help="write the table here too")


def run(args: argparse.Namespace) -> None:
    """`python -m fusedkv_ext evaluate`."""
    device = choose_device(args.device, "evaluate")
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    there = args.csv is None or Path(args.csv).parent.is_dir()
    expect(there, "evaluate", "--csv", "a file in a folder that exists", args.csv)
    data = TokenFile(args.data)
    model = FusedKVForCausalLM.from_pretrained(args.model, device, dtype)
    options = (args.context, args.cache, args.fp8_sources, args.batch, args.max_windows)
    found = evaluate(model, data, *options, progress=None)
    print(f"{'positions':>15} {'tokens':>12} {'loss':>8} {'perplexity':>11}")
    for name, x in [*((f"{x.first} to {x.last}", x) for x in found.buckets), ("all", found.total)]:
        print(f"{name:>15} {x.tokens:>12,} {x.loss:>8.4f} {x.perplexity:>11.3f}")
    if args.csv:
        write_csv(args.csv, [found])


def write_csv(path: str | Path, evaluations: Sequence[Evaluation]) -> None:
    """One row a bucket, then one for all positions; loss in nats a token."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cache", "fp8_sources", "first", "last", "tokens", "loss", "perplexity"])
        for found in evaluations:
            for x in (*found.buckets, found.total):
                row = (x.first, x.last, x.tokens, x.loss, x.perplexity)
                writer.writerow([found.cache, found.fp8_sources, *row])
