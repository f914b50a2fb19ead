"""What the tests of fused_attention share: inputs, and an oracle that does not use fusedkv_ext.reference."""

import dataclasses

import pytest
import torch
from oracle import assert_close_2x

from fusedkv_ext import ops

E4M3 = torch.float8_e4m3fn
HUGE = 2**30  # what unused entries of a block table hold
LAYOUTS = ("NHD", "HND", "packed", "padded")
SOURCES = ((1, 1), (2, 2), (1, 2), (2, 1))  # of keys, of values

# dtype of q, dtype of the sources
F16, BF16 = (torch.float16,) * 2, (torch.bfloat16,) * 2
F16_E4M3, BF16_E4M3 = (torch.float16, E4M3), (torch.bfloat16, E4M3)


def over_dtypes(*pairs):
    """Parametrise a test over `dtypes`."""
    names = {F16: "f16", BF16: "bf16", F16_E4M3: "f16-e4m3", BF16_E4M3: "bf16-e4m3"}
    return pytest.mark.parametrize("dtypes", pairs, ids=names.get)


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k_sources: list[torch.Tensor]
    v_sources: list[torch.Tensor]
    key_weights: torch.Tensor | None
    value_weights: torch.Tensor | None
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    window: int = 0
    scale: float | None = None

    def args(self, convert=lambda x: x):
        def optional(x):
            return None if x is None else convert(x)

        return (
            convert(self.q),
            [convert(s) for s in self.k_sources],
            [convert(s) for s in self.v_sources],
            optional(self.key_weights),
            optional(self.value_weights),
            self.block_table,
            self.seq_lens,
        )

    def slots(self, b):
        """Pages and offsets of the tokens of sequence b, on the CPU."""
        tokens = torch.arange(self.seq_lens[b].item())
        page_size = self.k_sources[0].shape[1]
        return self.block_table[b].cpu()[tokens // page_size].long(), tokens % page_size


def in_layout(pool: torch.Tensor, layout: str, head_dim: int) -> torch.Tensor:
    """The cache [num_pages, page_size, Hkv, D] that a pool holds."""
    if layout == "HND":
        return pool.transpose(1, 2)
    return pool[:, :, 1] if layout == "packed" else pool[..., :head_dim]


def make_case(
    device,
    dtypes=BF16,
    lengths=(5, 64, 130),
    num_q=1,
    heads=(8, 2),
    head_dim=64,
    page_size=16,
    num_k=2,
    num_v=2,
    weighted=True,
    window=0,
    layout="NHD",
) -> Case:
    """Random pages in random order; slots that no token owns hold NaN, unused table entries a huge number.

    e4m3 sources hold numbers divided by a scale for each channel of each source, which the weights carry.
    """
    dtype, cache_dtype = dtypes
    hq, hkv = heads
    pages_of = [-(-n // page_size) for n in lengths]
    num_pages = sum(pages_of) + 2
    order = torch.randperm(num_pages)
    table = torch.full((len(lengths), max([*pages_of, 1]) + 1), HUGE, dtype=torch.int32)
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    start = 0
    for b, count in enumerate(pages_of):
        pages = order[start : start + count]
        table[b, :count] = pages.int()
        tokens = torch.arange(lengths[b])
        used[pages[tokens // page_size], tokens % page_size] = True
        start += count

    def side(count):
        scales = torch.ones(count, hkv, head_dim)
        if weighted and cache_dtype == E4M3:
            scales = torch.empty(count, hkv, head_dim).uniform_(-6, -2).exp2()
        sources = []
        for scale in scales:
            pad = 16 // cache_dtype.itemsize if layout == "padded" else 0  # the least that stays aligned
            shape = {
                "HND": (num_pages, hkv, page_size, head_dim),
                "packed": (num_pages, page_size, 2, hkv, head_dim),
            }.get(layout, (num_pages, page_size, hkv, head_dim + pad))
            pool = torch.full(shape, float("nan"))
            cache = in_layout(pool, layout, head_dim)
            cache[used] = torch.randn(int(used.sum()), hkv, head_dim) / scale
            sources.append(in_layout(pool.to(cache_dtype).to(device), layout, head_dim))
        weights = (torch.randn(count, hkv, head_dim) * scales).to(device) if weighted else None
        return sources, weights

    (k_sources, key_weights), (v_sources, value_weights) = side(num_k), side(num_v)
    return Case(
        torch.randn(len(lengths), num_q, hq, head_dim).to(dtype).to(device),
        k_sources,
        v_sources,
        key_weights,
        value_weights,
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        window,
    )


def set_keys(case: Case, keys) -> None:
    """Give token t of each sequence the key keys(length)[t] in every head of every source."""
    for source in case.k_sources:
        wide = source.float().cpu()
        for b, length in enumerate(case.seq_lens.tolist()):
            wide[case.slots(b)] = keys(length)[:, None].float()
        source.copy_(wide)


def plain_torch(case: Case) -> torch.Tensor:
    """The same maths in plain torch at the precision of q: form K_i and V_i, then attend.

    Scores and softmax are in float32, as in torch's own attention: rounded to bf16, scores of some hundreds
    would be off by whole powers of e.
    """
    dtype, device = case.q.dtype, case.q.device
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros_like(case.q)
    num_pages, page_size, hkv, d = case.k_sources[0].shape
    num_q, hq = case.q.shape[1:3]
    scale = d**-0.5 if case.scale is None else case.scale
    k_sources, v_sources = ([s.to(dtype) for s in sources] for sources in (case.k_sources, case.v_sources))

    def mix(sources, weights, slots):
        if weights is None:
            return sum(s[slots] for s in sources)
        return sum(w.to(dtype) * s[slots] for w, s in zip(weights, sources, strict=True))

    for b, length in enumerate(case.seq_lens.tolist()):
        pos = torch.arange(length, device=device)
        pages = case.block_table[b, pos // page_size].long()
        known = (pages >= 0) & (pages < num_pages)
        slots = (pages.where(known, 0), pos % page_size)
        unknown = ~known[:, None, None]
        keys = mix(k_sources, case.key_weights, slots).masked_fill(unknown, 0)
        values = mix(v_sources, case.value_weights, slots).masked_fill(unknown, 0)
        keys, values = (x.repeat_interleave(hq // hkv, 1) for x in (keys, values))
        scores = torch.einsum("qhd,thd->hqt", case.q[b].to(wide), keys.to(wide)) * scale
        distance = length - num_q + torch.arange(num_q, device=device)[:, None] - pos
        visible = known & (distance >= 0) & (distance < (case.window or length))
        p = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0).to(dtype)
        out[b] = torch.einsum("hqt,thd->qhd", p, values)
    return out


def run(case: Case) -> torch.Tensor:
    return ops.fused_attention(*case.args(), scale=case.scale, window=case.window)


def check(case: Case, copies: int = 1) -> None:
    """Apply the 2x rule to the case with its batch repeated; the copies share their pages."""
    exact = plain_torch(Case(*case.args(torch.Tensor.double), case.window, case.scale))
    batch = dataclasses.replace(
        case,
        q=case.q.repeat(copies, 1, 1, 1),
        block_table=case.block_table.repeat(copies, 1),
        seq_lens=case.seq_lens.repeat(copies),
    )
    assert_close_2x(run(batch), *(x.repeat(copies, 1, 1, 1) for x in (exact, plain_torch(case))))
