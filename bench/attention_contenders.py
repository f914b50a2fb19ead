"""The contenders of compare_attention.py: their buffers, their launches, and what the launches must give.

Each contender gets `sets` sets of a query, keys and values; page table, lengths and schedule are shared by
the sets, as the layers of one model share them. Everything is normally distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedkv_ext import ops

BF16 = torch.bfloat16
INVISIBLE_PAGE = 2**30  # in the unused entries of a block table
FLASHINFER_WORKSPACE = 256 << 20  # bytes; its documentation recommends 128 MB

# Largest error of a head's output, relative to its length: four roundings to bf16. A lost block of 64 tokens
# makes more than that in a sequence of 131072.
TOLERANCE = 4 * 2.0**-8


class Heads(NamedTuple):
    num_q: int
    num_kv: int
    dim: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


class Case(NamedTuple):
    """One batch: a cached length for each sequence, and the query tokens of each."""

    heads: Heads
    lengths: tuple[int, ...]
    num_query_tokens: int = 1

    def __str__(self) -> str:
        tokens = f"{len(self.lengths)} x {min(self.lengths)} to {max(self.lengths)} tokens"
        return f"{self.heads}, {tokens}, {self.num_query_tokens} query tokens"

    def cache_bytes(self, sources: int = 1, dtype: torch.dtype = BF16) -> int:
        """Bytes of keys and values that attention over `sources` sources reads, each once."""
        return 2 * sources * sum(self.lengths) * self.heads.num_kv * self.heads.dim * dtype.itemsize

    def queries(self, device: str) -> Tensor:
        shape = (len(self.lengths), self.num_query_tokens, self.heads.num_q, self.heads.dim)
        return torch.randn(shape, dtype=BF16, device=device)


class Contender(NamedTuple):
    bytes: int  # of keys and values that one launch reads
    launches: list[Callable[[], Tensor]]  # one a set; an output has the elements of [B, Q, Hq, D]
    expected: Callable[[], Tensor]  # float64 [B, Q, Hq, D] of the first set


class Mismatch(Exception):
    """A contender's output is wrong."""


def verify(name: str, contender: Contender) -> None:
    """Raise Mismatch unless the first launch gives what is expected, up to rounding to bf16."""
    expected = contender.expected()
    actual = contender.launches[0]().reshape(expected.shape).double()
    error = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if not error <= TOLERANCE:  # also when it is NaN
        raise Mismatch(f"{name}: relative error {error:.2e} in a head, allowed {TOLERANCE:.2e}")


class Pages:
    """Pages of sequences in random order: page table, and the same in the form that FlashInfer takes."""

    def __init__(self, lengths: Sequence[int], page_size: int, device: str):
        self.size = page_size
        counts = [-(-length // page_size) for length in lengths]
        self.count = sum(counts)
        order = torch.randperm(self.count, device=device).int()
        self.of_sequence = order.split(counts)
        self.indices = order
        self.indptr = torch.tensor([0, *counts], device=device).cumsum(0).int()
        self.last_page_len = torch.tensor([(n - 1) % page_size + 1 for n in lengths], device=device).int()
        self.seq_lens = torch.tensor(lengths, device=device).int()
        self.block_table = torch.nn.utils.rnn.pad_sequence(
            self.of_sequence, batch_first=True, padding_value=INVISIBLE_PAGE
        )

    def cache(self, heads: Heads, dtype: torch.dtype) -> Tensor:
        """[pages, page_size, Hkv, D]"""
        shape = (self.count, self.size, heads.num_kv, heads.dim)
        return torch.randn(shape, dtype=BF16, device=self.indices.device).to(dtype)

    def gather(self, sources: Sequence[Tensor], weights: Tensor | None, sequence: int, length: int) -> Tensor:
        """The weighted sum of a sequence's rows in caches, float64 [length, Hkv, D]."""
        pages, total = self.of_sequence[sequence].long(), 0.0
        for i, source in enumerate(sources):
            words = source.view(torch.int64)[pages]  # not every torch release indexes float8
            rows = words.view(source.dtype).flatten(0, 1)[:length].double()
            total = total + (rows if weights is None else weights[i].double() * rows)
        return total


def attend(q: Tensor, sequences: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """The definition, one sequence at a time. q: [B, Q, Hq, D]; keys and values: float64 [S, Hkv, D]."""
    outputs = []
    for queries, (keys, values) in zip(q.double(), sequences, strict=True):
        length, num_kv_heads, d = keys.shape
        grouped = queries.unflatten(1, (num_kv_heads, -1))  # [Q, Hkv, G, D]
        scores = torch.einsum("qhgd,thd->hgqt", grouped, keys) * d**-0.5
        positions = torch.arange(length, device=q.device)
        hidden = positions > positions[-len(queries) :, None]
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hgqt,thd->qhgd", probabilities, values).flatten(1, 2))
    return torch.stack(outputs)


def fusedkv(
    case: Case, sources: int, dtype: torch.dtype, page_size: int, sets: int, device: str
) -> Contender:
    """This package. One bf16 source is ordinary attention, without weights; e4m3 has them for its scales."""
    heads = case.heads
    pages = Pages(case.lengths, page_size, device)
    weights: tuple[Tensor | None, Tensor | None] = (None, None)
    if sources > 1 or dtype != BF16:
        shape = (2, sources, heads.num_kv, heads.dim)
        weights = tuple(torch.randn(shape, device=device))
    capacity = pages.block_table.shape[1] * page_size
    schedule = ops.attention_schedule(
        pages.seq_lens, capacity, case.num_query_tokens, heads.num_q, heads.num_kv
    )
    buffers = [
        (case.queries(device), *([pages.cache(heads, dtype) for _ in range(sources)] for _ in range(2)))
        for _ in range(sets)
    ]
    launches = [
        partial(  # early, as in a model: the schedule is there long before all but the first layer
            ops.fused_attention,
            *buffer,
            *weights,
            pages.block_table,
            pages.seq_lens,
            schedule,
            early_cache=True,
        )
        for buffer in buffers
    ]

    def expected() -> Tensor:
        q, *caches = buffers[0]
        return attend(
            q,
            (
                tuple(pages.gather(side, w, b, length) for side, w in zip(caches, weights, strict=True))
                for b, length in enumerate(case.lengths)
            ),
        )

    return Contender(case.cache_bytes(sources, dtype), launches, expected)


def sdpa(case: Case, backend: SDPBackend, sets: int, device: str) -> Contender:
    """torch's scaled_dot_product_attention over plain caches [B, Hkv, S, D] of an even batch."""
    heads, shape = case.heads, (len(case.lengths), case.heads.num_kv, case.lengths[0], case.heads.dim)

    def launch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=heads.num_q != heads.num_kv
            )

    buffers = [
        (
            case.queries(device).transpose(1, 2).contiguous(),
            *(torch.randn(shape, dtype=BF16, device=device) for _ in range(2)),
        )
        for _ in range(sets)
    ]

    def expected() -> Tensor:
        q, *caches = buffers[0]
        sequences = zip(*caches, strict=True)
        return attend(q.transpose(1, 2), (tuple(x.transpose(0, 1).double() for x in s) for s in sequences))

    return Contender(case.cache_bytes(), [partial(launch, *buffer) for buffer in buffers], expected)


def flashinfer(case: Case, page_size: int, tensor_cores: bool, sets: int, device: str) -> Contender:
    """FlashInfer's paged decode; `plan` runs here, once for all sets, as our schedule does."""
    import flashinfer

    heads = case.heads
    pages = Pages(case.lengths, page_size, device)
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        *heads,
        page_size,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    buffers = [
        (case.queries(device)[:, 0], tuple(pages.cache(heads, BF16) for _ in range(2))) for _ in range(sets)
    ]

    def expected() -> Tensor:
        q, caches = buffers[0]
        return attend(
            q[:, None],
            (
                tuple(pages.gather([cache], None, b, length) for cache in caches)
                for b, length in enumerate(case.lengths)
            ),
        )

    return Contender(case.cache_bytes(), [partial(wrapper.run, *buffer) for buffer in buffers], expected)
