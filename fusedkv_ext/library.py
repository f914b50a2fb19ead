"""The op library `torch.ops.fusedkv`: schemas, CPU and fake implementations, autograd.

The schemas live here and not in C++, so that they exist once, with and without the compiled extension;
`fusedkv_ext._C` adds the CUDA implementations, and torch compares their C++ signatures with the schemas.
"""

from __future__ import annotations

import torch

from fusedkv_ext import checks, reference

SCHEMAS = (
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " Tensor? k_scale=None, Tensor? v_scale=None, Tensor(c!)? k_copy=None, Tensor(d!)? v_copy=None) -> ()",
    "rope_write_kv(Tensor qkv, Tensor(a!)? q_out, Tensor(b!)? k_cache, Tensor(c!)? v_cache, Tensor positions,"
    " Tensor cos_sin, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, bool interleaved=False,"
    " Tensor? slot_mapping=None, Tensor? k_scale=None, Tensor? v_scale=None,"
    " Tensor(d!)? k_copy=None, Tensor(e!)? v_copy=None) -> ()",
    "rope_key_projection(Tensor x, Tensor weight, Tensor positions, Tensor cos_sin, Tensor? norm=None,"
    " float eps=1e-6, Tensor? bias=None, bool interleaved=False) -> Tensor",
    "rope_key_projection_write(Tensor x, Tensor weight, Tensor(a!)? q_out, Tensor(b!)? k_cache,"
    " Tensor(c!)? v_cache, Tensor positions, Tensor cos_sin, Tensor? slot_mapping=None, Tensor? q_norm=None,"
    " Tensor? k_norm=None, float eps=1e-6, Tensor? bias=None, bool interleaved=False,"
    " Tensor? k_scale=None, Tensor? v_scale=None, Tensor(d!)? k_copy=None, Tensor(e!)? v_copy=None,"
    " Tensor? input_norm=None, bool early_weight=False) -> ()",
    "rope_norm_backward(Tensor grad, Tensor? heads, Tensor positions, Tensor cos_sin, Tensor? norm=None,"
    " float eps=1e-6, bool interleaved=False) -> (Tensor, Tensor)",
    "fuse_kv(Tensor[] k_sources, Tensor[] v_sources, Tensor key_weights, Tensor value_weights)"
    " -> (Tensor, Tensor)",
    "fuse_kv_backward(Tensor grad_k, Tensor grad_v, Tensor[] k_sources, Tensor[] v_sources,"
    " Tensor key_weights, Tensor value_weights) -> (Tensor[], Tensor[], Tensor, Tensor)",
    "swiglu(Tensor gate_up) -> Tensor",
    "linear_add(Tensor(a!) out, Tensor x, Tensor weight, bool early_weight=False) -> ()",
    "swiglu_linear(Tensor x, Tensor weight, Tensor? input_norm=None, float eps=1e-6,"
    " bool early_weight=False) -> Tensor",
    "decode_places(Tensor seq_lens, Tensor block_table, Tensor rows, Tensor? active, int page_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "largest_token(Tensor logits) -> Tensor",
    "accept_tokens(Tensor chosen, Tensor stop_tokens, Tensor(a!) active, Tensor(b!) tokens,"
    " Tensor(c!) emitted, Tensor(d!) count, Tensor(e!)? seq_lens=None, Tensor? rows=None,"
    " Tensor? lengths=None) -> ()",
    "attention_schedule(Tensor seq_lens, int max_seq_len, int num_query_tokens, int num_query_heads,"
    " int num_kv_heads, int window=0) -> Tensor",
    "fused_attention(Tensor q, Tensor[] k_sources, Tensor[] v_sources, Tensor? key_weights,"
    " Tensor? value_weights, Tensor block_table, Tensor seq_lens, Tensor schedule, float scale,"
    " int window=0, bool early_cache=False, bool keep_sources=False) -> Tensor",
)

_library = torch.library.Library("fusedkv", "DEF")


def _fake_rope_key_projection(
    x, weight, positions, cos_sin, norm=None, eps=1e-6, bias=None, interleaved=False
):
    heads, d = checks.rope_key_projection(x, weight, positions, cos_sin, norm, eps, bias, interleaved)
    return x.new_empty(x.shape[0], heads, d)


def _fake_rope_norm_backward(grad, heads, positions, cos_sin, norm=None, eps=1e-6, interleaved=False):
    checks.rope_norm_backward(grad, heads, positions, cos_sin, norm, eps, interleaved)
    return grad.new_empty(grad.shape), cos_sin.new_empty(0 if norm is None else norm.shape[0])


def _fake_fuse_kv(k_sources, v_sources, key_weights, value_weights):
    checks.fuse_kv(k_sources, v_sources, key_weights, value_weights)
    return k_sources[0].new_empty(k_sources[0].shape), v_sources[0].new_empty(v_sources[0].shape)


def _fake_fuse_kv_backward(grad_k, grad_v, k_sources, v_sources, key_weights, value_weights):
    checks.fuse_kv_backward(grad_k, grad_v, k_sources, v_sources, key_weights, value_weights)
    return (
        [s.new_empty(s.shape) for s in k_sources],
        [s.new_empty(s.shape) for s in v_sources],
        key_weights.new_empty(key_weights.shape),
        value_weights.new_empty(value_weights.shape),
    )


def _fake_swiglu(gate_up):
    checks.swiglu(gate_up)
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _fake_swiglu_linear(x, weight, input_norm=None, eps=1e-6, early_weight=False):
    checks.swiglu_linear(x, weight, input_norm, eps)
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def _fake_decode_places(seq_lens, block_table, rows, active, page_size):
    checks.decode_places(seq_lens, block_table, rows, active, page_size)
    (batch,) = rows.shape
    table = block_table.new_empty(batch, block_table.shape[1])
    positions, lens, lengths = (seq_lens.new_empty(batch) for _ in range(3))
    return positions, rows.new_empty(batch), table, lens, lengths


def _fake_largest_token(logits):
    checks.largest_token(logits)
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _fake_attention_schedule(
    seq_lens, max_seq_len, num_query_tokens, num_query_heads, num_kv_heads, window=0
):
    checks.attention_schedule(seq_lens, max_seq_len, num_query_tokens, num_query_heads, num_kv_heads, window)
    batch = seq_lens.shape[0]
    device = seq_lens.device
    entries = checks.schedule_entries(batch, num_query_tokens, num_query_heads, num_kv_heads, device)
    return seq_lens.new_empty(entries)


def _fake_fused_attention(q, *args):
    checks.fused_attention(q, *args)
    return q.new_empty(q.shape)


_FAKES = {
    "rope_key_projection": _fake_rope_key_projection,
    "rope_norm_backward": _fake_rope_norm_backward,
    "fuse_kv": _fake_fuse_kv,
    "fuse_kv_backward": _fake_fuse_kv_backward,
    "swiglu": _fake_swiglu,
    "swiglu_linear": _fake_swiglu_linear,
    "decode_places": _fake_decode_places,
    "largest_token": _fake_largest_token,
    "attention_schedule": _fake_attention_schedule,
    "fused_attention": _fake_fused_attention,
}


def _checked(name: str):
    check, compute = getattr(checks, name), getattr(reference, name)

    @torch.no_grad()  # as on CUDA: what is differentiable is registered below, and nothing else
    def run(*args, **kwargs):
        check(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):  # which would change the dtype of products
            return compute(*args, **kwargs)

    return run


def _fuse_kv_setup(ctx, inputs, output) -> None:
    k_sources, v_sources, key_weights, value_weights = inputs
    ctx.num_k = len(k_sources)
    ctx.save_for_backward(*k_sources, *v_sources, key_weights, value_weights)


def _fuse_kv_grad(ctx, grad_k, grad_v):
    *sources, key_weights, value_weights = ctx.saved_tensors
    k_sources, v_sources = sources[: ctx.num_k], sources[ctx.num_k :]
    # autograd may pass an expanded gradient, whose last stride is 0
    grad_k, grad_v = grad_k.contiguous(), grad_v.contiguous()
    return torch.ops.fusedkv.fuse_kv_backward(
        grad_k, grad_v, k_sources, v_sources, key_weights, value_weights
    )


def _projection_setup(ctx, inputs, output) -> None:
    x, weight, positions, cos_sin, norm, ctx.eps, bias, ctx.interleaved = inputs
    ctx.save_for_backward(x, weight, positions, cos_sin, norm, bias)


def _projection_grad(ctx, grad):
    """Recompute the heads, differentiate rotation and norm in one pass, and multiply by the library."""
    x, weight, positions, cos_sin, norm, bias = ctx.saved_tensors
    heads = None
    if norm is not None:
        heads = torch.nn.functional.linear(x, weight, bias).unflatten(-1, grad.shape[1:])
    # autograd may pass an expanded gradient, whose last stride is 0
    grad, grad_norm = torch.ops.fusedkv.rope_norm_backward(
        grad.contiguous(), heads, positions, cos_sin, norm, ctx.eps, ctx.interleaved
    )
    grad_norm = None if norm is None else grad_norm.to(norm.dtype)
    grad = grad.flatten(1)
    grad_bias = None if bias is None else grad.sum(0)  # torch adds up in float32
    return grad @ weight, grad.t() @ x, None, None, grad_norm, None, grad_bias, None


def _swiglu_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_grad(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    return reference.swiglu_backward(grad, gate_up)


for _schema in SCHEMAS:
    _library.define(_schema)
    _op = _schema.partition("(")[0]
    _library.impl(_op, _checked(_op), "CPU")
    torch.library.register_fake(f"fusedkv::{_op}", _FAKES.get(_op, getattr(checks, _op)), lib=_library)

torch.library.register_autograd("fusedkv::fuse_kv", _fuse_kv_grad, setup_context=_fuse_kv_setup, lib=_library)
torch.library.register_autograd("fusedkv::swiglu", _swiglu_grad, setup_context=_swiglu_setup, lib=_library)
torch.library.register_autograd(
    "fusedkv::rope_key_projection", _projection_grad, setup_context=_projection_setup, lib=_library
)
