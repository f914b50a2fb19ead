"""The ops, typed. Each is one call of `torch.ops.fusedkv.<name>`, CUDA kernel or CPU implementation.

Dimensions: T tokens, B sequences, Q query tokens a sequence, Hq query heads, Hkv key/value heads,
G = Hq / Hkv, D head dim. A *cache* is a view `[num_pages, page_size, Hkv, D]` with any page, token and head
stride and stride 1 in the last dimension. A *slot* is `page * page_size + offset in the page`.

CUDA takes float16 and bfloat16 with D 64 or 128; strides and addresses of caches are multiples of 16 bytes.
The CPU also takes float32 and float64 and any even D. Bad arguments raise `ValueError` with the text
`op: argument: expected ..., got ...` before anything is written. Indices that live on the device are not
trusted: a slot or page outside the cache is skipped. `fuse_kv`, `rope_key_projection` and `swiglu` are
differentiable, the others are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext import library as library
from fusedkv_ext.checks import expect

_ops = torch.ops.fusedkv


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
    """Write keys and values of a storage layer into their cache slots.

        cache[slot_mapping[t]] = saturate(x[t] / scale)

    or, with copies, which the same launch writes,

        cache[slot_mapping[t]] = x[t],   copy[slot_mapping[t]] = saturate(x[t] / scale)

    Args:
        k, v: [T, Hkv, D].
        k_cache, v_cache: caches of the dtype of k, or both float8_e4m3fn; mutated.
        slot_mapping: int64 [T]; -1 skips the token. Two tokens must not share a slot.
        k_scale, v_scale: float32 [Hkv, D], or None for ones.
        k_copy, v_copy: float8_e4m3fn caches of the shape of k_cache with strides of their own, mutated, both
            or neither; k_cache and v_cache then have the dtype of k.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    _ops.write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, k_copy, v_copy)


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
    """Per-head RMSNorm, RoPE and the cache write of a packed projection, in one launch.

        q_out = rope(norm(q)),   k_cache[slot] = rope(norm(k)) / k_scale,   v_cache[slot] = v / v_scale

    With copies the scales belong to them, as in `write_kv`. Caches and copies are each rounded once, from the
    float32 result of norm and RoPE.

    Args:
        qkv: [T, Hq + 2 * Hkv, D], heads in the order q, k, v.
        q_out: [T, Hq, D] contiguous, mutated; None when qkv has no query heads.
        k_cache, v_cache: as in `write_kv`, mutated; None (with slot_mapping) when qkv has only query heads.
        positions: int32 or int64 [T]. A position outside cos_sin gives a row of NaN in q_out and no write.
        cos_sin: float32 [max_positions, D], cosines in the first D/2 columns and sines in the others.
        q_norm, k_norm: RMSNorm weights [D] of the dtype of qkv, or None for no norm.
        eps: epsilon of the norms.
        interleaved: pair channels (2j, 2j+1) instead of (j, j + D/2).
        slot_mapping, k_scale, v_scale, k_copy, v_copy: as in `write_kv`.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    _ops.rope_write_kv(
        qkv,
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
    """Project to heads, normalise each head and rotate it: `rope(norm(x @ weight.T + bias))`.

    Differentiable in x, weight, norm and bias: the backward pass is `rope_norm_backward` and matmuls.

    Args:
        x: [T, hidden], hidden a multiple of 8.
        weight: [H * D, hidden] contiguous; D is the width of cos_sin.
        positions, cos_sin, norm, eps, interleaved: as in `rope_write_kv`; norm serves every head.
        bias: [H * D] or None.

    Returns:
        [T, H, D] of the dtype of x.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    return _ops.rope_key_projection(x, weight, positions, cos_sin, norm, eps, bias, interleaved)


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
    """`rope_write_kv` of the product `x @ weight.T + bias`, without the product touching memory.

    Args:
        x: [T, hidden], hidden a multiple of 8.
        weight: [(Hq + 2 * Hkv) * D, hidden] contiguous, heads in the order q, k, v.
        bias: [(Hq + 2 * Hkv) * D] or None.
        input_norm: [hidden]: x goes through RMSNorm with this weight and eps first, on Hopper for few tokens
            in bfloat16 in the same launch.
        early_weight: as in `linear_add`.
        The others: as in `rope_write_kv`.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    _ops.rope_key_projection_write(
        x,
        weight,
        q_out,
        k_cache,
        v_cache,
        positions,
        cos_sin,
        slot_mapping,
        q_norm,
        k_norm,
        eps,
        bias,
        interleaved,
        k_scale,
        v_scale,
        k_copy,
        v_copy,
        input_norm,
        early_weight,
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
    """Gradients of `rope(norm(heads))` in one pass, bit-identical from run to run.

    With g the gradient rotated back, u = heads / rms(heads) and w the norm's weight:

        dw = sum over tokens and heads of g * u,   dheads = (w g - u mean(w g u)) / rms(heads)

    and dheads = g without a norm.

    Args:
        grad: [T, H, D], the gradient of the rotated heads.
        heads: [T, H, D] of the dtype of grad, before the norm; None without a norm.
        positions, cos_sin, norm, eps, interleaved: as in `rope_key_projection`.

    Returns:
        (gradient of heads [T, H, D] in the dtype of grad, that of norm [D] in float32, or float64 for
        float64; [0] without a norm).

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    return _ops.rope_norm_backward(grad, heads, positions, cos_sin, norm, eps, interleaved)


def fuse_kv(
    k_sources: Sequence[Tensor], v_sources: Sequence[Tensor], key_weights: Tensor, value_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Form the keys and values of a reconstruction layer in one pass.

        K_i = sum_s key_weights[s] * k_sources[s],   V_i = sum_s value_weights[s] * v_sources[s]

    which is the paper's K_i = a_1 * K_1 + a_n * K_n for two sources. Differentiable in all four arguments;
    the backward pass is `fuse_kv_backward`.

    Args:
        k_sources, v_sources: 1 to 8 tensors [..., Hkv, D] each, all of one shape; keys after RoPE.
        key_weights, value_weights: float32 [number of sources, Hkv, D]. Equal weights inside each rotated
            pair of key channels are the caller's duty (`FusionWeights` ties them).

    Returns:
        (k, v), contiguous, of the shape and dtype of the sources.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    return _ops.fuse_kv(k_sources, v_sources, key_weights, value_weights)


def fuse_kv_backward(
    grad_k: Tensor,
    grad_v: Tensor,
    k_sources: Sequence[Tensor],
    v_sources: Sequence[Tensor],
    key_weights: Tensor,
    value_weights: Tensor,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of `fuse_kv` in one pass, bit-identical from run to run.

        dK_s = a_s * dK_i,   da_s = sum over rows of dK_i * K_s   (and the same for values)

    Args:
        grad_k, grad_v: gradients of k and v, of their shape and dtype.
        The others: the arguments of `fuse_kv`.

    Returns:
        (gradients of k_sources, of v_sources, of key_weights, of value_weights).

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    return _ops.fuse_kv_backward(grad_k, grad_v, k_sources, v_sources, key_weights, value_weights)


def swiglu(gate_up: Tensor) -> Tensor:
    """The gated activation of a SwiGLU MLP in one pass, computed in float32 and rounded once.

        out = silu(gate) * up,   silu(x) = x / (1 + exp(-x))

    Differentiable, twice too: the backward pass is torch's own operations.

    Args:
        gate_up: [..., 2 * I], gate in the first I columns and up in the others; on CUDA I is a multiple of 8.

    Returns:
        [..., I], contiguous, of the dtype of gate_up.

    Raises:
        ValueError: a dtype, shape or stride that does not fit.
    """
    return _ops.swiglu(gate_up)


def linear_add(out: Tensor, x: Tensor, weight: Tensor, early_weight: bool = False) -> None:
    """Add a product to what is there, as o_proj and down_proj do to the residual stream, and round once.

        out += x @ weight.T

    On Hopper one launch for up to 64 tokens (N a multiple of 32, K of 8), which reads the weight faster than
    the library's product; else the library's. Not differentiable.

    Args:
        out: [T, N], changed in place; no memory in common with x.
        x: [T, K] of the dtype of out.
        weight: [N, K].
        early_weight: the kernel launched right before this op does not write the weight. On Hopper it is then
            read, for few tokens, while that kernel still runs.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    _ops.linear_add(out, x, weight, early_weight)


def swiglu_linear(
    x: Tensor,
    weight: Tensor,
    input_norm: Tensor | None = None,
    eps: float = 1e-6,
    early_weight: bool = False,
) -> Tensor:
    """The first half of a SwiGLU MLP: RMSNorm, the product with gate and up, and the gated activation.

        gate, up = (norm(x) @ weight.T).chunk(2, -1),   out = silu(gate) * up

    On Hopper one launch for up to 64 tokens (I a multiple of 16, K of 8; with a norm in bfloat16 only) that
    does not round between norm, product and activation; else the library's norm and product, and `swiglu`.
    Not differentiable.

    Args:
        x: [T, K].
        weight: [2 * I, K] of the dtype of x, gate in the first I rows; on CUDA I is a multiple of 8.
        input_norm, eps: x / sqrt(mean(x^2) + eps) * input_norm, [K]; None for x as it is.
        early_weight: as in `linear_add`.

    Returns:
        [T, I].

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    return _ops.swiglu_linear(x, weight, input_norm, eps, early_weight)


def decode_places(
    seq_lens: Tensor, block_table: Tensor, rows: Tensor, active: Tensor | None, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where a decode step writes the new token of each sequence, and what it attends to.

    Args:
        seq_lens: int32 [R], the tokens of each row of the cache.
        block_table: int32 [R, max_pages], the pages of each row in order, -1 where it has none.
        rows: int64 [B], the rows of the sequences. One outside [0, R) counts as empty and without pages.
        active: bool [B], or None for all.
        page_size: tokens a page.

    Returns:
        (positions, slot_mapping, table, lens, lengths): int32 [B], where the new token stands; int64 [B], its
        slot, -1 if it is not written because its sequence is not active or has no page for it; int32
        [B, max_pages], the rows of block_table; int32 [B], the tokens to attend to, 0 if it is not written;
        int32 [B], the tokens of the row after the step.

    Raises:
        ValueError: a device, dtype, shape, stride or number that does not fit.
    """
    return _ops.decode_places(seq_lens, block_table, rows, active, page_size)


def largest_token(logits: Tensor) -> Tensor:
    """The place of the largest of each row, of equals the first; NaN is larger than all numbers.

    Args:
        logits: [B, vocab], vocab at least 1; on CUDA float16, bfloat16 or float32.

    Returns:
        int64 [B].

    Raises:
        ValueError: a dtype, shape or stride that does not fit.
    """
    return _ops.largest_token(logits)


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
    """Take the chosen tokens, finish the sequences that stop, and count the step, in one launch.

        active &= chosen is no stop token,   tokens[active] = chosen[active]
        emitted[count] = chosen where active, else -1,   count += 1,   seq_lens[rows] = lengths

    Args:
        chosen: int64 [B].
        stop_tokens: int64 [any number].
        active: bool [B], mutated.
        tokens: int64 [B], mutated.
        emitted: int64 [steps, B] contiguous, mutated; not at all with a count outside [0, steps).
        count: int64 [1], mutated.
        seq_lens: int32 [R], mutated; None, with rows and lengths, to leave lengths alone.
        rows: int64 [B], different ones; one outside [0, R) is skipped.
        lengths: int32 [B].

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    _ops.accept_tokens(chosen, stop_tokens, active, tokens, emitted, count, seq_lens, rows, lengths)


def attention_schedule(
    seq_lens: Tensor,
    max_seq_len: int,
    num_query_tokens: int,
    num_query_heads: int,
    num_kv_heads: int,
    window: int = 0,
) -> Tensor:
    """The work split of `fused_attention`, built on the device once a step and shared by all its layers.

    Args:
        seq_lens: int32 [B], tokens in the cache, the query tokens included.
        max_seq_len: lengths are clamped to [0, max_seq_len]; the capacity of the block table in tokens. With
            less than a length, the results of that sequence are undefined.
        num_query_tokens, num_query_heads, num_kv_heads, window: those of the attention.

    Returns:
        int32: B + 1 cumulative counts of 64-token blocks; on CUDA also where each CTA begins, and room for
        partial results (2 MB for up to 8 query rows G * Q a key/value head, 13 MB for 64 or more), which
        `fused_attention` leaves as it found it. It serves attention with these lengths, query tokens, heads
        and window alone, on GPUs of this model, and not two streams at once.

    Raises:
        ValueError: a dtype, shape or number that does not fit.
    """
    return _ops.attention_schedule(
        seq_lens, max_seq_len, num_query_tokens, num_query_heads, num_kv_heads, window
    )


def fused_attention(
    q: Tensor,
    k_sources: Sequence[Tensor],
    v_sources: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    schedule: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    early_cache: bool = False,
    keep_sources: bool = False,
) -> Tensor:
    """Attention of a few query tokens a sequence over a paged cache, fusing keys and values on the fly.

        out = softmax(scale * q K_i^T) V_i,   K_i = sum_s key_weights[s] * k_sources[s],  V_i likewise

    computed as scores = sum_s (a_s * q) K_s^T and out = sum_s b_s * (P V_s), so that K_i and V_i never exist.
    One source each is ordinary attention; FusedKV has two. Query token j stands at position seq_len - Q + j
    and sees the positions up to its own, the last `window` of them when window > 0.

    Args:
        q: [B, Q, Hq, D], 1 <= Q <= 16, after RoPE.
        k_sources, v_sources: 1 or 2 caches each, all keys with the same strides and all values too. All of
            the dtype of q, or all float8_e4m3fn, whose scales the caller folds into the weights. CUDA
            multiplies e4m3 in float16: a_s * q saturates at 65504 and loses precision below 6e-5.
        key_weights, value_weights: float32 [number of sources, Hkv, D], or None for ones.
        block_table: int32 [B, max_pages], the pages of each sequence in order; tokens of a page outside the
            cache are invisible.
        seq_lens: int32 [B], tokens in the cache, the query tokens included; clamped to the block table.
        schedule: from `attention_schedule`; None builds it, at the cost of one more launch.
        scale: of the scores; None means 1 / sqrt(D).
        window: 0 for none.
        early_cache: a promise, of which nothing is checked: the kernel launched right before this op has
            written none of schedule, seq_lens, block_table (another `fused_attention` counts as none) and the
            sources, but for the rows of the query tokens, the last Q of each sequence, which are no other
            sequence's older ones; nor did it let this one start before those that have were through, as only
            kernels with programmatic dependent launch can. From Hopper on all this is then read while it
            still runs. Without a schedule it must be False.
        keep_sources: a hint: the next attention reads some of the same sources, so that a part of them, up to
            a third of the L2, is worth keeping there. Otherwise the L2 drops them first.

    Returns:
        [B, Q, Hq, D] of the dtype of q; a query token that sees nothing gets zeros.

    Raises:
        ValueError: a device, dtype, shape or stride that does not fit.
    """
    if schedule is None:
        expect(not early_cache, "fused_attention", "early_cache", "False without a schedule", True)
        if k_sources and k_sources[0].dim() == q.dim() == 4 and block_table.dim() == 2:
            _, page_size, num_kv_heads, _ = k_sources[0].shape
            capacity = block_table.shape[1] * page_size
            schedule = _ops.attention_schedule(seq_lens, capacity, *q.shape[1:3], num_kv_heads, window)
        else:
            schedule = seq_lens  # never used: the op raises the error that names what is wrong
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _ops.fused_attention(
        q,
        k_sources,
        v_sources,
        key_weights,
        value_weights,
        block_table,
        seq_lens,
        schedule,
        scale,
        window,
        early_cache,
        keep_sources,
    )
