"""Attention of whole sequences and of prompts, by torch's attention: see `ops.fused_attention` for decoding.

Dimensions: B sequences, Q query tokens, S tokens, T and U packed tokens, Hq query heads, Hkv key/value heads,
D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as backends
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fusedkv_ext import ops
from fusedkv_ext.checks import HALF

KeysValues = tuple[Tensor, Tensor]
CUDNN_ATTENTION = torch.ops.aten._scaled_dot_product_cudnn_attention  # also gives what joins two calls
CUDNN_LENGTH = 1024  # whose multiples it gets, because it plans for 45 ms (H200) before each new shape
QUERY_BLOCK = 512  # query tokens that one explicit mask covers, to bound its memory


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Softmax attention of the last Q of S tokens: query j stands at position S - Q + j.

        out = softmax(q k^T / sqrt(D)) v over the positions up to its own, the last `window` of them if > 0

    Args:
        q: [B, Q, Hq, D].
        k, v: [B, S, Hkv, D], Hkv a divisor of Hq.

    Returns:
        [B, Q, Hq, D].
    """
    num_queries, length = q.shape[1], k.shape[1]
    unlimited = window == 0 or window >= length
    # Compiled, it stays one traceable call, without guards on lengths.
    eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if eager and unlimited and takes_cudnn(q) and num_queries % CUDNN_LENGTH == length % CUDNN_LENGTH == 0:
        return _cudnn_attention(q, k, v)
    if num_queries == length and unlimited:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with _cudnn_first(q):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)
    window = window or length
    blocks = []
    for first in range(length - num_queries, length, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, length)
        start = max(0, first - window + 1)
        query_pos = torch.arange(first, end, device=q.device)[:, None]
        key_pos = torch.arange(start, end, device=q.device)
        visible = (key_pos <= query_pos) & (key_pos > query_pos - window)
        rows = q[:, first - length + num_queries : end - length + num_queries]
        blocks.append(masked_attention(rows, k[:, start:end], v[:, start:end], visible))
    return torch.cat(blocks, 1)


def _cudnn_first(q: Tensor) -> AbstractContextManager:
    """Lets cuDNN, where it is enabled, have the attention of q before the other enabled backends.

    It is the fastest on Hopper, and torch's own order has not always put it first. Here and not around a
    model, because activation checkpointing repeats attention in the backward pass and must meet the same
    backend.
    """
    order = _backend_order() if q.is_cuda else []
    return sdpa_kernel(order, set_priority=True) if order else nullcontext()


@functools.cache  # every layer asks
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def takes_cudnn(q: Tensor) -> bool:
    """Whether inference prefers cuDNN for attention: on Hopper and later, where no other is as fast.

    It gets multiples of CUDNN_LENGTH, of queries and of the keys before them.
    """
    if not q.is_cuda or q.dtype not in HALF or q.shape[-1] % 8 != 0 or q.shape[-1] > 128:
        return False
    return backends.cudnn_sdp_enabled() and capability(q.device) >= (9, 0)


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`causal_attention` without a window by cuDNN, whose causal mask is of as many queries as keys.

    The last Q of more tokens attend to those before them and among themselves, in two calls that the
    logarithms l of their sums of exponentials join:

        out = (exp(l_1) out_1 + exp(l_2) out_2) / (exp(l_1) + exp(l_2))
    """
    earlier = k.shape[1] - q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    own = CUDNN_ATTENTION(q, k[:, :, earlier:], v[:, :, earlier:], None, earlier > 0, 0.0, True)
    if earlier == 0:
        return own[0].transpose(1, 2)
    before = CUDNN_ATTENTION(q, k[:, :, :earlier], v[:, :, :earlier], None, True, 0.0, False)
    share = torch.sigmoid(own[1] - before[1]).view(*q.shape[:3], 1).to(q.dtype)
    return torch.lerp(before[0], own[0], share).transpose(1, 2)


@torch.compiler.assume_constant_result
def _backend_order() -> list[SDPBackend]:
    """cuDNN and the other enabled backends; none where cuDNN is disabled."""
    enabled = {
        SDPBackend.CUDNN_ATTENTION: backends.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: backends.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: backends.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: backends.math_sdp_enabled(),
    }
    return [backend for backend in enabled if enabled[backend]] if backends.cudnn_sdp_enabled() else []


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int = 0,
) -> Tensor:
    """`causal_attention` of packed sequences of any shapes in one call of flash attention; CUDA only.

    Args:
        q: [T, Hq, D], float16 or bfloat16; k, v: [U, Hkv, D].
        ends: int32 [B + 1] for queries and for keys, 0 and where each sequence ends.
        longest: the most queries, and keys, of a sequence.
        window: as in causal_attention.

    Returns:
        [T, Hq, D].
    """
    # Its window counts the tokens to the left. Releases before 2.12 share the heads of keys unasked.
    options = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}
    return varlen_attn(q, k, v, *ends, *longest, window_size=(window - 1, 0), **options)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention of q [B, Q, Hq, D] to k, v [B, S, Hkv, D] under a bool mask, [Q, S] or [B, 1, Q, S]."""
    num_queries, groups = q.shape[1], q.shape[2] // k.shape[2]
    # The query heads of a group become rows of one head, so that no key or value is repeated.
    rows = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    visible = torch.cat((visible,) * groups, -2)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible)
    return out.unflatten(2, (groups, num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def mix_sources(
    keys: Sequence[Tensor], values: Sequence[Tensor], key_weights: Tensor | None, value_weights: Tensor | None
) -> KeysValues:
    """K_i and V_i from their sources; weights None stands for the one source as it is."""
    if key_weights is None and value_weights is None:
        return keys[0], values[0]

    def ones(like: Tensor) -> Tensor:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.ones(1, *like.shape[-2:], dtype=wide, device=like.device)

    key_weights = ones(keys[0]) if key_weights is None else key_weights
    value_weights = ones(values[0]) if value_weights is None else value_weights
    return ops.fuse_kv(keys, values, key_weights, value_weights)


def mixed_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
) -> Tensor:
    return causal_attention(q, *mix_sources(keys, values, key_weights, value_weights))


ATTENTION_OPS = [  # what scaled_dot_product_attention becomes
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in (
        "cudnn_attention",
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "fused_attention_overrideable",
    )
]


def recomputing_attention(*arguments: Any) -> Tensor:
    """mixed_attention whose backward pass forms k and v again, while the outputs of attention are kept."""
    return checkpoint(
        mixed_attention,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn
        context_fn=partial(create_selective_checkpoint_contexts, ATTENTION_OPS),
    )
