"""The paged cache of the storage layers, and what the layers see of it in one step.

A sequence owns a *row* of the block table and enough pages for its *capacity*, both reserved before
anything is written. Lengths live on the device too, so that a captured decode step can advance them.

The source layers, those that other layers read, can be held in float8_e4m3fn, with a scale a channel:

    stored = saturate(x / scale)    x ~ stored * scale

Nothing is multiplied by the scales when it is read: they are folded into the weights of the fusion, which the
cache keeps for every layer that reads sources. Scales and weights come from the model (`DecoderLayer.bind`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fusedkv_ext import ops
from fusedkv_ext.attention import (
    CUDNN_LENGTH,
    KeysValues,
    causal_attention,
    masked_attention,
    mix_sources,
    ragged_attention,
    takes_cudnn,
)
from fusedkv_ext.checks import FLOATS, HALF, expect, integer
from fusedkv_ext.config import FusedKVConfig
from fusedkv_ext.plan import LayerPlan

FP8_SOURCES = ("none", "copy", "only")
OWN_CALL = 1024  # tokens of a sequence whose attention takes longer than a launch
SPLIT_FROM = 4096  # tokens of which cuDNN gets a part where it is preferred: of fewer, flash is as good


@dataclass
class Sources:
    """What one attention reads: pages of its sources and float32 weights [sources, Hkv, D], None for ones.

    The weights are those of the fusion times the scales of the pages. layers: the sources. reread: the next
    layer's attention reads some of them too. stale: a scale of theirs has changed since.
    """

    layers: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    reread: bool
    key_weights: Tensor | None = None
    value_weights: Tensor | None = None
    stale: bool = False


class PagedKVCache:
    """Keys and values of the storage layers, in pages that sequences reserve and give back.

    Args:
        config: the model's.
        num_pages: pages of each storage layer.
        page_size: tokens a page.
        max_batch: sequences at a time.
        dtype, device: of the model; on CUDA float16 or bfloat16 and head_dim 64 or 128.
        fp8_sources: "none" holds every storage layer in dtype. With "copy" the source layers are in e4m3 too,
            for the layers above; their own attention reads their pages in dtype. With "only" they are in e4m3
            alone, for their own attention as well.

    Attributes:
        keys, values: for each storage layer a tensor [num_pages, page_size, Hkv, D], not initialised.
        key_copies, value_copies: the same for each source layer with "copy", else empty.
        fp8_layers: the source layers, when they are held in e4m3.
        block_table: int32 [max_batch, max_pages], the pages of each row; -1 where it has none.
        seq_lens: int32 [max_batch], the tokens of each row.

    Raises:
        ValueError: a size that is not positive, a dtype or head dim that the device's kernels lack, another
            fp8_sources, or one for a plan in which no layer reads another.
    """

    def __init__(
        self,
        config: FusedKVConfig,
        num_pages: int,
        page_size: int = 64,
        max_batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fp8_sources: str = "none",
    ):
        num_pages = integer(num_pages, "PagedKVCache", "num_pages", 1)
        page_size = integer(page_size, "PagedKVCache", "page_size", 1)
        max_batch = integer(max_batch, "PagedKVCache", "max_batch", 1)
        kernels = torch.device(device).type == "cuda"
        dtypes = HALF if kernels else FLOATS
        self._expect(dtype in dtypes, "dtype", f"{' or '.join(map(str, dtypes))} on {device}", dtype)
        fits = not kernels or config.head_dim in (64, 128)
        self._expect(fits, "head_dim", f"64 or 128 on {device}", config.head_dim)
        known = fp8_sources in FP8_SOURCES
        self._expect(known, "fp8_sources", " or ".join(FP8_SOURCES), repr(fp8_sources))
        plan = config.plan
        shared = fp8_sources == "none" or len(plan.source_layers) > 0
        wanted = f"none for the plan {plan.name}, in which no layer reads another"
        self._expect(shared, "fp8_sources", wanted, repr(fp8_sources))

        self.config, self.num_pages, self.page_size, self.max_batch = config, num_pages, page_size, max_batch
        self.dtype, self.fp8_sources = dtype, fp8_sources
        self._wide = torch.promote_types(dtype, torch.float32)  # of the weights
        self.fp8_layers = () if fp8_sources == "none" else plan.source_layers
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)

        def pages(layers: Sequence[int], e4m3: Sequence[int]) -> dict[int, Tensor]:
            dtypes = {layer: torch.float8_e4m3fn if layer in e4m3 else dtype for layer in layers}
            return {layer: torch.empty(shape, dtype=dtypes[layer], device=device) for layer in layers}

        alone = self.fp8_layers if fp8_sources == "only" else ()
        copied = self.fp8_layers if fp8_sources == "copy" else ()
        self.keys, self.values = (pages(plan.storage_layers, alone) for _ in range(2))
        self.key_copies, self.value_copies = (pages(copied, copied) for _ in range(2))
        self._scales: dict[int, KeysValues] = {}
        # By module, because a reconstruction layer has no number of its own.
        self._fused: WeakKeyDictionary[nn.Module, Sources] = WeakKeyDictionary()

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
        """Bytes allocated for keys and values, copies included."""
        pools = (self.keys, self.values, self.key_copies, self.value_copies)
        return sum(x.untyped_storage().nbytes() for pool in pools for x in pool.values())

    @property
    def vanilla_nbytes(self) -> int:
        """Bytes that as many pages would take if every layer had its own, in dtype."""
        config = self.config
        tokens, width = self.num_pages * self.page_size, config.num_kv_heads * config.head_dim
        return 2 * config.num_layers * tokens * width * self.dtype.itemsize

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def device(self) -> torch.device:
        return self.seq_lens.device

    @torch.no_grad()
    def set_scales(self, layer: int, k_scale: Tensor, v_scale: Tensor) -> None:
        """Take the scales of a layer that is held in e4m3.

        Args:
            layer: one of fp8_layers.
            k_scale, v_scale: float32 [Hkv, D], positive, as `StorageAttention.kv_scales` gives them.

        Raises:
            ValueError: another layer, dtype, shape or sign; or other scales than those with which the tokens
                in the cache were written.
        """
        self._expect(layer in self.fp8_layers, "layer", f"one held in e4m3, {self.fp8_layers}", layer)
        kept, shape = self._scales.get(layer), [self.config.num_kv_heads, self.config.head_dim]
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            fits = scale.dtype == torch.float32 and list(scale.shape) == shape and scale.device == self.device
            got = f"{scale.dtype} {list(scale.shape)} on {scale.device}"
            self._expect(fits, name, f"torch.float32 {shape} on {self.device}", got)
        if kept is not None and torch.equal(kept[0], k_scale) and torch.equal(kept[1], v_scale):
            return
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            positive = bool(((scale > 0) & scale.isfinite()).all())
            self._expect(positive, name, "positive finite numbers", "others")
        used = sum(self._lengths.values())
        wanted = "those that its tokens were written with, until all rows are freed"
        self._expect(used == 0, f"scales of layer {layer}", wanted, f"others, with {used} tokens in use")
        old = kept or (None, None)
        self._scales[layer] = (_keep(old[0], k_scale), _keep(old[1], v_scale))
        for sources in self._fused.values():
            sources.stale |= layer in sources.layers

    def scales(self, layer: int) -> KeysValues:
        """(k_scale, v_scale) of a layer that is held in e4m3.

        Raises:
            ValueError: they were not set.
        """
        wanted = "set_scales (or bind of the layer) before its first step"
        self._expect(layer in self._scales, f"scales of layer {layer}", wanted, "none")
        return self._scales[layer]

    @torch.no_grad()
    def set_weights(
        self, reader: nn.Module, plan: LayerPlan, key_weights: Tensor | None, value_weights: Tensor | None
    ) -> None:
        """Fold the scales into the fusion weights of a layer that reads sources, and keep the products.

        Args:
            reader: the ReconstructionAttention.
            plan: the layers that it reads.
            key_weights, value_weights: float32 [number of sources, Hkv, D], or None for ones.

        Raises:
            ValueError: a layer of the plan that the cache lacks, or whose scales were not set.
        """
        missing = sorted(set(plan.sources) - self.keys.keys())
        self._expect(not missing, "plan", f"sources among layers {sorted(self.keys)}", missing)
        if self.fp8_layers:
            apart = sorted(set(plan.sources) - set(self.fp8_layers))
            self._expect(not apart, "plan", f"sources held in e4m3, {self.fp8_layers}", apart)
        key_weights = self._fold(key_weights, plan.key_sources, 0)
        value_weights = self._fold(value_weights, plan.value_sources, 1)
        kept = self._fused.get(reader)
        if kept is None:
            keys, values = {**self.keys, **self.key_copies}, {**self.values, **self.value_copies}
            keys, values = [keys[i] for i in plan.key_sources], [values[i] for i in plan.value_sources]
            kept = Sources(plan.sources, keys, values, plan.sources in self.config.plan.reread_sources)
        kept.key_weights = _keep(kept.key_weights, key_weights)
        kept.value_weights = _keep(kept.value_weights, value_weights)
        kept.stale = False
        self._fused[reader] = kept

    def _fold(self, weights: Tensor | None, sources: Sequence[int], side: int) -> Tensor | None:
        if self.fp8_layers:
            scales = torch.stack([self.scales(layer)[side] for layer in sources])
            weights = scales if weights is None else weights * scales
        return None if weights is None else weights.to(self._wide)

    def own(self, layer: int) -> Sources:
        """What the attention of a storage layer reads; raises ValueError as `scales`."""
        # The layers above may read a copy instead.
        reread = (layer,) in self.config.plan.reread_sources and layer not in self.key_copies
        sources = Sources((layer,), [self.keys[layer]], [self.values[layer]], reread)
        if self.keys[layer].dtype == torch.float8_e4m3fn:
            k_scale, v_scale = self.scales(layer)
            sources.key_weights = k_scale[None].to(self._wide)
            sources.value_weights = v_scale[None].to(self._wide)
        return sources

    def fused(self, reader: nn.Module) -> Sources:
        """What a reconstruction layer reads.

        Raises:
            ValueError: its weights were not set, or not again after a change of scales.
        """
        sources = self._fused.get(reader)
        wanted = "set_weights (or bind of the layer) before its first step, and again after set_scales"
        ready = sources is not None and not sources.stale
        self._expect(ready, "weights", wanted, "none" if sources is None else "those for other scales")
        return sources

    def write_arguments(self, layer: int) -> dict[str, Tensor | None]:
        """The caches and scales that `ops.rope_write_kv` takes for a storage layer; errors as `scales`."""
        k_scale, v_scale = self.scales(layer) if layer in self.fp8_layers else (None, None)
        return dict(
            k_cache=self.keys[layer],
            v_cache=self.values[layer],
            k_scale=k_scale,
            v_scale=v_scale,
            k_copy=self.key_copies.get(layer),
            v_copy=self.value_copies.get(layer),
        )

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
        lengths = torch.tensor([self._lengths[row] for row in rows], dtype=torch.int32)
        self.seq_lens[upload(torch.tensor(list(rows)), self.device)] = upload(lengths, self.device)

    def prefill_chunk(self, rows: Sequence[int], counts: Sequence[int]) -> PrefillChunk:
        """The step that appends counts[i] tokens to rows[i]; `advance` the cache after it."""
        self.check_append(rows, counts)
        lengths = [self._lengths[row] + count for row, count in zip(rows, counts, strict=True)]
        # On the host, which knows the pages, so that it need not wait for the device.
        positions, new, slots = [], [], []
        for row, count, length in zip(rows, counts, lengths, strict=True):
            token = torch.arange(length)
            pages = torch.tensor(self._pages[row])
            of_row = pages[token // self.page_size] * self.page_size + token % self.page_size
            positions.append(token[length - count :])
            new.append(of_row[length - count :])
            slots.append(of_row)
        return PrefillChunk(
            cache=self,
            positions=upload(torch.cat(positions), self.device),
            slot_mapping=upload(torch.cat(new), self.device),
            counts=list(counts),
            lengths=lengths,
            slots=slots,
        )

    def decode_step(self, rows: Tensor, active: Tensor | None = None) -> DecodeStep:
        """The step that appends one token to each row; `commit` it after the layers.

        Runs on the device alone, so it can be captured in a CUDA graph; call check_append first.

        Args:
            rows: int64 [B], different rows.
            active: bool [B]; a row that is not active, or full, is neither written nor read nor advanced.
        """
        places = ops.decode_places(self.seq_lens, self.block_table, rows, active, self.page_size)
        positions, slots, table, seq_lens, lengths = places
        return DecodeStep(self, positions, slots, rows, table, seq_lens, lengths)

    def last_token_step(self, rows: Tensor) -> DecodeStep:
        """The step that attends again from the last token of each row and writes nothing."""
        lengths = self.seq_lens[rows]
        slots = torch.full_like(rows, -1)
        return DecodeStep(self, lengths - 1, slots, rows, self.block_table[rows], lengths, lengths)


def _keep(kept: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A copy of x, in the memory of `kept` if there is one: captured graphs go on reading that address."""
    if x is None:
        return None
    if kept is None:
        with torch.inference_mode(False):  # a tensor of inference mode could not be updated outside of it
            kept = torch.empty_like(x, memory_format=torch.contiguous_format)
    return kept.copy_(x)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on a device, without a wait for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class _Segment:
    """Neighbouring sequences of a chunk whose attention is one call.

    queries, keys: their part of the packed tokens. shape: (new tokens, all tokens) of each when they are
    alike, else None with ends and longest as ragged_attention takes them.
    """

    queries: slice
    keys: slice
    shape: tuple[int, int] | None
    ends: tuple[Tensor, Tensor] | None = None
    longest: tuple[int, int] = (0, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Attention of this part of q [T, Hq, D] to k, v [U, Hkv, D], or [sequences, length, Hkv, D]."""
        q = q[self.queries]
        if self.shape is None:
            k, v = (x.flatten(0, -3)[self.keys] for x in (k, v))
            return ragged_attention(q, k, v, self.ends, self.longest, window)
        count, length = self.shape
        k, v = (x if x.dim() == 4 else x[self.keys].unflatten(0, (-1, length)) for x in (k, v))
        if len(k) == 1:
            # The view may be of more; and cuDNN plans anew for another stride, even of one sequence.
            k, v = k[0, :length][None], v[0, :length][None]
        return causal_attention(q.unflatten(0, (-1, count)), k, v, window).flatten(0, 1)


@dataclass
class PrefillChunk:
    """Packed prompt tokens of several sequences, T in all, each attending to its own sequence.

    positions: int64 [T]. slot_mapping: int64 [T]. counts, lengths: of each sequence the new and all tokens.
    slots: for each sequence, on the host, the slots of all its tokens.
    """

    cache: PagedKVCache
    positions: Tensor
    slot_mapping: Tensor
    counts: list[int]
    lengths: list[int]
    slots: list[Tensor]
    _segments: dict[tuple[int, bool, bool], list[_Segment]] = field(default_factory=dict)

    def attend(self, q: Tensor, sources: Sources, window: int = 0) -> Tensor:
        """Attention of q [T, Hq, D] to cached keys and values, mixed in the dtype of q; [T, Hq, D]."""
        keys, values = ([self._read(x).to(q.dtype) for x in side] for side in (sources.keys, sources.values))
        k, v = mix_sources(keys, values, sources.key_weights, sources.value_weights)
        parts = [segment.attend(q, k, v, window) for segment in self.segments(window, q)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, pool: Tensor) -> Tensor:
        """All tokens of the sequences: a view [sequences, length, Hkv, D] where their pages allow one, else a
        packed copy [U, Hkv, D]."""
        if self._stride is None:
            return pool.flatten(0, 1)[self._gathered]
        rows = pool.flatten(0, 1)
        shape = (len(self.lengths), self.lengths[0], *rows.shape[1:])
        strides = (self._stride * rows.stride(0), *rows.stride())
        return rows.as_strided(shape, strides, rows.storage_offset() + int(self.slots[0][0]) * rows.stride(0))

    @cached_property
    def _gathered(self) -> Tensor:
        return upload(torch.cat(self.slots), self.cache.device)

    @cached_property
    def _stride(self) -> int | None:
        """Slots from each sequence to the next, when all are alike, in one piece and evenly spaced."""
        if len(set(zip(self.counts, self.lengths, strict=True))) > 1:
            return None
        slots, length = torch.stack(self.slots), self.lengths[0]
        stride = int(slots[1, 0] - slots[0, 0]) if len(slots) > 1 else length
        even = slots[0, 0] + stride * torch.arange(len(slots))[:, None] + torch.arange(length)
        return stride if stride > 0 and torch.equal(slots, even) else None

    def segments(self, window: int, q: Tensor) -> list[_Segment]:
        """The calls that attention of q takes: one where all sequences are alike, and as few as possible.

        On CUDA flash attention takes any sequences at once. The library's attention of equal sequences is
        faster still, so those that are long enough to be worth a call of their own get one: whole ones, or
        where cuDNN is preferred what it takes. The CPU has no such flash attention, but a call for each run
        of equal sequences.
        """
        ragged = q.is_cuda and q.dtype in HALF
        key = (window, ragged, takes_cudnn(q))
        if key not in self._segments:
            self._segments[key] = self._plan(*key)
        return self._segments[key]

    def _plan(self, window: int, ragged: bool, by_cudnn: bool) -> list[_Segment]:
        shapes = list(zip(self.counts, self.lengths, strict=True))

        def call(shape: tuple[int, int]) -> tuple[int, int] | None:
            count, length = shape
            if not ragged:
                return shape
            in_multiples = count % CUDNN_LENGTH == length % CUDNN_LENGTH == 0
            fits = in_multiples if by_cudnn else count == length
            alone = count >= OWN_CALL or len(set(shapes)) == 1
            return shape if fits and alone and window == 0 else None

        count, length = shapes[0]
        rest = count % CUDNN_LENGTH
        splits = by_cudnn and ragged and len(shapes) == 1 and count >= SPLIT_FROM and rest > 0
        if splits and call((count - rest, length - rest)):
            own = _Segment(slice(count - rest), slice(length - rest), (count - rest, length - rest))
            return [own, self._ragged(slice(count - rest, count), slice(length), [rest], [length])]
        segments, query, key = [], 0, 0
        for shape, group in groupby(shapes, call):
            counts, lengths = zip(*group, strict=True)
            queries, keys = slice(query, query + sum(counts)), slice(key, key + sum(lengths))
            query, key = queries.stop, keys.stop
            own = shape is not None
            segments.append(
                _Segment(queries, keys, shape) if own else self._ragged(queries, keys, counts, lengths)
            )
        return segments

    def _ragged(self, queries: slice, keys: slice, counts: Sequence[int], lengths: Sequence[int]) -> _Segment:
        ends = (torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in (counts, lengths))
        ends = tuple(upload(x, self.cache.device) for x in ends)
        return _Segment(queries, keys, None, ends, (max(counts), max(lengths)))


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

    def commit(self) -> None:
        """Store the new lengths on the device; the host learns of them by `cache.advance` only."""
        self.cache.seq_lens[self.rows] = self.lengths

    def attend(self, q: Tensor, sources: Sources, window: int = 0) -> Tensor:
        """Attention of q [B, Hq, D] to cached keys and values; [B, Hq, D]."""
        if max(len(sources.keys), len(sources.values)) > 2:
            return self._attend_gathered(q, sources)
        early = window in self._schedules
        out = ops.fused_attention(
            q[:, None],
            sources.keys,
            sources.values,
            sources.key_weights,
            sources.value_weights,
            self.block_table,
            self.seq_lens,
            self._schedule(window),
            q.shape[-1] ** -0.5,
            window,
            early_cache=early,
            keep_sources=sources.reread,
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

    def _attend_gathered(self, q: Tensor, sources: Sources) -> Tensor:
        """More sources than the kernel takes (the probe): mix the whole capacity, under a mask."""
        size = self.cache.page_size
        token = torch.arange(self.block_table.shape[1] * size, device=q.device)
        pages = self.block_table[:, token // size].long()
        visible = (token < self.seq_lens[:, None]) & (pages >= 0)
        slots = torch.where(visible, pages * size + token % size, 0)
        hidden = ~visible[:, :, None, None]  # a slot that was never written may hold NaN, and 0 * NaN is NaN
        keys = [x.flatten(0, 1)[slots].to(q.dtype).masked_fill(hidden, 0) for x in sources.keys]
        values = [x.flatten(0, 1)[slots].to(q.dtype).masked_fill(hidden, 0) for x in sources.values]
        k, v = mix_sources(keys, values, sources.key_weights, sources.value_weights)
        return masked_attention(q[:, None], k, v, visible[:, None, None, :])[:, 0]
