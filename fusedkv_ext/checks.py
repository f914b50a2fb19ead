"""Argument checks shared by the CPU and the fake (meta) implementations of the ops.

The CUDA implementations repeat them in csrc/ops/checks.h, in front of the kernels. Every message has the
form `op: argument: expected ..., got ...`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
INDEX = (torch.int32, torch.int64)
BLOCK_TOKENS = 64  # tokens of one work unit of fused_attention
MOST_ITEM_COST = 2  # blocks that a sequence counts for besides its own in the split of the work
BLOCK_ROWS = 64  # query rows (heads of a group x query tokens) that one work unit serves
MAX_WORKERS = 192  # CTAs of fused_attention
DONE = -1  # what a finished sequence emits


def head_rows(num_query_tokens: int, num_query_heads: int, num_kv_heads: int) -> int:
    """Times that fused_attention reads a token: once a key/value head and block of query rows."""
    rows = num_query_heads // num_kv_heads * num_query_tokens
    return num_kv_heads * -(-rows // BLOCK_ROWS)


def schedule_entries(
    batch: int, num_query_tokens: int, num_query_heads: int, num_kv_heads: int, device: torch.device
) -> int:
    """Length of an attention schedule: B + 1 cumulative counts and, on CUDA, what params.h adds to them."""
    if device.type != "cuda":
        return batch + 1
    rows = num_query_heads // num_kv_heads * num_query_tokens
    places, partials = 3 * 8, 2 * min(-(-rows // 8) * 8, BLOCK_ROWS) * 132  # of a worker
    return (batch + 4) // 4 * 4 + MAX_WORKERS * (places + partials)


def expect(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ValueError `op: argument: expected ..., got ...` unless condition holds."""
    if not condition:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def integer(value: object, op: str, argument: str, low: int, high: int | None = None) -> int:
    """Return value as an int, or raise ValueError unless it is an integer (numpy's too) from low to high."""
    number = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    fits = number is not None and number >= low and (high is None or number <= high)
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    expect(fits, op, argument, wanted, repr(value))
    return number


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Checker:
    """Checks of one call of one op; the device is that of its first tensor."""

    def __init__(self, op: str, device: torch.device):
        self.op, self.device = op, device

    def expect(self, condition: bool, argument: str, expected: str, got: object) -> None:
        expect(condition, self.op, argument, expected, got)

    def tensor(
        self, name: str, x: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]
    ) -> None:
        """Check device, dtype, shape (None matches any size) and the unit stride of the last dimension."""
        self.expect(x.device == self.device, name, f"device {self.device}", x.device)
        if x.dtype not in dtypes:  # texts are put together for a failing check only: this runs on every call
            self.expect(False, name, "dtype " + " or ".join(map(_name, dtypes)), _name(x.dtype))
        if x.dim() != len(shape) or any(
            w is not None and g != w for g, w in zip(x.shape, shape, strict=True)
        ):
            wanted = "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"
            self.expect(False, name, f"shape {wanted}", f"{list(x.shape)}")
        if x.dim() > 0 and x.numel() > 0 and x.shape[-1] != 1 and x.stride(-1) != 1:
            self.expect(False, name, "stride 1 in the last dimension", x.stride(-1))

    def head_dim(self, d: int) -> None:
        self.expect(d > 0 and d % 2 == 0, "head_dim", "a positive even number", d)

    def contiguous(self, name: str, x: Tensor) -> None:
        self.expect(x.is_contiguous(), name, "a contiguous tensor", f"strides {x.stride()}")

    def window(self, window: int) -> None:
        self.expect(0 <= window < 2**31, "window", "0 (none) to 2^31 - 1", window)

    def cache(self, name: str, cache: Tensor, heads: int, d: int, like: Tensor, other: Tensor) -> None:
        self.expect(other.dim() == 4, name, "4 dimensions", other.dim())
        dtypes = (like.dtype,) if like.dtype == torch.float8_e4m3fn else (like.dtype, torch.float8_e4m3fn)
        self.tensor(name, cache, dtypes, (other.shape[0], other.shape[1], heads, d))
        self.expect(cache.dtype == other.dtype, name, f"dtype {_name(other.dtype)}", _name(cache.dtype))

    def copies(self, k_cache: Tensor, k_copy: Tensor | None, v_copy: Tensor | None) -> None:
        """Check e4m3 copies: both or none, of the caches' shape, beside caches that are not e4m3."""
        given = [x is not None for x in (k_copy, v_copy)]
        self.expect(all(given) or not any(given), "k_copy, v_copy", "both or none of them", given)
        if k_copy is None:
            return
        e4m3 = torch.float8_e4m3fn
        self.expect(k_cache.dtype != e4m3, "k_cache", "the dtype of the input beside copies", _name(e4m3))
        self.tensor("k_copy", k_copy, (e4m3,), tuple(k_cache.shape))
        self.tensor("v_copy", v_copy, (e4m3,), tuple(k_cache.shape))

    def scale(self, name: str, scale: Tensor | None, heads: int, d: int) -> None:
        if scale is not None:
            self.tensor(name, scale, (torch.float32,), (heads, d))
            self.contiguous(name, scale)

    def rope(
        self,
        tokens: int,
        positions: Tensor,
        cos_sin: Tensor,
        norms: dict[str, Tensor | None],
        dtype: torch.dtype,
    ) -> int:
        """Check positions, the cos/sin table and the norm weights; return the head dim."""
        self.tensor("positions", positions, INDEX, (tokens,))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.tensor("cos_sin", cos_sin, (wide,), (None, None))
        self.contiguous("cos_sin", cos_sin)
        d = cos_sin.shape[1]
        self.head_dim(d)
        self.expect(cos_sin.shape[0] > 0, "cos_sin", "at least one position", cos_sin.shape[0])
        for name, norm in norms.items():
            if norm is not None:
                self.tensor(name, norm, (dtype,), (d,))
        return d


def write_kv(
    k, v, k_cache, v_cache, slot_mapping, k_scale=None, v_scale=None, k_copy=None, v_copy=None
) -> None:
    c = Checker("write_kv", k.device)
    c.tensor("k", k, FLOATS, (None, None, None))
    tokens, heads, d = k.shape
    c.tensor("v", v, (k.dtype,), (tokens, heads, d))
    c.cache("k_cache", k_cache, heads, d, k, k_cache)
    c.cache("v_cache", v_cache, heads, d, k, k_cache)
    c.tensor("slot_mapping", slot_mapping, (torch.int64,), (tokens,))
    c.scale("k_scale", k_scale, heads, d)
    c.scale("v_scale", v_scale, heads, d)
    c.copies(k_cache, k_copy, v_copy)


def _write_side(
    c: Checker,
    num_heads,
    d,
    dtype_like,
    tokens,
    q_out,
    k_cache,
    v_cache,
    slot_mapping,
    k_scale,
    v_scale,
    k_copy,
    v_copy,
) -> None:
    num_q = 0
    if q_out is not None:
        c.tensor("q_out", q_out, (dtype_like.dtype,), (tokens, None, d))
        c.contiguous("q_out", q_out)
        num_q = q_out.shape[1]
    num_kv = 0
    given = [x is not None for x in (k_cache, v_cache, slot_mapping)]
    c.expect(all(given) or not any(given), "k_cache, v_cache, slot_mapping", "all or none of them", given)
    if k_cache is not None:
        c.expect(k_cache.dim() == 4, "k_cache", "4 dimensions", k_cache.dim())
        num_kv = k_cache.shape[2]
        c.cache("k_cache", k_cache, num_kv, d, dtype_like, k_cache)
        c.cache("v_cache", v_cache, num_kv, d, dtype_like, k_cache)
        c.tensor("slot_mapping", slot_mapping, (torch.int64,), (tokens,))
        c.scale("k_scale", k_scale, num_kv, d)
        c.scale("v_scale", v_scale, num_kv, d)
        c.copies(k_cache, k_copy, v_copy)
    else:
        c.expect(k_copy is None and v_copy is None, "k_copy, v_copy", "none without caches", "a copy")
    heads = f"{num_q} (q_out) + 2 * {num_kv} (k_cache, v_cache) heads of {d} channels"
    c.expect(
        num_heads == num_q + 2 * num_kv,
        "qkv" if c.op == "rope_write_kv" else "weight",
        heads,
        f"{num_heads} heads",
    )


def rope_write_kv(
    qkv,
    q_out,
    k_cache,
    v_cache,
    positions,
    cos_sin,
    q_norm=None,
    k_norm=None,
    eps=1e-6,
    interleaved=False,
    slot_mapping=None,
    k_scale=None,
    v_scale=None,
    k_copy=None,
    v_copy=None,
) -> None:
    c = Checker("rope_write_kv", qkv.device)
    c.tensor("qkv", qkv, FLOATS, (None, None, None))
    tokens, num_heads, width = qkv.shape
    d = c.rope(tokens, positions, cos_sin, {"q_norm": q_norm, "k_norm": k_norm}, qkv.dtype)
    c.expect(width == d, "qkv", f"shape [*, *, {d}]", list(qkv.shape))
    c.expect(qkv.numel() == 0 or qkv.stride(1) == d, "qkv", "heads packed without gaps", qkv.stride())
    caches = (k_cache, v_cache, slot_mapping, k_scale, v_scale, k_copy, v_copy)
    _write_side(c, num_heads, d, qkv, tokens, q_out, *caches)


def _projection(c: Checker, x, weight, positions, cos_sin, norms, bias) -> tuple[int, int]:
    c.tensor("x", x, FLOATS, (None, None))
    tokens, hidden = x.shape
    d = c.rope(tokens, positions, cos_sin, norms, x.dtype)
    c.expect(hidden > 0 and hidden % 8 == 0, "x", "a hidden size that is a multiple of 8", hidden)
    c.tensor("weight", weight, (x.dtype,), (None, hidden))
    c.contiguous("weight", weight)
    rows = weight.shape[0]
    c.expect(rows > 0 and rows % d == 0, "weight", f"rows that are a multiple of the head dim {d}", rows)
    if bias is not None:
        c.tensor("bias", bias, (x.dtype,), (rows,))
    return rows // d, d


def rope_key_projection(
    x, weight, positions, cos_sin, norm=None, eps=1e-6, bias=None, interleaved=False
) -> tuple[int, int]:
    """Return (heads, head_dim)."""
    c = Checker("rope_key_projection", x.device)
    return _projection(c, x, weight, positions, cos_sin, {"norm": norm}, bias)


def rope_key_projection_write(
    x,
    weight,
    q_out,
    k_cache,
    v_cache,
    positions,
    cos_sin,
    slot_mapping=None,
    q_norm=None,
    k_norm=None,
    eps=1e-6,
    bias=None,
    interleaved=False,
    k_scale=None,
    v_scale=None,
    k_copy=None,
    v_copy=None,
    input_norm=None,
    early_weight=False,
) -> None:
    c = Checker("rope_key_projection_write", x.device)
    norms = {"q_norm": q_norm, "k_norm": k_norm}
    heads, d = _projection(c, x, weight, positions, cos_sin, norms, bias)
    if input_norm is not None:
        c.tensor("input_norm", input_norm, (x.dtype,), (x.shape[1],))
    caches = (k_cache, v_cache, slot_mapping, k_scale, v_scale, k_copy, v_copy)
    _write_side(c, heads, d, x, x.shape[0], q_out, *caches)


def rope_norm_backward(grad, heads, positions, cos_sin, norm=None, eps=1e-6, interleaved=False) -> None:
    c = Checker("rope_norm_backward", grad.device)
    c.tensor("grad", grad, FLOATS, (None, None, None))
    d = c.rope(grad.shape[0], positions, cos_sin, {"norm": norm}, grad.dtype)
    c.expect(grad.shape[2] == d, "grad", f"shape [*, *, {d}]", list(grad.shape))
    given = [x is not None for x in (heads, norm)]
    c.expect(all(given) or not any(given), "heads, norm", "both or none of them", given)
    if heads is not None:
        c.tensor("heads", heads, (grad.dtype,), tuple(grad.shape))


def _fuse_side(c: Checker, name: str, sources, weights, like: Tensor) -> None:
    c.expect(1 <= len(sources) <= 8, f"{name}_sources", "1 to 8 tensors", len(sources))
    c.expect(like.dim() >= 2, f"{name}_sources[0]", "at least 2 dimensions", like.dim())
    heads, d = like.shape[-2:]
    for i, source in enumerate(sources):
        argument = f"{name}_sources[{i}]"
        c.tensor(argument, source, (like.dtype,), tuple(like.shape))
        packed = source.numel() == 0 or heads == 1 or source.stride(-2) == d
        c.expect(packed, argument, "heads packed without gaps", source.stride())
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    c.tensor("key_weights" if name == "k" else "value_weights", weights, (wide,), (len(sources), heads, d))


def fuse_kv(k_sources, v_sources, key_weights, value_weights, op="fuse_kv") -> None:
    expect(len(k_sources) > 0, op, "k_sources", "1 to 8 tensors", 0)
    c = Checker(op, k_sources[0].device)
    c.expect(k_sources[0].dtype in FLOATS, "k_sources[0]", "a floating dtype", k_sources[0].dtype)
    _fuse_side(c, "k", k_sources, key_weights, k_sources[0])
    _fuse_side(c, "v", v_sources, value_weights, k_sources[0])


def fuse_kv_backward(grad_k, grad_v, k_sources, v_sources, key_weights, value_weights) -> None:
    fuse_kv(k_sources, v_sources, key_weights, value_weights, op="fuse_kv_backward")
    c = Checker("fuse_kv_backward", k_sources[0].device)
    for name, grad in (("grad_k", grad_k), ("grad_v", grad_v)):
        c.tensor(name, grad, (k_sources[0].dtype,), tuple(k_sources[0].shape))


def swiglu(gate_up) -> None:
    c = Checker("swiglu", gate_up.device)
    c.expect(gate_up.dim() >= 1, "gate_up", "at least 1 dimension", gate_up.dim())
    c.tensor("gate_up", gate_up, FLOATS, (None,) * gate_up.dim())
    width = gate_up.shape[-1]
    c.expect(width > 0 and width % 2 == 0, "gate_up", "a last dimension of 2 * I, I at least 1", width)


def _matrices(c: Checker, x, weight) -> None:
    c.tensor("x", x, FLOATS, (None, None))
    c.expect(x.shape[1] > 0, "x", "a hidden size of 1 or more", 0)
    c.tensor("weight", weight, (x.dtype,), (None, x.shape[1]))
    c.expect(weight.shape[0] > 0, "weight", "1 row or more", 0)


def linear_add(out, x, weight, early_weight=False) -> None:
    c = Checker("linear_add", x.device)
    _matrices(c, x, weight)
    c.tensor("out", out, (x.dtype,), (x.shape[0], weight.shape[0]))


def swiglu_linear(x, weight, input_norm=None, eps=1e-6, early_weight=False) -> None:
    c = Checker("swiglu_linear", x.device)
    _matrices(c, x, weight)
    rows = weight.shape[0]
    c.expect(rows % 2 == 0, "weight", "2 * I rows", rows)
    if input_norm is not None:
        c.tensor("input_norm", input_norm, (x.dtype,), (x.shape[1],))


def decode_places(seq_lens, block_table, rows, active, page_size) -> None:
    c = Checker("decode_places", seq_lens.device)
    c.tensor("seq_lens", seq_lens, (torch.int32,), (None,))
    c.tensor("block_table", block_table, (torch.int32,), (seq_lens.shape[0], None))
    c.expect(block_table.numel() > 0, "block_table", "at least one row and one page", list(block_table.shape))
    c.tensor("rows", rows, (torch.int64,), (None,))
    if active is not None:
        c.tensor("active", active, (torch.bool,), (rows.shape[0],))
    c.expect(1 <= page_size < 2**31, "page_size", "1 to 2^31 - 1", page_size)


def largest_token(logits) -> None:
    c = Checker("largest_token", logits.device)
    c.tensor("logits", logits, FLOATS, (None, None))
    c.expect(1 <= logits.shape[1] <= 2**30, "logits", "1 to 2^30 tokens", logits.shape[1])


def accept_tokens(
    chosen, stop_tokens, active, tokens, emitted, count, seq_lens=None, rows=None, lengths=None
) -> None:
    c = Checker("accept_tokens", chosen.device)
    c.tensor("chosen", chosen, (torch.int64,), (None,))
    (batch,) = chosen.shape
    c.tensor("stop_tokens", stop_tokens, (torch.int64,), (None,))
    c.tensor("active", active, (torch.bool,), (batch,))
    c.tensor("tokens", tokens, (torch.int64,), (batch,))
    c.tensor("emitted", emitted, (torch.int64,), (None, batch))
    c.contiguous("emitted", emitted)
    c.tensor("count", count, (torch.int64,), (1,))
    given = sum(x is not None for x in (seq_lens, rows, lengths))
    c.expect(given in (0, 3), "seq_lens, rows, lengths", "all or none of them", f"{given} of 3")
    if seq_lens is not None:
        c.tensor("seq_lens", seq_lens, (torch.int32,), (None,))
        c.tensor("rows", rows, (torch.int64,), (batch,))
        c.tensor("lengths", lengths, (torch.int32,), (batch,))


def attention_schedule(
    seq_lens, max_seq_len, num_query_tokens, num_query_heads, num_kv_heads, window=0
) -> None:
    c = Checker("attention_schedule", seq_lens.device)
    c.tensor("seq_lens", seq_lens, (torch.int32,), (None,))
    c.expect(0 <= max_seq_len < 2**31, "max_seq_len", "0 to 2^31 - 1", max_seq_len)
    c.expect(1 <= num_query_tokens <= 16, "num_query_tokens", "1 to 16", num_query_tokens)
    divides = num_kv_heads > 0 and num_query_heads > 0 and num_query_heads % num_kv_heads == 0
    c.expect(divides, "num_query_heads", f"a multiple of num_kv_heads {num_kv_heads}", num_query_heads)
    c.window(window)
    reads = head_rows(num_query_tokens, num_query_heads, num_kv_heads)
    fits = seq_lens.shape[0] * (max_seq_len // BLOCK_TOKENS + 1 + MOST_ITEM_COST) * reads < 2**31
    blocks = f"fewer than 2^31 blocks of 64 tokens in the batch, and {MOST_ITEM_COST} more a sequence,"
    blocks += f" each counted {reads} times"
    c.expect(fits, "max_seq_len", blocks, f"{seq_lens.shape[0]} sequences of {max_seq_len} tokens")


def fused_attention(
    q,
    k_sources,
    v_sources,
    key_weights,
    value_weights,
    block_table,
    seq_lens,
    schedule,
    scale,
    window=0,
    early_cache=False,
    keep_sources=False,
) -> None:
    c = Checker("fused_attention", q.device)
    c.tensor("q", q, FLOATS, (None, None, None, None))
    batch, num_tokens, num_q_heads, d = q.shape
    c.head_dim(d)
    c.expect(1 <= num_tokens <= 16, "q", "1 to 16 query tokens a sequence", num_tokens)
    for name, sources, weights in (("k", k_sources, key_weights), ("v", v_sources, value_weights)):
        c.expect(1 <= len(sources) <= 2, f"{name}_sources", "1 or 2 tensors", len(sources))
        first = k_sources[0]
        c.expect(first.dim() == 4, "k_sources[0]", "4 dimensions", first.dim())
        heads = first.shape[2]
        for i, source in enumerate(sources):
            c.cache(f"{name}_sources[{i}]", source, heads, d, q, first)
            same = source.stride() == sources[0].stride()
            c.expect(same, f"{name}_sources[{i}]", f"strides {sources[0].stride()}", source.stride())
        if weights is not None:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            argument = "key_weights" if name == "k" else "value_weights"
            c.tensor(argument, weights, (wide,), (len(sources), heads, d))
            c.contiguous(argument, weights)
    divides = heads > 0 and num_q_heads > 0 and num_q_heads % heads == 0
    c.expect(divides, "q", f"query heads that are a multiple of {heads} key/value heads", num_q_heads)
    c.tensor("block_table", block_table, (torch.int32,), (batch, None))
    c.tensor("seq_lens", seq_lens, (torch.int32,), (batch,))
    entries = schedule_entries(batch, num_tokens, num_q_heads, heads, q.device)
    c.tensor("schedule", schedule, (torch.int32,), (entries,))
    c.window(window)
