"""Whole models: time to the first token, time per token after it, memory, and tokens/s under a memory budget.

    python bench/bench_model.py --presets 1.5b --json model.json --csv model.csv --read-ceiling 4500

One model a plan, with random weights, given random prompts. TTFT is `prefill` of a whole prompt and the
choice of a token. TPOT is the decode step that `generate` uses, replayed as a CUDA graph; it stands beside
its byte floor, the time to read the weights and the keys and values that the plan must read, once, at the
read ceiling. Large batches get random keys and values in the place of a prefill, which the tables say. The
exit code is 1 when a measurement of this package is missing. A run may be split by --presets, --kv-heads,
--plans and --sections; `--from` makes one report of several JSON files.
"""

from __future__ import annotations

import argparse
import csv
import gc
import inspect
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from compare import Timing, environment, markdown_table, quantiles, write_json

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM, PagedKVCache
from fusedkv_ext.config import PRESETS
from fusedkv_ext.generation import Decoder, Sampling
from fusedkv_ext.model import PREFILL_CHUNK

Row = dict[str, object]  # one measurement, as it is written to JSON and CSV
Shape = tuple[int, int]  # sequences, tokens of each

FIELDS = (
    "preset",
    "heads",
    "plan",
    "section",
    "batch",
    "tokens",
    "ms",
    "p10_ms",
    "p90_ms",
    "tokens_per_s",
    "weight_bytes",  # read by a decode step
    "read_bytes",  # keys and values that a decode step reads
    "floor_ms",
    "cache_bytes",  # allocated
    "peak_bytes",  # of the device, everything included
    "filled",
    "note",
)
SECTIONS = ("ttft", "tpot", "throughput")
TRANSFORMERS = "transformers"
WARM_UP = 3
PREFILLED = 65536  # tokens in a batch up to which a cache is filled by prefill
TINY = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_layers=4,
    num_attention_heads=4,
    num_kv_heads=4,
    head_dim=16,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Variant:
    """A plan by name, the share of the key/value heads that it has, and how it caches its sources."""

    plan: str
    heads_divisor: int = 1
    fp8_sources: str = "none"


VARIANTS = {
    "vanilla": Variant("vanilla"),
    "gqa": Variant("vanilla", heads_divisor=2),
    "cla2": Variant("cla"),
    "yoco": Variant("yoco"),
    "lite": Variant("fusedkv_lite"),
    "fusedkv": Variant("fusedkv"),
    "fusedkv fp8 copy": Variant("fusedkv", fp8_sources="copy"),
    "fusedkv fp8 only": Variant("fusedkv", fp8_sources="only"),
    "lite fp8 only": Variant("fusedkv_lite", fp8_sources="only"),
}

# ------------------------------------------------------------------------------------------ bytes and batches


def model_config(preset: str, kv_heads: int, variant: Variant, positions: int) -> FusedKVConfig:
    """The config of a variant; `tiny` is a preset for tests.

    Raises:
        ValueError: heads that cannot be shared so.
    """
    if kv_heads % variant.heads_divisor:
        raise ValueError(f"expected key/value heads that {variant.heads_divisor} divides, got {kv_heads}")
    options = dict(
        plan=variant.plan,
        num_kv_heads=kv_heads // variant.heads_divisor,
        max_position_embeddings=positions,
    )
    if preset == "tiny":
        return FusedKVConfig.from_dict({**TINY, **options})
    return FusedKVConfig.preset(preset, **options)


def step_weight_bytes(model: FusedKVForCausalLM) -> int:
    """Bytes of weights that a decode step reads: all, but for an embedding that is not the output as well."""
    total = sum(x.numel() * x.element_size() for x in model.parameters())
    embedding = model.model.embed_tokens.weight
    return total if model.lm_head is None else total - embedding.numel() * embedding.element_size()


def step_read_bytes(config: FusedKVConfig, tokens: int, itemsize: int, fp8_sources: str = "none") -> int:
    """Bytes of keys and values that one decode step of a sequence of `tokens` must read.

    Every layer reads each of its sources once: caches are too large to stay on the chip from layer to layer.
    """
    plan, total = config.plan, 0
    for i, layer in enumerate(plan.layers):
        own = i in plan.storage_layers
        for source in (*layer.key_sources, *layer.value_sources):
            in_fp8 = source in plan.source_layers and (
                fp8_sources == "only" or (fp8_sources == "copy" and not own)
            )
            seen = min(tokens, config.sliding_window or tokens) if own else tokens
            total += seen * (1 if in_fp8 else itemsize)
    return total * config.num_kv_heads * config.head_dim


def token_cache_bytes(config: FusedKVConfig, itemsize: int, fp8_sources: str = "none") -> int:
    """Bytes that the cache holds for a token, as PagedKVCache allocates them."""
    stored, sources = len(config.plan.storage_layers), len(config.plan.source_layers)
    numbers = {"none": 0, "copy": sources, "only": sources * (1 - itemsize)}[fp8_sources]
    return 2 * (stored * itemsize + numbers) * config.num_kv_heads * config.head_dim


def largest_batch(budget: int, weights: int, token_bytes: int, capacity: int, page_size: int) -> int:
    """How many sequences fit a budget of bytes for weights and cache, in whole pages each."""
    pages = -(-capacity // page_size)
    return max(0, budget - weights) // (pages * page_size * token_bytes)


# ------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Clock:
    """Times calls: on a GPU by its events, else by the host."""

    device: torch.device

    def times(self, call: Callable[[], object], repeats: int, idle: bool, warm_up: int = WARM_UP) -> Timing:
        """Milliseconds of a call, after a few that do not count.

        idle: each call starts on an idle device, so that what the host does first counts; else they follow
        each other without a pause.
        """
        for _ in range(warm_up):
            call()
        if self.device.type != "cuda":
            return quantiles([self._on_host(call) for _ in range(repeats)])
        pairs = []
        self.synchronize()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
            if idle:
                end.synchronize()
        self.synchronize()
        return quantiles([start.elapsed_time(end) for start, end in pairs])

    @staticmethod
    def _on_host(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def timed(timing: Timing) -> Row:
    return {"ms": timing.median, "p10_ms": timing.p10, "p90_ms": timing.p90}


def measure_read_ceiling(device: torch.device) -> float:
    """GB/s of the faster of two reductions over memory that no cache holds."""
    size = 2**31 if device.type == "cuda" else 2**26
    x, clock = torch.ones(size // 4, device=device), Clock(device)
    return max(size / clock.times(call, 10, idle=False).median / 1e6 for call in (x.sum, x.amax))


@torch.no_grad()
def fill_directly(model: FusedKVForCausalLM, cache: PagedKVCache, rows: Sequence[int], tokens: int) -> None:
    """Random keys and values for `tokens` tokens of each row, without running the model."""
    for pools in (cache.keys, cache.values, cache.key_copies, cache.value_copies):
        for pool in pools.values():
            for pages in pool.split(1024):  # bounds the memory of the numbers that are rounded to e4m3
                pages.copy_(torch.randn(pages.shape, dtype=cache.dtype, device=pages.device))
    model.bind(cache)
    cache.advance(rows, [tokens] * len(rows))


class Measurements:
    """The rows of one model: a preset, its heads and a variant.

    Args:
        preset, kv_heads: of the vanilla model.
        name: of VARIANTS.
        args: the options of the program.
    """

    def __init__(self, preset: str, kv_heads: int, name: str, args: argparse.Namespace):
        self.args, self.variant, self.clock = args, VARIANTS[name], Clock(args.device)
        shapes = [*args.ttft, *args.tpot, (1, args.budget_tokens)]
        positions = max(tokens for _, tokens in shapes) + WARM_UP + args.steps + 1
        config = model_config(preset, kv_heads, self.variant, positions)
        with torch.device(args.device):
            self.model = FusedKVForCausalLM(config).to(args.dtype).eval()
        self.labels = {
            "preset": preset,
            "heads": f"{config.num_attention_heads}/{kv_heads}",
            "plan": name,
            "weight_bytes": step_weight_bytes(self.model),
        }

    def prompts(self, batch: int, tokens: int) -> list[torch.Tensor]:
        return list(torch.randint(0, self.model.config.vocab_size, (batch, tokens)))

    def cache(self, batch: int, capacity: int) -> PagedKVCache:
        page_size = self.args.page_size
        return self.model.new_cache(
            batch * -(-capacity // page_size), page_size, batch, self.variant.fp8_sources
        )

    @torch.no_grad()
    def ttft(self, batch: int, tokens: int) -> Row:
        prompts, cache = self.prompts(batch, tokens), self.cache(batch, tokens)

        def prefill() -> None:
            rows = cache.add([tokens] * batch)
            self.model.prefill(cache, rows, prompts, self.args.prefill_chunk).argmax(-1)
            cache.free(rows)

        self.clock.start_peak()
        timing = self.clock.times(prefill, self.args.repeats, idle=True)
        return timed(timing) | {"cache_bytes": cache.nbytes, "peak_bytes": self.clock.peak()}

    @torch.no_grad()
    def tpot(self, batch: int, tokens: int) -> Row:
        steps = WARM_UP + self.args.steps
        cache = self.cache(batch, tokens + steps)
        rows = cache.add([tokens + steps] * batch)
        by_prefill = self.args.fill == "prefill" or (self.args.fill == "auto" and batch * tokens <= PREFILLED)
        if by_prefill:
            self.model.prefill(cache, rows, self.prompts(batch, tokens), self.args.prefill_chunk)
        else:
            fill_directly(self.model, cache, rows, tokens)
        self.clock.synchronize()
        self.clock.start_peak()
        decoder = Decoder(self.model, cache, rows, Sampling(), torch.rand(steps, batch), [])
        decoder.tokens.random_(0, self.model.config.vocab_size)
        if self.args.device.type == "cuda":
            decoder.capture()
        timing = self.clock.times(decoder.step, self.args.steps, idle=False)
        itemsize, fp8 = self.args.dtype.itemsize, self.variant.fp8_sources
        read = batch * step_read_bytes(self.model.config, tokens, itemsize, fp8)
        return timed(timing) | {
            "tokens_per_s": batch / timing.median * 1e3,
            "read_bytes": read,
            "floor_ms": (self.labels["weight_bytes"] + read) / self.args.read_ceiling / 1e6,
            "cache_bytes": cache.nbytes,
            "peak_bytes": self.clock.peak(),
            "filled": "prefill" if by_prefill else "directly",
        }

    def budget_batch(self) -> int:
        weights = sum(x.numel() * x.element_size() for x in self.model.parameters())
        token = token_cache_bytes(self.model.config, self.args.dtype.itemsize, self.variant.fp8_sources)
        capacity = self.args.budget_tokens + WARM_UP + self.args.steps
        return largest_batch(int(self.args.budget_gb * 1e9), weights, token, capacity, self.args.page_size)

    def rows(self) -> Iterator[Row]:
        """Every measurement that the options ask for; one that fails has a note in the place of a time."""
        within_budget = [(self.budget_batch(), self.args.budget_tokens)]
        sections = {
            "ttft": (self.ttft, self.args.ttft),
            "tpot": (self.tpot, self.args.tpot),
            "throughput": (self.tpot, within_budget),
        }
        for section in self.args.sections:
            method, shapes = sections[section]
            for batch, tokens in shapes:
                labels = {**self.labels, "section": section, "batch": batch, "tokens": tokens}
                if batch == 0:
                    yield complete(labels, {"note": "not one sequence fits the budget"})
                else:
                    yield attempt(labels, lambda m=method, b=batch, t=tokens: m(b, t))


def complete(labels: Row, result: Row) -> Row:
    return dict.fromkeys(FIELDS) | labels | result


def attempt(labels: Row, measure: Callable[[], Row]) -> Row:
    start = time.perf_counter()
    try:
        row = complete(labels, measure())
    except Exception as error:  # one shape out of memory must not lose the others
        first_line = str(error).strip().partition("\n")[0]
        row = complete(labels, {"note": f"{type(error).__name__}: {first_line[:200]}"})
    release()
    ms = "-" if row["ms"] is None else f"{row['ms']:.3f}"
    name = f"{row['preset']} {row['heads']} {row['plan']}, {row['section']} {row['batch']} x {row['tokens']}"
    print(f"{name}: {ms} ms ({time.perf_counter() - start:.1f} s)", file=sys.stderr, flush=True)
    return row


def release() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def transformers_rows(preset: str, kv_heads: int, args: argparse.Namespace) -> Iterator[Row]:
    """What a user would run instead: Qwen3 of transformers, static cache, on CUDA compiled decode."""
    shapes = {"ttft": args.ttft, "tpot": args.tpot}
    config = model_config(preset, kv_heads, VARIANTS["vanilla"], 1)
    labels = {"preset": preset, "heads": f"{config.num_attention_heads}/{kv_heads}", "plan": TRANSFORMERS}
    sections = [section for section in shapes if section in args.sections]
    try:
        import transformers
    except ImportError as error:
        for section in sections:
            for batch, tokens in shapes[section]:
                labels |= {"section": section, "batch": batch, "tokens": tokens}
                yield complete(labels, {"note": f"not measured, {error}"})
        return
    positions = (
        max(tokens for section in sections for _, tokens in shapes[section]) + WARM_UP + args.steps + 1
    )
    hf_config = transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device(args.device):
        model = transformers.Qwen3ForCausalLM(hf_config).to(args.dtype).eval()
    clock, device = Clock(args.device), args.device
    # Transformers renamed the argument after 5.17, and takes any other name without a word.
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def prefill(ids: torch.Tensor) -> object:
        length = ids.shape[1] + WARM_UP + args.steps
        cache = transformers.StaticCache(config=hf_config, max_cache_len=length)
        model(ids, **{argument: cache}, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        return cache

    @torch.no_grad()
    def measure(section: str, batch: int, tokens: int) -> Row:
        ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
        clock.start_peak()
        if section == "ttft":
            timing = clock.times(lambda: prefill(ids), args.repeats, idle=True)
            return timed(timing) | {"peak_bytes": clock.peak()}
        torch._dynamo.reset()
        cache, forward = prefill(ids), model.forward
        if device.type == "cuda":
            forward = torch.compile(forward, mode="reduce-overhead")
        position = torch.tensor([tokens], device=device)

        def step() -> None:
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            logits = forward(
                ids[:, -1:],
                **{argument: cache},
                position_ids=position.expand(batch, 1),
                cache_position=position,
                use_cache=True,
            ).logits
            logits[:, -1].argmax(-1)

        timing = clock.times(step, args.steps, idle=False)
        return timed(timing) | {
            "tokens_per_s": batch / timing.median * 1e3,
            "peak_bytes": clock.peak(),
            "filled": "prefill",
        }

    for section in sections:
        for batch, tokens in shapes[section]:
            shape = {"section": section, "batch": batch, "tokens": tokens}
            yield attempt(labels | shape, lambda s=section, b=batch, t=tokens: measure(s, b, t))


# ------------------------------------------------------------------------------------------------- reporting


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


class Report:
    """Markdown tables of rows; what could not be measured gets a footnote."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.notes: list[str] = []

    def models(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((row["preset"], row["heads"]) for row in self.rows))

    def of(self, model: tuple[str, str], section: str) -> list[Row]:
        return [
            row for row in self.rows if (row["preset"], row["heads"], row["section"]) == (*model, section)
        ]

    def time(self, row: Row) -> float | str:
        if row["ms"] is not None:
            return row["ms"]
        note = f"{row['plan']}: {row['note']}"
        if note not in self.notes:
            self.notes.append(note)
        return f"- [{self.notes.index(note) + 1}]"

    def ttft(self, rows: Sequence[Row]) -> str:
        """One row a plan, two columns a shape."""
        shapes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
        cells = {(row["plan"], row["batch"], row["tokens"]): row for row in rows}
        header, lines = ["plan"], []
        for batch, tokens in shapes:
            header += [f"{batch} x {tokens}, ms", "of vanilla", "peak GB"]
        for plan in dict.fromkeys(row["plan"] for row in rows):
            line = [plan]
            for shape in shapes:
                row, vanilla = cells.get((plan, *shape)), cells.get(("vanilla", *shape))
                if row is None:
                    line += [None] * 3
                    continue
                of_vanilla = ratio(row["ms"], vanilla and vanilla["ms"])
                line += [self.time(row), of_vanilla, ratio(row["peak_bytes"], 1e9)]
            lines.append(line)
        return markdown_table(header, lines)

    def tpot(self, rows: Sequence[Row]) -> str:
        """One row a shape and plan."""
        header = ["B x S", "plan", "ms", "floor, ms", "of floor", "of vanilla's time", "of vanilla's bytes"]
        header += ["tokens/s", "KV cache, GB", "peak GB", "cache filled"]
        vanilla = {(row["batch"], row["tokens"]): row for row in rows if row["plan"] == "vanilla"}
        lines = []
        for row in sorted(rows, key=lambda row: (row["tokens"], row["batch"])):
            base = vanilla.get((row["batch"], row["tokens"]))
            lines.append(
                [
                    f"{row['batch']} x {row['tokens']}",
                    row["plan"],
                    self.time(row),
                    row["floor_ms"],
                    ratio(row["ms"], row["floor_ms"]),
                    ratio(row["ms"], base and base["ms"]),
                    ratio(row["floor_ms"], base and base["floor_ms"]),
                    row["tokens_per_s"],
                    ratio(row["cache_bytes"], 1e9),
                    ratio(row["peak_bytes"], 1e9),
                    row["filled"],
                ]
            )
        return markdown_table(header, lines)

    def throughput(self, rows: Sequence[Row]) -> str:
        """One row a plan."""
        header = [
            "plan",
            "largest batch",
            "tokens each",
            "of vanilla's",
            "TPOT, ms",
            "tokens/s",
            "of vanilla's",
        ]
        header += ["KV cache, GB", "peak GB"]
        base = next((row for row in rows if row["plan"] == "vanilla"), None)
        lines = [
            [
                row["plan"],
                row["batch"],
                row["tokens"],
                ratio(row["batch"], base and (base["batch"] or None)),
                self.time(row),
                row["tokens_per_s"],
                ratio(row["tokens_per_s"], base and base["tokens_per_s"]),
                ratio(row["cache_bytes"], 1e9),
                ratio(row["peak_bytes"], 1e9),
            ]
            for row in rows
        ]
        return markdown_table(header, lines)

    def text(self, results: dict) -> str:
        """Everything, headed by where it was measured."""
        source = "as given" if results["ceiling_given"] else "the best torch reduction of this run"
        parts = [results["environment"], *(f"`{command}`" for command in results["commands"])]
        parts.append(f"Read ceiling {results['read_ceiling_gb_s']:.0f} GB/s, {source}.")
        titles = {
            "ttft": "time to the first token",
            "tpot": "time per token",
            "throughput": f"the largest batch with {results['budget_gb']:g} GB for weights and cache",
        }
        for model in self.models():
            for section in SECTIONS:
                if rows := self.of(model, section):
                    parts.append(f"### {model[0]}, {model[1]} heads: {titles[section]}")
                    parts.append(getattr(self, section)(rows))
        parts.append("\n".join(f"[{i}] {note}  " for i, note in enumerate(self.notes, 1)))
        return "\n\n".join(part for part in parts if part)


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def merge(results: Sequence[dict]) -> dict:
    """Results of several runs as one; a measurement that a later one repeats counts.

    Raises:
        ValueError: runs in different places, or with another ceiling or budget.
    """
    first = results[0]
    for other in results[1:]:
        for name in ("environment", "read_ceiling_gb_s", "budget_gb"):
            if other[name] != first[name]:
                raise ValueError(f"--from: {name}: expected {first[name]!r} in all, got {other[name]!r}")
    keys = ("preset", "heads", "plan", "section", "batch", "tokens")
    rows = {tuple(row[key] for key in keys): row for result in results for row in result["rows"]}
    commands = [command for result in results for command in result["commands"]]
    return first | {"commands": commands, "rows": list(rows.values())}


# --------------------------------------------------------------------------------------------------- running


def parse_shapes(text: str) -> list[Shape]:
    try:
        shapes = [(int(b), int(s)) for b, s in (item.split("x") for item in text.split(","))]
        if all(batch > 0 and tokens > 0 for batch, tokens in shapes):
            return shapes
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected batch x tokens, ... as in 1x8192,32x8192, got {text!r}")


def positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")


def positive_number(text: str) -> float:
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--presets", nargs="+", choices=(*PRESETS, "tiny"), default=["332m", "1.5b"], metavar="NAME")
    add("--kv-heads", nargs="+", type=positive, default=[16, 4], metavar="HKV", help="of 16 query heads")
    add("--plans", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="PLAN")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--ttft", type=parse_shapes, metavar="BxS,...", default=parse_shapes("1x2048,1x8192,1x32768"))
    add(
        "--tpot",
        type=parse_shapes,
        metavar="BxS,...",
        default=parse_shapes("1x2048,1x8192,1x32768,8x8192,32x8192"),
    )
    add("--budget-gb", type=positive_number, default=40.0, help="for weights and cache (%(default)s)")
    add("--budget-tokens", type=positive, default=8192, help="of each sequence in it (%(default)s)")
    add("--fill", choices=("auto", "prefill", "direct"), default="auto", help="how a cache gets its tokens")
    add("--repeats", type=positive, default=5, help="timed prefills a measurement (%(default)s)")
    add("--steps", type=positive, default=32, help="timed decode steps a measurement (%(default)s)")
    add("--page-size", type=positive, default=64, help="tokens a page (%(default)s)")
    add("--prefill-chunk", type=positive, default=PREFILL_CHUNK, help="tokens at once (%(default)s)")
    add("--read-ceiling", type=positive_number, metavar="GB/S", help="of build/bench_fused_attention")
    add("--transformers", action="store_true", help="measure its Qwen3 too; compiling takes minutes")
    add("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default) or cpu")
    add("--json", metavar="FILE", help="write every measurement to FILE, after each model")
    add("--csv", metavar="FILE", help="write every measurement to FILE")
    add("--markdown", metavar="FILE", help="write the tables to FILE, not only to stdout")
    add(
        "--from",
        nargs="+",
        dest="sources",
        metavar="JSON",
        help="measure nothing, report what earlier runs did",
    )
    args = parser.parse_args(arguments)
    if args.device.type == "cuda" and not args.sources and not torch.cuda.is_available():
        parser.error("--device: cuda needs a GPU")
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    for preset in args.presets:
        heads = TINY["num_attention_heads"] if preset == "tiny" else 16
        if bad := [n for n in args.kv_heads if heads % n or ("gqa" in args.plans and n % 2)]:
            parser.error(f"--kv-heads: expected divisors of {heads}, even for gqa, got {bad}")
    return args


def measure(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    ceiling_given = args.read_ceiling is not None
    if not ceiling_given:
        args.read_ceiling = measure_read_ceiling(args.device)
        release()
    results = {
        "environment": environment(),
        "commands": [shlex.join(["python", *sys.argv])],
        "read_ceiling_gb_s": args.read_ceiling,
        "ceiling_given": ceiling_given,
        "budget_gb": args.budget_gb,
        "rows": [],
    }

    def take(rows: Iterator[Row]) -> None:
        results["rows"] += rows
        release()
        if args.json:
            write_json(args.json, results)

    for preset in args.presets:
        for kv_heads in args.kv_heads:
            for name in args.plans:
                take(Measurements(preset, kv_heads, name, args).rows())
            if args.transformers:
                take(transformers_rows(preset, kv_heads, args))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.sources:
        results = merge([json.loads(Path(path).read_text()) for path in args.sources])
        if args.json:
            write_json(args.json, results)
    else:
        results = measure(args)
    text = Report(results["rows"]).text(results)
    print(text)
    if args.markdown:
        Path(args.markdown).write_text(text + "\n")
    if args.csv:
        write_csv(args.csv, results["rows"])
    return int(any(row["ms"] is None and row["plan"] != TRANSFORMERS for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
