"""How prefill and training read the sources: views, ragged batches, fused keys and values formed again."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from oracle import assert_close_2x
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedkv_ext import attention
from fusedkv_ext import cache as cache_module
from fusedkv_ext.attention import causal_attention
from fusedkv_ext.cache import PrefillChunk

PLANS = ("vanilla", "cla", "fusedkv", "fusedkv_lite", "dense_fusion")
LENGTHS = ((7,), (7, 7, 7), (5, 11, 5, 2))


def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, calls):
    """What torch's varlen_attn documents, in plain torch."""
    calls.append((cu_seq_q.tolist(), cu_seq_k.tolist()))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(q), len(k)) and k.shape == v.shape
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        part = q[cu_seq_q[i] : cu_seq_q[i + 1]]
        keys, values = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
        distance = torch.arange(len(keys)) - torch.arange(len(keys) - len(part), len(keys))[:, None]
        visible = distance <= 0
        if window_size[0] >= 0:
            visible &= distance >= -window_size[0]
        scores = torch.einsum("qhd,khd->hqk", part, keys) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """Every attention of a chunk goes as it would on CUDA; the list has the ends of each ragged call."""
    calls = []

    def fake(*args, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return varlen(*args, window_size=window_size, calls=calls)

    monkeypatch.setattr(attention, "varlen_attn", fake)
    fake.__kwdefaults__ = {"window_size": (-1, -1), "enable_gqa": False}
    monkeypatch.setattr(PrefillChunk, "segments", lambda self, window, q: self._plan(window, True, False))
    monkeypatch.setattr(cache_module, "OWN_CALL", 8)
    return calls


def prefilled(model, prompts, chunk=8192, all_logits=False):
    cache = model.new_cache(24, page_size=4, max_batch=len(prompts))
    tiny.poison(cache)
    rows = cache.add([len(prompt) + 3 for prompt in prompts])
    logits = model.prefill(cache, rows, prompts, chunk, all_logits=all_logits)
    return torch.cat(list(logits)) if all_logits else logits


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("all_logits", [False, True])
def test_ragged_attention_gives_what_a_call_for_each_shape_gives(request, plan, lengths, window, all_logits):
    model, prompts = tiny.model(plan, sliding_window=window), tiny.prompts(*lengths)
    expected = {chunk: prefilled(model, prompts, chunk, all_logits) for chunk in (8192, 6)}
    torch.testing.assert_close(expected[6], expected[8192])
    calls = request.getfixturevalue("flash")
    for chunk, wanted in expected.items():
        torch.testing.assert_close(prefilled(model, prompts, chunk, all_logits), wanted)
    alike = len(set(lengths)) == 1
    assert calls or alike, "nothing went through flash attention"


def test_few_calls_for_many_lengths(flash):
    """Short prompts share a call, a long one has its own, and so have prompts that are all alike."""
    model = tiny.model("fusedkv")
    prefilled(model, tiny.prompts(5, 2, 11, 5, 3))
    assert flash == [([0, 2, 5, 10, 15], [0, 2, 5, 10, 15])] * 2  # storage layers below the last
    flash.clear()
    prefilled(model, tiny.prompts(5, 5, 5))
    assert flash == []
    prefilled(model, tiny.prompts(6), chunk=4)
    assert flash == [([0, 2], [0, 6])] * 2


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("plan", PLANS)
def test_ragged_prefill_on_a_gpu_gives_the_tokens_logits_alone(plan, window):
    model, prompts = tiny.model(plan, device="cuda", sliding_window=window), tiny.prompts(30, 100, 64, 30, 1)
    together = prefilled_on_cuda(model, prompts, 8192)
    alone = torch.cat([prefilled_on_cuda(model, [prompt], 8192) for prompt in prompts])
    for other in (alone, prefilled_on_cuda(model, prompts, 48)):
        assert (together - other).abs().max() <= 0.05 * together.abs().max()


def prefilled_on_cuda(model, prompts, chunk):
    cache = model.new_cache(40, page_size=16, max_batch=len(prompts))
    tiny.poison(cache)
    return model.prefill(cache, cache.add([len(prompt) + 3 for prompt in prompts]), prompts, chunk).float()


# ------------------------------------------------------------------------------------- reading from the pages


def read(cache, rows, counts, pool):
    step = cache.prefill_chunk(rows, counts)
    return step, step._read(pool)


def test_sequences_that_are_alike_are_read_without_a_copy():
    cache = tiny.model("fusedkv").new_cache(20, page_size=4, max_batch=4)
    pool = cache.keys[0].copy_(torch.randn_like(cache.keys[0]))
    rows = cache.add([9, 9, 9])
    step, view = read(cache, rows, [6, 6, 6], pool)
    assert view.shape == (3, 6, 2, 16) and view.untyped_storage().data_ptr() == pool.data_ptr()
    assert torch.equal(view.flatten(0, 1), pool.flatten(0, 1)[torch.cat(step.slots)])
    cache.advance(rows, [6, 6, 6])
    _, view = read(cache, rows[1:2], [2], pool)
    assert torch.equal(view, pool.flatten(0, 1)[12:20][None])


def test_other_sequences_are_gathered_in_one_copy():
    cache = tiny.model("fusedkv").new_cache(20, page_size=4, max_batch=4)
    pool = cache.keys[0].copy_(torch.randn_like(cache.keys[0]))
    first, second, third = cache.add([8, 4, 8])
    ragged = read(cache, [first, second], [6, 3], pool)
    backwards = read(cache, [third, first], [6, 6], pool)
    cache.free([first])
    (scattered,) = cache.add([20])  # the pages that were free, and others
    scattered = read(cache, [scattered], [20], pool)
    for step, packed in (ragged, backwards, scattered):
        assert packed.dim() == 3 and torch.equal(packed, pool.flatten(0, 1)[torch.cat(step.slots)])
        assert packed.untyped_storage().data_ptr() != pool.data_ptr()


def test_keys_and_values_are_fused_once_a_layer_and_chunk(monkeypatch):
    model, prompts, calls, fuse = tiny.model("fusedkv"), tiny.prompts(5, 11, 2, 5), [], attention.ops.fuse_kv

    def count(keys, *rest):
        calls.append(keys[0].numel() // (2 * 16))
        return fuse(keys, *rest)

    monkeypatch.setattr(attention.ops, "fuse_kv", count)
    prefilled(model, prompts, all_logits=True)
    assert calls == [23] * 3  # reconstruction layers


# -------------------------------------------------------------------------------------- training: recompute


def gradients(model, ids, call=None):
    model.zero_grad()
    loss = (model if call is None else call)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("plan", ["fusedkv", "fusedkv_lite", "fusedkv_lite_learnable", "dense_fusion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_fusion_changes_no_bit(plan, dtype, device):
    model = tiny.model(plan, dtype, device)
    ids = torch.randint(0, tiny.VOCAB, (2, 18), device=device)
    kept = gradients(model, ids)
    model.recompute_fusion()
    recomputed = gradients(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    model.recompute_fusion(False)
    assert all(not layer.attention.recompute for layer in model.model.layers[3:])


def alive_before_backward(model, ids, monkeypatch) -> int:
    """How many of the fused keys a forward pass keeps."""
    mix, fused = attention.mix_sources, []

    def watch(*args):
        keys, values = mix(*args)
        fused.append(weakref.ref(keys))
        return keys, values

    with monkeypatch.context() as patch:
        patch.setattr(attention, "mix_sources", watch)
        loss = model(ids[:, :-1], ids[:, 1:])
        gc.collect()
        count = sum(reference() is not None for reference in fused)
        loss.backward()
    return count


def test_recomputed_fusion_keeps_no_fused_keys(monkeypatch):
    model, ids = tiny.model("fusedkv", torch.float32), torch.randint(0, tiny.VOCAB, (2, 18))
    assert alive_before_backward(model, ids, monkeypatch) == 3
    model.recompute_fusion()
    assert alive_before_backward(model, ids, monkeypatch) == 0


class Operations(TorchDispatchMode):
    """Names of the torch ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def test_recomputed_fusion_does_not_repeat_attention():
    model, ids = tiny.model("fusedkv", torch.float32), torch.randint(0, tiny.VOCAB, (2, 18))
    attention, counts = "_scaled_dot_product_flash_attention_for_cpu", []
    for recompute in (False, True):
        model.recompute_fusion(recompute)
        with Operations() as operations:
            gradients(model, ids)
        counts.append([operations.names.count(name) for name in ("fuse_kv", attention)])
    assert counts == [[3, 6], [6, 6]]


def test_recomputed_fusion_inside_activation_checkpointing():
    model, ids = tiny.model("fusedkv", torch.float32), torch.randint(0, tiny.VOCAB, (2, 18))
    expected = gradients(model, ids)
    model.recompute_fusion()
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model, ids), strict=True))


def test_recomputed_fusion_compiles(device):
    model = tiny.model("fusedkv", torch.float32, device)
    ids = torch.randint(0, tiny.VOCAB, (2, 18), device=device)
    expected = gradients(model, ids)
    model.recompute_fusion()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(expected, gradients(model, ids, compiled), strict=True):
        assert (a - b).abs().max() <= (1e-5 if device == "cpu" else 0.05) * a.abs().max() + 1e-6


def fake_cudnn(q, k, v, mask, gives_lse, dropout, causal):
    """What _scaled_dot_product_cudnn_attention gives, of [B, H, S, D], in plain torch."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        assert q.shape[2] == k.shape[2], "cuDNN's causal mask begins at the first key"
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)[..., None] if gives_lse else None


@pytest.fixture
def cudnn(monkeypatch):
    """Inference prefers cuDNN, in multiples of 4; the list has the queries and keys of its calls."""
    calls = []

    def attend(q, k, *rest):
        calls.append((q.shape[2], k.shape[2]))
        return fake_cudnn(q, k, *rest)

    monkeypatch.setattr(attention, "takes_cudnn", lambda q: True)
    monkeypatch.setattr(attention, "CUDNN_ATTENTION", attend)
    for module in (attention, cache_module):
        monkeypatch.setattr(module, "CUDNN_LENGTH", 4)
    return calls


@pytest.mark.parametrize("queries, shapes", [(1, []), (4, [(4, 4), (4, 8)]), (6, []), (12, [(12, 12)])])
def test_cudnn_gets_multiples(request, queries, shapes):
    """In two calls where there are earlier keys."""
    q, k, v = (3 * torch.randn(2, n, heads, 8) for n, heads in ((queries, 6), (12, 2), (12, 2)))
    plain = causal_attention(q, k, v)
    calls = request.getfixturevalue("cudnn")
    torch.testing.assert_close(causal_attention(q, k, v), plain)
    assert not calls, "the backward pass is of one call"
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(q, k, v), plain)
    assert calls == shapes


@pytest.mark.parametrize(
    "lengths, chunk, by_cudnn, by_flash",
    [
        ((8,), 8192, [(8, 8)], 0),
        ((8, 8), 8192, [(8, 8)], 0),
        ((7,), 8192, [], 1),  # too short to be split
        ((19,), 8192, [(16, 16)], 1),
        ((19,), 8, [(8, 8), (8, 8), (8, 8)], 1),  # the second chunk of 8 has 8 earlier keys
        ((7, 12), 8192, [(12, 12)], 1),
    ],
)
def test_prefill_by_cudnn_and_flash(request, monkeypatch, lengths, chunk, by_cudnn, by_flash):
    model, prompts = tiny.model("vanilla"), tiny.prompts(*lengths)
    expected = prefilled(model, prompts, chunk)
    flash, cudnn = request.getfixturevalue("flash"), request.getfixturevalue("cudnn")
    monkeypatch.setattr(PrefillChunk, "segments", lambda self, window, q: self._plan(window, True, True))
    monkeypatch.setattr(cache_module, "SPLIT_FROM", 12)
    torch.testing.assert_close(prefilled(model, prompts, chunk), expected)
    layers = model.config.plan.last_storage  # all but the last, which only writes
    assert cudnn == by_cudnn * layers and len(flash) == by_flash * layers


@pytest.mark.parametrize("window", [None, 5])
def test_long_prompts_without_cudnn(monkeypatch, window):
    """Nothing is split where cuDNN is not preferred, least of all on a CPU, which has no flash attention."""
    model, prompts = tiny.model("vanilla", sliding_window=window), tiny.prompts(19)
    expected = prefilled(model, prompts)
    monkeypatch.setattr(cache_module, "CUDNN_LENGTH", 4)
    monkeypatch.setattr(cache_module, "SPLIT_FROM", 8)
    assert torch.equal(prefilled(model, prompts), expected)
    cache = model.new_cache(8, page_size=4)
    chunk = cache.prefill_chunk(cache.add([19]), [19])
    assert [s.shape for s in chunk._plan(0, True, False)] == [(19, 19)]


def test_cudnn_sees_strides_of_the_length_alone(cudnn, flash, monkeypatch):
    """It plans anew for other strides, which would be those of the whole prompt."""
    monkeypatch.setattr(PrefillChunk, "segments", lambda self, window, q: self._plan(window, True, True))
    monkeypatch.setattr(cache_module, "SPLIT_FROM", 8)
    seen = set()

    def attend(q, k, v, *rest):
        seen.add((q.stride(), k.stride(), v.stride()))
        return fake_cudnn(q, k, v, *rest)

    monkeypatch.setattr(attention, "CUDNN_ATTENTION", attend)
    model = tiny.model("vanilla")
    for length in (17, 18, 19):
        prefilled(model, tiny.prompts(length))
    assert len(seen) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize(
    "queries, length",
    [(300, 300), (128, 1000), (1, 77), (2048, 4099), (2048, 2048), (2048, 5120), (1500, 2524)],
)
def test_inference_attention_on_a_gpu(heads, queries, length):
    q, k, v = (
        torch.randn(2, n, h, 128, device="cuda").bfloat16()
        for n, h in ((queries, heads[0]), (length, heads[1]), (length, heads[1]))
    )
    wide, plain = causal_attention(q.double(), k.double(), v.double()), causal_attention(q, k, v)
    with torch.no_grad():
        assert_close_2x(causal_attention(q, k, v), wide, plain, absolute=2**-9)


def test_cudnn_is_preferred_from_hopper_on(monkeypatch):
    """Asked as on a GPU: nothing else runs these lines without one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    attention.capability.cache_clear()
    for major in (8, 9, 10):
        q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, 1, 128))
        q.device = torch.device("cuda", major)
        assert attention.takes_cudnn(q) == (major >= 9)
        q.dtype = torch.float32
        assert not attention.takes_cudnn(q)
    attention.capability.cache_clear()


def test_cudnn_comes_first_where_it_is_enabled():
    assert attention._backend_order()[0] == SDPBackend.CUDNN_ATTENTION
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        assert attention._backend_order() == [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(SDPBackend.MATH):
        assert attention._backend_order() == []


def test_the_order_of_backends_compiles(monkeypatch):
    """On a GPU; here the order is set although no q is on one."""
    model, ids = tiny.model("fusedkv", torch.float32), torch.randint(0, tiny.VOCAB, (2, 18))
    expected = model(ids)
    first = lambda q: sdpa_kernel(attention._backend_order(), set_priority=True)  # noqa: E731
    monkeypatch.setattr(attention, "_cudnn_first", first)
    assert torch.equal(model(ids), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected)
    assert len(attention._backend_order()) == 4, "the order is left as it was"
