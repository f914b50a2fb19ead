"""The paged cache of the storage layers, and what the layers see of it in one step.

A sequence owns a *row* of the block table and enough pages for its *capacity*, both reserved before
anything is written. Lengths live on the device too, so that a captured decode step can advance them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fusedkv_ext import ops
from fusedkv_ext.checks import FLOATS, HALF, expect
from fusedkv_ext.config import FusedKVConfig
from fusedkv_ext.modules import KeysValues, causal_attention, masked_attention, mix_sources
from fusedkv_ext.plan import LayerPlan


class PagedKVCache:
    """Keys and values of the storage layers, in pages that sequences reserve and give back.

    Args:
        config: the model's.
        num_pages: pages of each storage layer.
        page_size: tokens a page.
        max_batch: sequences at a time.
        dtype, device: of the model; on CUDA float16 or bfloat16 and head_dim 64 or 128.

    Attributes:
        keys, values: for each storage layer a tensor [num_pages, page_size, Hkv, D], not initialised.
        block_table: int32 [max_batch, max_pages], the pages of each row; -1 where it has none.
        seq_lens: int32 [max_batch], the tokens of each row.

    Raises:
        ValueError: a size that is not positive, or a dtype or head dim that the device's kernels lack.
    """

    def __init__(
        self,
        config: FusedKVConfig,
        num_pages: int,
        page_size: int = 64,
        max_batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = {"num_pages": num_pages, "page_size": page_size, "max_batch": max_batch}
        for name, size in sizes.items():
            self._expect(isinstance(size, int) and size > 0, name, "a positive integer", repr(size))
        kernels = torch.device(device).type == "cuda"
        dtypes = HALF if kernels else FLOATS
        self._expect(dtype in dtypes, "dtype", f"{' or '.join(map(str, dtypes))} on {device}", dtype)
        fits = not kernels or config.head_dim in (64, 128)
        self._expect(fits, "head_dim", f"64 or 128 on {device}", config.head_dim)

        self.config, self.num_pages, self.page_size, self.max_batch = config, num_pages, page_size, max_batch
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for layer in config.plan.storage_layers:
            self.keys[layer] = torch.empty(shape, dtype=dtype, device=device)
            self.values[layer] = torch.empty(shape, dtype=dtype, device=device)

        longest = -(-config.max_position_embeddings // page_size)
        max_pages = min(num_pages, longest)
        self.block_table = torch.full((max_batch, max_pages), -1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}  # of each row in use
        self._lengths: dict[int, int] = {}  # seq_lens as the host knows them

    def _expect(self, condition: bool, name: str, expected: str, got: object) -> None:
        expect(condition, "PagedKVCache", name, expected, got)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(x.untyped_storage().nbytes() for x in tensors)

    @property
    def vanilla_nbytes(self) -> int:
        """Bytes that as many pages would take if every layer had its own."""
        return self.nbytes // len(self.keys) * self.config.num_layers

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def device(self) -> torch.device:
        return self.seq_lens.device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.keys.values())).dtype

    def length(self, row: int) -> int:
        """Tokens of a row."""
        self._check_rows([row])
        return self._lengths[row]

    def capacity(self, row: int) -> int:
        """Tokens that fit the pages which a row has reserved."""
        self._check_rows([row])
        return len(self._pages[row]) * self.page_size

    def add(self, capacities: Sequence[int]) -> list[int]:
        """Reserve a row and pages for each new sequence, all or none.

        Args:
            capacities: the most tokens that each sequence will have.

        Returns:
            Their rows.

        Raises:
            ValueError: more rows or pages than are free, or a sequence longer than the table or the model.
        """
        self._expect(len(capacities) > 0, "capacities", "at least one sequence", 0)
        rows = [row for row in range(self.max_batch) if row not in self._pages][: len(capacities)]
        self._expect(len(rows) == len(capacities), "rows", f"{len(capacities)} free sequences", len(rows))
        needed = [self._pages_for(capacity) for capacity in capacities]
        self._expect_free(sum(needed))
        for row, count in zip(rows, needed, strict=True):
            self._pages[row], self._lengths[row] = [], 0
            self._take(row, count)
        self.seq_lens[rows] = 0
        return rows

    def extend(self, row: int, capacity: int) -> None:
        """Reserve the pages that a row still needs for `capacity` tokens; raises ValueError as add does."""
        self._check_rows([row])
        more = self._pages_for(capacity) - len(self._pages[row])
        if more > 0:
            self._expect_free(more)
            self._take(row, more)

    def free(self, rows: Sequence[int]) -> None:
        """Give back rows and their pages."""
        self._check_rows(rows)
        for row in rows:
            self._free += reversed(self._pages.pop(row))
            del self._lengths[row]
        self.block_table[list(rows)] = -1
        self.seq_lens[list(rows)] = 0

    def _pages_for(self, capacity: int) -> int:
        longest = min(self.config.max_position_embeddings, self.block_table.shape[1] * self.page_size)
        fits = isinstance(capacity, int) and 0 < capacity <= longest
        self._expect(fits, "capacity", f"1 to {longest} tokens a sequence", capacity)
        return -(-capacity // self.page_size)

    def _expect_free(self, pages: int) -> None:
        wanted = f"at most {len(self._free)} free pages of {self.page_size} tokens to be enough"
        self._expect(pages <= len(self._free), "cache full", wanted, f"{pages} pages needed")

    def _take(self, row: int, count: int) -> None:
        pages = self._pages[row]
        pages += [self._free.pop() for _ in range(count)]
        self.block_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def _check_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._expect(row in self._pages, "rows", f"rows in use, {sorted(self._pages)}", row)
        self._expect(len(set(rows)) == len(rows), "rows", "different rows", list(rows))

    def check_append(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Raise ValueError unless each row is in use and has room for its count (1 or more) of new tokens."""
        self._check_rows(rows)
        whole = len(counts) == len(rows) and all(count > 0 for count in counts)
        self._expect(whole, "counts", f"{len(rows)} positive numbers, one a row", list(counts))
        for row, count in zip(rows, counts, strict=True):
            longest = min(self.capacity(row), self.config.max_position_embeddings)
            total = self._lengths[row] + count
            self._expect(total <= longest, f"row {row}", f"at most {longest} tokens in its pages", total)

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Count `counts` more tokens in the rows, once their keys and values are written."""
        self.check_append(rows, counts)
        for row, count in zip(rows, counts, strict=True):
            self._lengths[row] += count
        lengths = [self._lengths[row] for row in rows]
        self.seq_lens[list(rows)] = torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def prefill_chunk(self, rows: Sequence[int], counts: Sequence[int]) -> PrefillChunk:
        """The step that appends counts[i] tokens to rows[i]; `advance` the cache after it.

        Neighbouring rows of equal length and count are computed as one batch.
        """
        self.check_append(rows, counts)
        shapes = [(count, self._lengths[row] + count) for row, count in zip(rows, counts, strict=True)]
        positions, slots, groups = [], [], []
        for (count, length), members in groupby(range(len(rows)), key=shapes.__getitem__):
            table = self.block_table[[rows[i] for i in members]].long()
            token = torch.arange(length, device=self.device)
            group = table[:, token // self.page_size] * self.page_size + token % self.page_size
            groups.append((count, group))
            positions.append(token[length - count :].repeat(len(table)))
            slots.append(group[:, length - count :].flatten())
        return PrefillChunk(self, torch.cat(positions), torch.cat(slots), groups)

    def decode_step(self, rows: Tensor, active: Tensor | None = None) -> DecodeStep:
        """The step that appends one token to each row; `commit` it after the layers.

        Runs on the device alone, so it can be captured in a CUDA graph; call check_append first.

        Args:
            rows: int64 [B], different rows.
            active: bool [B]; a row that is not active is neither written nor read nor advanced.
        """
        before = self.seq_lens[rows]
        table = self.block_table[rows]
        page = (before // self.page_size).clamp(max=table.shape[1] - 1).long()
        page = table.gather(1, page[:, None])[:, 0].long()
        written = page >= 0 if active is None else (page >= 0) & active
        slots = torch.where(written, page * self.page_size + before % self.page_size, -1)
        seq_lens = torch.where(written, before + 1, 0)
        return DecodeStep(self, before, slots, rows, table, seq_lens, before + written.int())

    def last_token_step(self, rows: Tensor) -> DecodeStep:
        """The step that attends again from the last token of each row and writes nothing."""
        lengths = self.seq_lens[rows]
        slots = torch.full_like(rows, -1)
        return DecodeStep(self, lengths - 1, slots, rows, self.block_table[rows], lengths, lengths)


@dataclass
class PrefillChunk:
    """Packed prompt tokens of several sequences, T in all, each attending to its own sequence.

    positions: int64 [T]. slot_mapping: int64 [T]. groups: for each run of sequences of one shape the new
    tokens of each and the slots [sequences, length] of all its tokens.
    """

    cache: PagedKVCache
    positions: Tensor
    slot_mapping: Tensor
    groups: list[tuple[int, Tensor]]

    def keys_values(self, layer: int) -> KeysValues:
        return self.cache.keys[layer], self.cache.values[layer]

    def attend(
        self,
        q: Tensor,
        plan: LayerPlan,
        key_weights: Tensor | None,
        value_weights: Tensor | None,
        window: int = 0,
    ) -> Tensor:
        """Attention of q [T, Hq, D] to the cached keys and values of the plan; [T, Hq, D]."""
        outputs, start = [], 0
        for count, slots in self.groups:
            end = start + count * len(slots)
            keys = [self.cache.keys[layer].flatten(0, 1)[slots] for layer in plan.key_sources]
            values = [self.cache.values[layer].flatten(0, 1)[slots] for layer in plan.value_sources]
            k, v = mix_sources(keys, values, key_weights, value_weights)
            queries = q[start:end].unflatten(0, (-1, count))
            outputs.append(causal_attention(queries, k, v, window).flatten(0, 1))
            start = end
        return torch.cat(outputs)


@dataclass
class DecodeStep:
    """One token of each of B sequences.

    positions: int32 [B]. slot_mapping: int64 [B], -1 writes nothing. rows: int64 [B]. block_table: int32
    [B, max_pages]. seq_lens: int32 [B], the tokens to attend to. lengths: int32 [B], the tokens after it.
    """

    cache: PagedKVCache
    positions: Tensor
    slot_mapping: Tensor
    rows: Tensor
    block_table: Tensor
    seq_lens: Tensor
    lengths: Tensor
    _schedules: dict[int, Tensor] = field(default_factory=dict)

    def keys_values(self, layer: int) -> KeysValues:
        return self.cache.keys[layer], self.cache.values[layer]

    def commit(self) -> None:
        """Store the new lengths on the device; the host learns of them by `cache.advance` only."""
        self.cache.seq_lens[self.rows] = self.lengths

    def attend(
        self,
        q: Tensor,
        plan: LayerPlan,
        key_weights: Tensor | None,
        value_weights: Tensor | None,
        window: int = 0,
    ) -> Tensor:
        """Attention of q [B, Hq, D] to the cached keys and values of the plan; [B, Hq, D]."""
        keys = [self.cache.keys[layer] for layer in plan.key_sources]
        values = [self.cache.values[layer] for layer in plan.value_sources]
        if max(len(keys), len(values)) > 2:
            return self._attend_gathered(q, keys, values, key_weights, value_weights)
        out = ops.fused_attention(
            q[:, None],
            keys,
            values,
            key_weights,
            value_weights,
            self.block_table,
            self.seq_lens,
            self._schedule(window),
            q.shape[-1] ** -0.5,
            window,
        )
        return out[:, 0]

    def _schedule(self, window: int) -> Tensor:
        if window not in self._schedules:  # all layers of one window share it
            config = self.cache.config
            capacity = self.block_table.shape[1] * self.cache.page_size
            heads, kv_heads = config.num_attention_heads, config.num_kv_heads
            schedule = ops.attention_schedule(self.seq_lens, capacity, 1, heads, kv_heads, window)
            self._schedules[window] = schedule
        return self._schedules[window]

    def _attend_gathered(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        key_weights: Tensor | None,
        value_weights: Tensor | None,
    ) -> Tensor:
        """More sources than the kernel takes (the probe): mix the whole capacity, under a mask."""
        size = self.cache.page_size
        token = torch.arange(self.block_table.shape[1] * size, device=q.device)
        pages = self.block_table[:, token // size].long()
        visible = (token < self.seq_lens[:, None]) & (pages >= 0)
        slots = torch.where(visible, pages * size + token % size, 0)
        hidden = ~visible[:, :, None, None]  # a slot that was never written may hold NaN, and 0 * NaN is NaN
        keys = [x.flatten(0, 1)[slots].masked_fill(hidden, 0) for x in keys]
        values = [x.flatten(0, 1)[slots].masked_fill(hidden, 0) for x in values]
        k, v = mix_sources(keys, values, key_weights, value_weights)
        return masked_attention(q[:, None], k, v, visible[:, None, None, :])[:, 0]
