"""Models whose source layers' keys and values pass through e4m3, written without cache and ops: an oracle."""

import math

import torch
from torch import Tensor

from fusedkv_ext import FusedKVForCausalLM, StorageAttention
from fusedkv_ext.attention import causal_attention

MODES = ("copy", "only")


def scales(layer, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of a storage layer's keys and values, number by number in Python's float64."""
    attention = layer.attention
    d, hidden = attention.head_dim, attention.qkv_proj.in_features
    gain = layer.attention_norm.weight.tolist()
    rows = attention.qkv_proj.weight.unflatten(0, (-1, d))[attention.num_heads :].tolist()
    magnitude = math.hypot(cos_sin[0, 0].item(), cos_sin[0, d // 2].item())

    def projected(row):
        return math.sqrt(hidden) * math.sqrt(sum((w * g) ** 2 for w, g in zip(row, gain, strict=True)))

    k_scale, v_scale = torch.empty(2, attention.num_kv_heads, d, dtype=torch.float64)
    for head in range(attention.num_kv_heads):
        keys = [projected(row) for row in rows[head]]
        if attention.k_norm is not None:
            keys = [math.sqrt(d) * w for w in attention.k_norm.weight.tolist()]
        for j in range(d):
            pair = j ^ 1 if attention.interleaved else (j + d // 2) % d
            k_scale[head, j] = magnitude * math.hypot(keys[j], keys[pair]) / 448
            v_scale[head, j] = projected(rows[attention.num_kv_heads + head][j]) / 448
    return k_scale.float(), v_scale.float()


def round_trip(x: Tensor, scale: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    stored = (wide / scale).to(torch.float8_e4m3fn)
    return (stored.to(wide.dtype) * scale).to(x.dtype)


@torch.no_grad()
def run_layers(layers, x: Tensor, cos_sin: Tensor, source_layers, mode: str) -> Tensor:
    """DecoderLayers over x [B, S, hidden] with the keys and values of the source layers rounded."""
    shared = {}
    for i, layer in enumerate(layers):
        attention, h = layer.attention, layer.attention_norm(x)
        if isinstance(attention, StorageAttention):
            heads = attention.qkv_proj(h).unflatten(-1, (-1, attention.head_dim))
            q, k, v = heads.split((attention.num_heads, *[attention.num_kv_heads] * 2), 2)
            q = attention._rotate(q, attention.q_norm, cos_sin)
            own = shared[i] = attention._rotate(k, attention.k_norm, cos_sin), v
            if i in source_layers:
                shared[i] = tuple(map(round_trip, own, (s.to(x.device) for s in scales(layer, cos_sin))))
                own = shared[i] if mode == "only" else own
            out = attention.o_proj(causal_attention(q, *own, attention.window).flatten(2))
        else:
            out, _ = attention(h, cos_sin, shared)
        x = x + out
        x = x + layer.mlp(layer.mlp_norm(x))
    return x


@torch.no_grad()
def forward(model: FusedKVForCausalLM, ids: Tensor, mode: str) -> Tensor:
    """Logits [B, S, vocab] of ids [B, S]; mode "none" rounds nothing."""
    if mode == "none":
        return model(ids)
    plan, inner = model.config.plan, model.model
    x = run_layers(inner.layers, inner.embed_tokens(ids), inner.rotary(), plan.source_layers, mode)
    return model.logits(inner.norm(x))
