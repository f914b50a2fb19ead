"""Text generation: ragged batches, sampling on the device, one CUDA graph a decode step."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkv_ext import ops
from fusedkv_ext.cache import DecodeStep, PagedKVCache
from fusedkv_ext.checks import DONE, expect, integer
from fusedkv_ext.model import PREFILL_CHUNK, FusedKVForCausalLM

Prompts = Sequence[Sequence[int] | Tensor]
SAMPLE_BLOCK = 1024  # tokens whose probabilities are summed before the blocks are
COLDEST = 1e-30  # a temperature at which no logit but the largest counts, and whose inverse is finite


@dataclass(frozen=True)
class Generation:
    """What `generate` made.

    Attributes:
        tokens: the new tokens of each prompt, without the stop token.
        cache_nbytes: bytes allocated for keys and values.
        vanilla_cache_nbytes: bytes that the same pages take when every layer caches.
        ttft: seconds to the first tokens.
        tpot: seconds a decode step after that, capture of the graph not counted; None without such a step.
        cuda_graph: whether decode steps were graph replays.
    """

    tokens: list[list[int]]
    cache_nbytes: int
    vanilla_cache_nbytes: int
    ttft: float
    tpot: float | None
    cuda_graph: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 for greedy, else the divisor of the logits.
        top_k: keep the k most probable tokens; None for all.
        top_p: then keep the fewest tokens whose probabilities reach top_p; None for all.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        hot = isinstance(self.temperature, (int, float)) and 0 <= self.temperature < float("inf")
        expect(hot, "generate", "temperature", "0 or more", repr(self.temperature))
        if self.top_k is not None:
            integer(self.top_k, "generate", "top_k", 1)
        share = self.top_p is None or (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1)
        expect(share, "generate", "top_p", "None or above 0 and at most 1", repr(self.top_p))


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None) -> Tensor:
    """Choose a token from each row of logits [B, vocab] by inverting the distribution at uniform [B].

    uniform: float32 in [0, 1); not read at temperature 0. Returns int64 [B]. Device work only, fit for a CUDA
    graph. Only top_p without top_k sorts the vocabulary.

    The distribution is summed in integers, which no order of additions changes: the same logits and the same
    uniform give the same token in every run, and no token of probability 0 is ever chosen.
    """
    if sampling.temperature == 0:
        return ops.largest_token(logits)
    vocab = logits.shape[-1]
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, COLDEST)
    order = None
    if sampling.top_k is not None and sampling.top_k < vocab:
        logits, order = _largest(logits, sampling.top_k)
    elif sampling.top_p is not None:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    # Probabilities in fixed point, with so many bits that the sum of a whole vocabulary fits int64.
    weights = (logits.exp() * 2.0 ** (62 - vocab.bit_length())).long()
    if sampling.top_p is not None:
        cumulative = weights.cumsum(-1)
        enough = cumulative[:, -1:].double() * sampling.top_p
        weights = weights.masked_fill((cumulative - weights).double() >= enough, 0)
    choice = _invert(weights, uniform)
    return (choice if order is None else order.gather(-1, choice))[:, 0]


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of float32 [B, N] in falling order, and their places; of equals the first.

    torch.topk alone leaves open which of equals it takes, and logits in half precision have many.
    """
    bits = x.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    place = torch.arange(x.shape[-1], device=x.device)
    keys = (ordered.long() << 32) | (0xFFFFFFFF - place)
    places = 0xFFFFFFFF - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return x.gather(-1, places), places


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The place [B, 1] in int64 weights [B, N] where their running sum passes uniform [B] of the whole.

    In two levels, blocks and then the places of one block: a sum over rows keeps a GPU busy, a running sum
    along them does not.
    """
    last = weights.shape[-1] - 1
    weights = F.pad(weights, (0, -(last + 1) % SAMPLE_BLOCK)).unflatten(-1, (-1, SAMPLE_BLOCK))
    blocks = weights.sum(-1).cumsum(-1)
    # floor(total * uniform), in integers: a float32 below 1 has 24 bits.
    total, share = blocks[:, -1:], (uniform[:, None] * 2**24).long()
    target = (total >> 24) * share + (((total & (2**24 - 1)) * share) >> 24)
    block = torch.searchsorted(blocks, target, right=True).clamp(max=blocks.shape[-1] - 1)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, SAMPLE_BLOCK))[:, 0].cumsum(-1)
    target = target - (blocks.gather(-1, block) - inside[:, -1:])
    place = block * SAMPLE_BLOCK + torch.searchsorted(inside, target, right=True)
    return place.clamp(max=last)  # NaN logits make weights of any sign, and must not lead outside


@functools.cache
def _capture_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all captures of a thread: cuBLAS keeps 32 MB for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Decoder:
    """The decode loop's state on the device, and the step that advances it.

    Everything that changes between steps is in these buffers, so a CUDA graph of `advance` can be replayed.

    Attributes:
        rows: int64 [B], of the cache.
        tokens: int64 [B], what the next step appends.
        active: bool [B], the sequences that have not met a stop token.
        emitted: int64 [steps, B], the tokens chosen so far; DONE from a sequence's stop token on.
        count: int64 [1], the number of steps so far, that of prefill included.
    """

    def __init__(
        self,
        model: FusedKVForCausalLM,
        cache: PagedKVCache,
        rows: Sequence[int],
        sampling: Sampling,
        uniforms: Tensor,
        stop_tokens: Sequence[int],
    ):
        self.model, self.cache, self.sampling = model, cache, sampling
        device = model.device
        self.rows = torch.tensor(rows, device=device)
        self.uniforms = uniforms.contiguous().to(device)  # [steps, B]
        self.stop_tokens = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.emitted = torch.full(uniforms.shape, DONE, dtype=torch.int64, device=device)
        self.active = torch.ones_like(self.tokens, dtype=torch.bool)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        # Pinned once, because a copy to pageable memory waits for the device, and so can pinning.
        pinned = device.type == "cuda"
        self.host = torch.empty(uniforms.shape, dtype=torch.int64, pin_memory=pinned)

    @torch.no_grad()
    def accept(self, logits: Tensor, step: DecodeStep | None = None) -> None:
        """Choose the next tokens, finish the sequences that stop, and commit the decode step, if any."""
        greedy = self.sampling.temperature == 0
        uniform = None if greedy else self.uniforms.index_select(0, self.count)[0]
        chosen = sample(logits, self.sampling, uniform)
        state = (self.active, self.tokens, self.emitted, self.count)
        lengths = () if step is None else (self.cache.seq_lens, step.rows, step.lengths)
        ops.accept_tokens(chosen, self.stop_tokens, *state, *lengths)

    @torch.no_grad()
    def advance(self) -> None:
        """One decode step: append `tokens` to the cache, and choose those that follow."""
        step = self.cache.decode_step(self.rows, self.active)
        logits = self.model.decode_step(self.tokens, step)
        self.accept(logits, step)

    def capture(self) -> None:
        """Capture `advance`; the warm-up runs with every sequence inactive, so it leaves no trace."""
        state = (self.tokens, self.emitted, self.active, self.count)
        saved = [x.clone() for x in state]
        self.active.zero_()
        with torch.cuda.device(self.model.device):
            side = _capture_stream(self.model.device, threading.get_ident())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.advance()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on using CUDA during the capture.
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                self.advance()
        for x, value in zip(state, saved, strict=True):
            x.copy_(value)
        torch.cuda.synchronize(self.model.device)

    def step(self) -> None:
        """`advance`, by the captured graph if there is one; the host does not wait for it."""
        if self.graph is None:
            self.advance()
        else:
            self.graph.replay()

    def start_read(self, first: int, end: int) -> Read:
        """Begin to copy what the steps from `first` to before `end` emitted."""
        self.host[first:end].copy_(self.emitted[first:end], non_blocking=True)
        event = None
        if self.emitted.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.emitted.device))
        return Read(self.host[first:end], event)


@dataclass(frozen=True)
class Read:
    """A copy to the host that may be under way, of what some steps emitted."""

    emitted: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> list[list[int]]:
        if self.event is not None:
            self.event.synchronize()
        return self.emitted.tolist()


@dataclass
class _Run:
    """A checked call of generate, and what it leaves behind."""

    model: FusedKVForCausalLM
    prompts: list[Tensor]
    max_new_tokens: int
    sampling: Sampling
    uniforms: Tensor  # [max_new_tokens, B]
    stop_tokens: list[int]
    cache: PagedKVCache
    prefill_chunk: int
    cuda_graph: bool
    decode_start: float = 0.0


def _capacities(prompts: Sequence[Tensor], max_new_tokens: int) -> list[int]:
    return [len(prompt) + max_new_tokens - 1 for prompt in prompts]  # the last token is never fed


def _check_prompts(model: FusedKVForCausalLM, prompts: Prompts, max_new_tokens: int) -> list[Tensor]:
    op, longest = "generate", model.config.max_position_embeddings
    several = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    got = type(prompts).__name__
    expect(several, op, "prompts", "a list with the token ids of each prompt", got)
    expect(len(prompts) > 0, op, "prompts", "at least one prompt", 0)
    checked = []
    for i, prompt in enumerate(prompts):
        name = f"prompts[{i}]"
        if not isinstance(prompt, Tensor):
            listed = hasattr(prompt, "__len__") and not isinstance(prompt, str)
            expect(listed, op, name, "a sequence of token ids", repr(prompt))
            ids, last = [integer(token, op, name, 0) for token in prompt], model.config.vocab_size - 1
            expect(max(ids, default=0) <= last, op, name, f"token ids 0 to {last}", max(ids, default=0))
            prompt = torch.tensor(ids, dtype=torch.int64)
        whole = prompt.dim() == 1 and not prompt.is_floating_point() and prompt.dtype != torch.bool
        expect(whole, op, name, "integers [S]", f"{prompt.dtype} {list(prompt.shape)}")
        expect(len(prompt) > 0, op, name, "at least one token", "an empty prompt")
        wanted = f"at most {longest} tokens with max_new_tokens (max_position_embeddings)"
        fits = len(prompt) + max_new_tokens <= longest
        expect(fits, op, name, wanted, f"{len(prompt)} + {max_new_tokens}")
        prompt = prompt.to(torch.int64)
        model.check_tokens(prompt, op, name)
        checked.append(prompt)
    return checked


def _prepare(
    model: FusedKVForCausalLM,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
    page_size: int = 64,
    cache: PagedKVCache | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    use_cuda_graph: bool | None = None,
    fp8_sources: str = "none",
) -> _Run:
    """Check the arguments of generate and stream, before anything is written."""
    op, on_cuda = "generate", model.device.type == "cuda"
    max_new_tokens = integer(max_new_tokens, op, "max_new_tokens", 1)
    tokens = _check_prompts(model, prompts, max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p)
    page_size = integer(page_size, op, "page_size", 1)
    prefill_chunk = integer(prefill_chunk, op, "prefill_chunk", 1)
    listed = isinstance(stop_tokens, Iterable) and not isinstance(stop_tokens, str)
    expect(listed, op, "stop_tokens", "a list of token ids", repr(stop_tokens))
    last = model.config.vocab_size - 1
    stop_tokens = [integer(token, op, "stop_tokens", 0, last) for token in stop_tokens]
    expect(on_cuda or not use_cuda_graph, op, "use_cuda_graph", "a model on CUDA", model.device)
    # Drawn on the host before the first step: one seed gives one choice on every device, captured or not.
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(integer(seed, op, "seed", -(2**63), 2**64 - 1))
    uniforms = torch.rand(len(tokens), max_new_tokens, generator=generator).t()
    if cache is None:
        pages = sum(-(-capacity // page_size) for capacity in _capacities(tokens, max_new_tokens))
        cache = model.new_cache(pages, page_size, len(tokens), fp8_sources)
    model.check_cache(cache, op)
    same = fp8_sources in ("none", cache.fp8_sources)
    expect(same, op, "fp8_sources", f"{cache.fp8_sources!r}, that of the cache", repr(fp8_sources))
    graph = on_cuda and use_cuda_graph is not False
    return _Run(model, tokens, max_new_tokens, sampling, uniforms, stop_tokens, cache, prefill_chunk, graph)


def _steps(run: _Run, every: int) -> Iterator[list[int]]:
    """Yield what every sequence emits, step by step, until all are done.

    every: decode steps that are launched before their tokens are read.
    """
    cache = run.cache
    rows = cache.add(_capacities(run.prompts, run.max_new_tokens))
    try:
        decoder = Decoder(run.model, cache, rows, run.sampling, run.uniforms, run.stop_tokens)
        decoder.accept(run.model.prefill(cache, rows, run.prompts, run.prefill_chunk))
        (emitted,) = decoder.start_read(0, 1).wait()
        run.cuda_graph &= run.max_new_tokens > 1 and any(token != DONE for token in emitted)
        yield emitted
        if run.max_new_tokens == 1 or all(token == DONE for token in emitted):
            return
        if run.cuda_graph:
            decoder.capture()
        run.decode_start = time.perf_counter()
        for emitted in _decode(decoder, run.max_new_tokens, every):
            if all(token == DONE for token in emitted):
                return
            yield emitted
    finally:
        cache.free(rows)


def _decode(decoder: Decoder, max_new_tokens: int, every: int) -> Iterator[list[int]]:
    """Run the decode steps, and yield what each emitted.

    The host never waits for the step that it has just launched. On CUDA it reads the tokens of `every` steps
    once the next ones are launched, so that the device never waits for the host either; steps that were
    launched after the last sequence had stopped emit DONE and write nothing.
    """
    lag = 1 if decoder.emitted.is_cuda else 0
    pending: deque[Read] = deque()
    for first in range(1, max_new_tokens, every):
        end = min(first + every, max_new_tokens)
        for _ in range(first, end):
            decoder.step()
        pending.append(decoder.start_read(first, end))
        if len(pending) > lag:
            yield from pending.popleft().wait()
    while pending:
        yield from pending.popleft().wait()


def stream(
    model: FusedKVForCausalLM, prompts: Prompts, max_new_tokens: int, **options: Any
) -> Iterator[tuple[int, int]]:
    """Yield (index of the prompt, token) as tokens come. Arguments and errors are those of `generate`."""
    run = _prepare(model, prompts, max_new_tokens, **options)

    def tokens() -> Iterator[tuple[int, int]]:
        with closing(_steps(run, every=1)) as steps:
            for emitted in steps:
                yield from ((i, token) for i, token in enumerate(emitted) if token != DONE)

    return tokens()


def generate(
    model: FusedKVForCausalLM,
    prompts: Prompts,
    max_new_tokens: int,
    progress: bool = False,
    **options: Any,
) -> Generation:
    """Complete prompts of any lengths as one batch.

    Args:
        model: its dtype and device are those of the run; on CUDA float16 or bfloat16.
        prompts: token ids, a list or a 1-D integer tensor each.
        max_new_tokens: the most tokens to add to each prompt.
        progress: show a tqdm bar.
        temperature: 0 (default) takes the most probable token; else logits are divided by it and sampled.
        top_k: sample from the k most probable tokens only.
        top_p: then from the fewest tokens whose probabilities reach top_p.
        seed: same seed, same tokens; None (default) draws one.
        stop_tokens: ids that end their sequence; they are not returned.
        page_size: tokens a cache page, 64 by default.
        cache: a PagedKVCache to take the pages from, its own page_size included; by default one of exactly
            the size needed. Its rows are given back at the end.
        prefill_chunk: the most prompt tokens that go through the layers at once.
        use_cuda_graph: replay one captured graph a decode step; None (default) does so on CUDA.
        fp8_sources: how the cache holds the layers that other layers read, "none" (default: in the dtype of
            the model), "copy" or "only": see PagedKVCache. A cache of your own brings its own.

    Returns:
        A Generation.

    Raises:
        ValueError: an empty batch or prompt, a token id outside the vocabulary, prompt plus max_new_tokens
            beyond max_position_embeddings or the cache, an option out of range, or a cache that holds tokens
            in e4m3 of earlier weights; nothing is written then.
        TypeError: an option that is not listed here; the message names it.
    """
    run = _prepare(model, prompts, max_new_tokens, **options)
    tokens: list[list[int]] = [[] for _ in run.prompts]
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=len(tokens) * run.max_new_tokens, unit="token", desc="generate")
    # Without a bar to move or a stop to notice, nothing has to be read before the last step.
    every = 1 if progress or run.stop_tokens else run.max_new_tokens
    start = first = last = time.perf_counter()
    num_steps = 0
    with closing(_steps(run, every)) as steps, bar if bar is not None else nullcontext():
        for emitted in steps:
            last = time.perf_counter()
            first = last if num_steps == 0 else first
            num_steps += 1
            for i, token in enumerate(emitted):
                if token != DONE:
                    tokens[i].append(token)
            if bar is not None:
                bar.update(sum(token != DONE for token in emitted))
    return Generation(
        tokens=tokens,
        cache_nbytes=run.cache.nbytes,
        vanilla_cache_nbytes=run.cache.vanilla_nbytes,
        ttft=first - start,
        tpot=(last - run.decode_start) / (num_steps - 1) if num_steps > 1 else None,
        cuda_graph=run.cuda_graph,
    )
