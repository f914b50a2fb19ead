"""Every op in plain torch: the oracle of the tests, the documentation, and the CPU implementation.

The functions compute in float64 when their inputs are float64 and in float32 otherwise, and round once at
the end. They read device-side indices as the kernels do: a slot or a page outside the cache is skipped.

Dimensions: T tokens, B sequences, Q query tokens a sequence, Hq query heads, Hkv key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.checks import BLOCK_TOKENS, DONE


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in at least float32: x / sqrt(mean(x^2) + eps) * weight."""
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair of channels of x [T, H, D] by the angle of its position, in at least float32.

    The pair of channel j is j + D/2 (rotate-half), or (2j, 2j+1) when `interleaved`. cos_sin is
    [max_positions, D]: cosines, then sines. A position outside the table gives NaN.
    """
    x = _wide(x)
    inside = (positions >= 0) & (positions < cos_sin.shape[0])
    table = cos_sin.to(x.dtype)[torch.where(inside, positions, 0).long()]
    table = table.masked_fill(~inside[:, None], float("nan"))
    cos, sin = table[:, None].chunk(2, -1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def _store(
    rows: Tensor, cache: Tensor, slot_mapping: Tensor, scale: Tensor | None, copy: Tensor | None = None
) -> None:
    if copy is not None:
        _store(rows, copy, slot_mapping, scale)
        scale = None  # it belongs to the copy
    page_size = cache.shape[1]
    valid = (slot_mapping >= 0) & (slot_mapping < cache.shape[0] * page_size)
    slots, rows = slot_mapping[valid], _wide(rows[valid])
    if scale is not None:
        rows = rows / scale.to(rows.dtype)
    if cache.dtype == torch.float8_e4m3fn:
        rows = rows.clamp(-448.0, 448.0)  # a cast alone gives NaN beyond the range on some releases
    cache[slots // page_size, slots % page_size] = rows.to(cache.dtype)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_copy: Tensor | None = None,
    v_copy: Tensor | None = None,
) -> None:
    _store(k, k_cache, slot_mapping, k_scale, k_copy)
    _store(v, v_cache, slot_mapping, v_scale, v_copy)


def rope_write_kv(
    qkv: Tensor,
    q_out: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    slot_mapping: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_copy: Tensor | None = None,
    v_copy: Tensor | None = None,
) -> None:
    num_q = 0 if q_out is None else q_out.shape[1]
    num_kv = 0 if k_cache is None else k_cache.shape[2]
    q, k, v = qkv.split([num_q, num_kv, num_kv], 1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    if q_out is not None:
        q_out.copy_(apply_rope(q, positions, cos_sin, interleaved))
    if k_cache is not None:
        inside = (positions >= 0) & (positions < cos_sin.shape[0])
        slots = torch.where(inside, slot_mapping, -1)
        _store(apply_rope(k, positions, cos_sin, interleaved), k_cache, slots, k_scale, k_copy)
        _store(v, v_cache, slots, v_scale, v_copy)


def rope_key_projection(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    wide_bias = None if bias is None else _wide(bias)
    heads = torch.nn.functional.linear(_wide(x), _wide(weight), wide_bias)
    heads = heads.unflatten(-1, (-1, cos_sin.shape[1]))
    if norm is not None:
        heads = rms_norm(heads, norm, eps)
    return apply_rope(heads, positions, cos_sin, interleaved).to(x.dtype)


def rope_key_projection_write(
    x: Tensor,
    weight: Tensor,
    q_out: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_copy: Tensor | None = None,
    v_copy: Tensor | None = None,
    input_norm: Tensor | None = None,
    early_weight: bool = False,
) -> None:
    if input_norm is not None:
        x = rms_norm(x, input_norm, eps)
    wide_bias = None if bias is None else _wide(bias)
    heads = torch.nn.functional.linear(_wide(x), _wide(weight), wide_bias)
    rope_write_kv(
        heads.unflatten(-1, (-1, cos_sin.shape[1])),
        q_out,
        k_cache,
        v_cache,
        positions,
        cos_sin,
        q_norm,
        k_norm,
        eps,
        interleaved,
        slot_mapping,
        k_scale,
        v_scale,
        k_copy,
        v_copy,
    )


def rope_norm_backward(
    grad: Tensor,
    heads: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    # The transpose of a rotation is the rotation by the opposite angle; a scale in the table stays as it is.
    cos, sin = cos_sin.chunk(2, -1)
    wide = apply_rope(grad, positions, torch.cat((cos, -sin), -1), interleaved)
    if norm is None:
        return wide.to(grad.dtype).contiguous(), cos_sin.new_empty(0)
    x = _wide(heads)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * inverse
    grad_norm = (wide * unit).sum((0, 1))
    wide = wide * norm.to(wide.dtype)
    grad_heads = inverse * (wide - unit * (wide * unit).mean(-1, keepdim=True))
    return grad_heads.to(grad.dtype).contiguous(), grad_norm


def _mix(sources: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    if weights is None:
        return sum(_wide(s) for s in sources)
    return sum(w.to(_wide(s).dtype) * _wide(s) for w, s in zip(weights, sources, strict=True))


def fuse_kv(
    k_sources: Sequence[Tensor], v_sources: Sequence[Tensor], key_weights: Tensor, value_weights: Tensor
) -> tuple[Tensor, Tensor]:
    k = _mix(k_sources, key_weights).to(k_sources[0].dtype)
    return k.contiguous(), _mix(v_sources, value_weights).to(v_sources[0].dtype).contiguous()


def fuse_kv_backward(
    grad_k: Tensor,
    grad_v: Tensor,
    k_sources: Sequence[Tensor],
    v_sources: Sequence[Tensor],
    key_weights: Tensor,
    value_weights: Tensor,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    def side(grad: Tensor, sources: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
        grad = _wide(grad).contiguous()
        grad_sources = [(w.to(grad.dtype) * grad).to(s.dtype) for w, s in zip(weights, sources, strict=True)]
        products = [(grad * _wide(s)).reshape(-1, *grad.shape[-2:]) for s in sources]
        grad_weights = torch.stack([product.sum(0) for product in products])
        return grad_sources, grad_weights.to(weights.dtype)

    grad_ks, grad_a = side(grad_k, k_sources, key_weights)
    grad_vs, grad_b = side(grad_v, v_sources, value_weights)
    return grad_ks, grad_vs, grad_a, grad_b


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype).contiguous()


def linear_add(out: Tensor, x: Tensor, weight: Tensor, early_weight: bool = False) -> None:
    out.addmm_(x, weight.t())  # adds what out holds before it rounds


def swiglu_linear(
    x: Tensor,
    weight: Tensor,
    input_norm: Tensor | None = None,
    eps: float = 1e-6,
    early_weight: bool = False,
) -> Tensor:
    """Rounds in between, unlike the others: widening a weight in every call takes longer than its product."""
    if input_norm is not None:
        x = rms_norm(x, input_norm, eps).to(x.dtype)
    return swiglu(torch.nn.functional.linear(x, weight))


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, in torch ops on every device: torch.compile makes one kernel of it."""
    gate, up = _wide(gate_up).chunk(2, -1)
    grad, sigmoid = _wide(grad), gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad_gate, grad * gate * sigmoid), -1).to(gate_up.dtype)


def decode_places(
    seq_lens: Tensor, block_table: Tensor, rows: Tensor, active: Tensor | None, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    known = (rows >= 0) & (rows < seq_lens.shape[0])
    rows = torch.where(known, rows, 0)
    positions = torch.where(known, seq_lens[rows], 0)
    table = torch.where(known[:, None], block_table[rows], -1)
    column = (positions // page_size).long()
    page = table.gather(1, column.clamp(0, table.shape[1] - 1)[:, None])[:, 0].long()
    written = (positions >= 0) & (column < table.shape[1]) & (page >= 0)
    if active is not None:
        written &= active
    slot_mapping = torch.where(written, page * page_size + positions % page_size, -1)
    return positions, slot_mapping, table, torch.where(written, positions + 1, 0), positions + written.int()


def largest_token(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def accept_tokens(
    chosen: Tensor,
    stop_tokens: Tensor,
    active: Tensor,
    tokens: Tensor,
    emitted: Tensor,
    count: Tensor,
    seq_lens: Tensor | None = None,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    active &= (chosen[:, None] != stop_tokens).all(-1)
    tokens.copy_(torch.where(active, chosen, tokens))
    if 0 <= (step := int(count)) < emitted.shape[0]:
        emitted[step] = torch.where(active, chosen, DONE)
    count += 1
    if seq_lens is not None:
        known = (rows >= 0) & (rows < seq_lens.shape[0])
        seq_lens[rows[known]] = lengths[known]


def attention_schedule(
    seq_lens: Tensor,
    max_seq_len: int,
    num_query_tokens: int,
    num_query_heads: int,
    num_kv_heads: int,
    window: int = 0,
) -> Tensor:
    lengths = seq_lens.long().clamp(0, max_seq_len)
    first = torch.zeros_like(lengths)
    if window > 0:
        first = (lengths - num_query_tokens - window + 1).clamp(min=0) // BLOCK_TOKENS
    blocks = ((lengths + BLOCK_TOKENS - 1) // BLOCK_TOKENS - first).clamp(min=1)
    return torch.cat((blocks.new_zeros(1), blocks.cumsum(0))).int()


def fused_attention(
    q: Tensor,
    k_sources: Sequence[Tensor],
    v_sources: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    schedule: Tensor,
    scale: float,
    window: int = 0,
    early_cache: bool = False,
    keep_sources: bool = False,
) -> Tensor:
    batch, num_tokens, num_q_heads, _ = q.shape
    num_pages, page_size, num_kv_heads, _ = k_sources[0].shape
    out = torch.zeros_like(_wide(q))
    for b in range(batch):
        length = min(max(int(seq_lens[b]), 0), block_table.shape[1] * page_size)
        key_pos = torch.arange(length, device=q.device)
        pages = block_table[b, key_pos // page_size].long()
        key_pos, pages = key_pos[(known := (pages >= 0) & (pages < num_pages))], pages[known]
        if key_pos.numel() == 0:
            continue
        slots = (pages, key_pos % page_size)
        keys = _mix([source[slots].to(out.dtype) for source in k_sources], key_weights)  # [tokens, Hkv, D]
        values = _mix([source[slots].to(out.dtype) for source in v_sources], value_weights)
        group = num_q_heads // num_kv_heads
        queries = _wide(q[b]).unflatten(1, (num_kv_heads, group))  # [Q, Hkv, G, D]
        scores = torch.einsum("qhgd,thd->hgqt", queries, keys) * scale
        query_pos = length - num_tokens + torch.arange(num_tokens, device=q.device)[:, None]
        visible = key_pos <= query_pos
        if window > 0:
            visible &= key_pos > query_pos - window
        probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        probabilities = probabilities.masked_fill(~visible, 0.0)  # a row that sees nothing gives zero
        out[b] = torch.einsum("hgqt,thd->qhgd", probabilities, values).flatten(1, 2)
    return out.to(q.dtype)
