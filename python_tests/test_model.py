import copy
import itertools
import json
import os
import re

import pytest
import quantised
import tiny
import torch
from oracle import assert_close_2x
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkv_ext import CrossLayerPlan, FusedKVForCausalLM, PagedKVCache, generate, ops

every_plan = pytest.mark.parametrize("plan", tiny.PLANS.values(), ids=tiny.PLANS)
fp8_plan = pytest.mark.parametrize("plan", tiny.FP8_PLANS.values(), ids=tiny.FP8_PLANS)
fp8_mode = pytest.mark.parametrize("fp8_sources", quantised.MODES)


def widened(model: FusedKVForCausalLM) -> FusedKVForCausalLM:
    """The same weights in float64 on the CPU: the oracle."""
    return copy.deepcopy(model).cpu().double()


def assert_like_full_forward(model, steps, lengths, prefill, fp8_sources="none", **options):
    """Prefill `lengths` tokens of each sequence, decode the rest: the logits of one full forward.

    With fp8_sources that forward rounds the keys and values of the source layers itself. float64 on the CPU
    must agree to rounding; bfloat16 on a GPU within twice the full forward's own error.
    """
    ids = [prompt.to(model.device) for prompt in tiny.prompts(*(n + steps for n in lengths))]
    cache = model.new_cache(40, page_size=4, max_batch=len(ids) + 1, fp8_sources=fp8_sources)
    tiny.poison(cache)
    cache.add([1])  # so that nobody writes page 0, where a masked read may point
    rows = cache.add([len(x) for x in ids[::-1]])[::-1]  # rows need not be in order
    first = prefill(model, cache, rows, [x[:n] for x, n in zip(ids, lengths, strict=True)], **options)
    outputs = [first]
    for step in range(steps):
        tokens = torch.stack([x[n + step] for x, n in zip(ids, lengths, strict=True)])
        outputs.append(model.decode(cache, rows, tokens))
    actual = torch.stack(outputs, 1)  # [B, steps + 1, vocab]
    oracle = widened(model)

    def whole(model, x):
        return quantised.forward(model, x[None].to(model.device), fp8_sources)[0]

    exact = [whole(oracle, x)[n - 1 : n + steps] for x, n in zip(ids, lengths, strict=True)]
    same = [whole(model, x)[n - 1 : n + steps] for x, n in zip(ids, lengths, strict=True)]
    assert_close_2x(actual, torch.stack(exact), torch.stack(same), absolute=1e-10)


def prefill(model, cache, rows, prompts, **options):
    return model.prefill(cache, rows, prompts, **options)


@every_plan
def test_prefill_and_decode_give_the_logits_of_a_full_forward(device, plan):
    model = tiny.model(plan, device=device)
    assert_like_full_forward(model, 4, (5, 9, 5, 1), prefill)


@fp8_plan
@fp8_mode
def test_sources_in_fp8_give_the_logits_of_a_forward_that_rounds_them(device, plan, fp8_sources):
    model = tiny.model(plan, device=device)
    assert_like_full_forward(model, 4, (5, 9, 5, 1), prefill, fp8_sources)
    assert_like_full_forward(model, 1, (5, 12, 5), prefill, fp8_sources, chunk=5)


@pytest.mark.parametrize("plan", ["fusedkv", "fusedkv_lite_learnable", "dense_fusion"])
@pytest.mark.parametrize("fp8_sources", ["none", *quantised.MODES])
def test_half_precision_on_the_cpu(plan, fp8_sources):
    model = tiny.model(plan, torch.bfloat16)
    assert_like_full_forward(model, 4, (5, 9, 5, 1), prefill, fp8_sources, chunk=8)


@every_plan
def test_chunked_prefill(device, plan):
    model = tiny.model(plan, device=device)
    assert_like_full_forward(model, 1, (5, 12, 5), prefill, chunk=5)


@pytest.mark.parametrize("chunk", [1, 4, 16, 100])
def test_chunks_of_any_size(device, chunk):
    assert_like_full_forward(tiny.model("fusedkv", device=device), 1, (5, 7, 5), prefill, chunk=chunk)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "interleaved, qk_norm, window", [(True, True, 3), (False, False, None), (True, False, 7)]
)
def test_options_of_the_architecture(device, kv_heads, interleaved, qk_norm, window):
    options = dict(
        num_kv_heads=kv_heads, rope_interleaved=interleaved, qk_norm=qk_norm, sliding_window=window
    )
    model = tiny.model("fusedkv", device=device, tie_word_embeddings=window is None, **options)
    for fp8_sources in ("none", *quantised.MODES):
        assert_like_full_forward(model, 3, (9, 2), prefill, fp8_sources, chunk=6)


@fp8_mode
def test_a_rope_table_of_another_magnitude(device, fp8_sources):
    """yarn multiplies keys by its attention factor, so the scales of keys too.

    Scores grow with its square. At 3.0 the softmax is so sharp that plain torch in bfloat16, on a CPU, is
    up to 2.9 times as far from float64 as plain torch that rounds elsewhere; at 1.5, in 24 models, 1.4 times.
    """
    scaling = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, attention_factor=1.5)
    model = tiny.model("fusedkv", device=device, rope_scaling=scaling)
    assert_like_full_forward(model, 3, (9, 2), prefill, fp8_sources)


@fp8_plan
@fp8_mode
def test_all_logits_of_a_prompt_are_those_of_decoding_it(plan, fp8_sources):
    model, ids = tiny.model(plan), tiny.prompts(11, 11, 11)
    cache = model.new_cache(20, page_size=4, max_batch=6, fp8_sources=fp8_sources)
    tiny.poison(cache)
    rows = cache.add([11] * 6)
    every = torch.stack(model.prefill(cache, rows[:3], ids, chunk=7, all_logits=True))
    steps = [model.prefill(cache, rows[3:], [x[:3] for x in ids])]
    steps += [model.decode(cache, rows[3:], tokens) for tokens in torch.stack(ids)[:, 3:].unbind(1)]
    torch.testing.assert_close(every[:, 2:], torch.stack(steps, 1), rtol=0, atol=1e-10)
    assert (every - torch.stack([model(x[None])[0] for x in ids])).abs().max() > 1e-3, "nothing was rounded"


def test_a_decode_step_with_fp8_runs_no_op_more():
    """The step is replayed as a graph: what depends on the weights alone is done before it."""

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    def step_ops(plan, fp8_sources):
        model = tiny.model(plan, torch.float32)
        cache = model.new_cache(4, page_size=4, fp8_sources=fp8_sources)
        rows = cache.add([8])
        model.prefill(cache, rows, tiny.prompts(5))
        step = cache.decode_step(torch.tensor(rows))
        names.clear()
        with Ops():
            model.decode_step(torch.tensor([3]), step)
        views = ("aten.unsqueeze", "aten.view", "aten.slice", "aten.detach", "aten.alias", "aten.t.")
        return sorted(name for name in names if not name.startswith(views))

    names: list[str] = []
    for plan in ("fusedkv", "fusedkv_lite", "cla"):
        plain = step_ops(plan, "none")
        assert plain.count("fusedkv.fused_attention.default") == tiny.LAYERS
        assert step_ops(plan, "copy") == step_ops(plan, "only") == plain


@every_plan
def test_generation_changes_no_weights(device, plan):
    """The layers add to the residual stream in place, which begins as the embeddings of the tokens."""
    model = tiny.model(plan, device=device)
    before = copy.deepcopy(model.state_dict())
    generate(model, tiny.prompts(9, 1), 4)
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def change_weights(model, layers=range(tiny.LAYERS)) -> None:
    """One step of training with a large rate, of some layers only."""
    ids = torch.randint(0, tiny.VOCAB, (2, 17), device=model.device)
    parameters = [p for i in layers for p in model.model.layers[i].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    optimizer.zero_grad()
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()


@pytest.mark.parametrize("fp8_sources", ["none", *quantised.MODES])
def test_a_change_of_weights_counts_from_the_next_call(device, fp8_sources):
    model, (ids,) = tiny.model("fusedkv", device=device), tiny.prompts(9)
    ids = ids.to(device)

    def new_cache():
        return model.new_cache(6, page_size=4, fp8_sources=fp8_sources)

    def run(cache, tokens):
        """Logits after 7 tokens, and after each of those that are decoded."""
        (row,) = cache.add([9])
        steps = [model.prefill(cache, [row], [tokens[:7]])]
        return torch.cat(steps + [model.decode(cache, [row], x[None]) for x in tokens[7:]])

    cache, outputs = new_cache(), []
    for _ in range(3):
        outputs.append(run(cache, ids[:8]))
        assert torch.equal(outputs[-1], run(new_cache(), ids[:8]))
        # What layers 0 to 2 wrote stays right when the layers above them change.
        change_weights(model, range(3, tiny.LAYERS))
        assert torch.equal(model.decode(cache, [0], ids[8:])[0], run(new_cache(), ids)[-1])
        cache.free([0])
        change_weights(model)
    assert all((a - b).abs().max() > 1e-2 for a, b in itertools.pairwise(outputs))


@fp8_mode
def test_weights_that_change_under_cached_tokens_are_refused(fp8_sources):
    """Other scales would misread what is stored; nothing is written."""
    model, prompts = tiny.model("fusedkv"), tiny.prompts(5, 6)
    cache = model.new_cache(6, page_size=4, max_batch=3, fp8_sources=fp8_sources)
    rows = cache.add([8, 8])
    model.prefill(cache, rows[:1], prompts[:1])
    before = [x.view(torch.uint8).clone() for x in (*cache.keys.values(), *cache.values.values())]
    change_weights(model)
    for call in (
        lambda: model.decode(cache, rows[:1], torch.tensor([3])),
        lambda: model.prefill(cache, rows[1:], prompts[1:]),
        lambda: generate(model, prompts[:1], 2, cache=cache),
    ):
        with pytest.raises(
            ValueError, match=r"scales of layer 0: expected those that .*with 5 tokens in use"
        ):
            call()
    after = [x.view(torch.uint8) for x in (*cache.keys.values(), *cache.values.values())]
    assert all(map(torch.equal, before, after)) and cache.length(0) == 5


@every_plan
def test_a_sequence_can_be_prefilled_twice(plan):
    def twice(model, cache, rows, prompts):
        model.prefill(cache, rows, [prompt[:3] for prompt in prompts])
        return model.prefill(cache, rows, [prompt[3:] for prompt in prompts])

    assert_like_full_forward(tiny.model(plan), 1, (7, 4), twice)


@every_plan
def test_early_exit_gives_the_last_of_all_logits(device, plan):
    model = tiny.model(plan, device=device)
    prompts = tiny.prompts(9, 4, 1)
    cache = model.new_cache(20, page_size=4, max_batch=6)
    rows = cache.add([9, 4, 1, 9, 4, 1])
    last = model.prefill(cache, rows[:3], prompts, chunk=6)
    every = model.prefill(cache, rows[3:], prompts, chunk=6, all_logits=True)
    oracle = widened(model)
    with torch.no_grad():
        exact = [oracle(prompt[None])[0] for prompt in prompts]
        same = [model(prompt[None].to(device))[0] for prompt in prompts]
    ends = [8, 12, 13]  # the last tokens among all
    exact, same = torch.cat(exact), torch.cat(same)
    assert_close_2x(torch.cat((*every, last)), exact[[*range(14), *ends]], same[[*range(14), *ends]], 1e-10)


@every_plan
def test_early_exit_skips_layers(plan, monkeypatch):
    model = tiny.model(plan)
    tokens = {layer.mlp.gate_up_proj.weight: 0 for layer in model.model.layers}
    swiglu_linear = ops.swiglu_linear

    def count(x, weight, *rest, **options):
        tokens[weight] += len(x)
        return swiglu_linear(x, weight, *rest, **options)

    monkeypatch.setattr(ops, "swiglu_linear", count)
    cache = model.new_cache(10, page_size=4, max_batch=2)
    model.prefill(cache, cache.add([9, 4]), tiny.prompts(9, 4), chunk=5)
    last = plan.last_storage
    assert list(tokens.values()) == [13] * last + [2] * (tiny.LAYERS - last)


def test_fusedkv_with_lite_weights_is_lite_bit_for_bit(device):
    lite = tiny.model("fusedkv_lite", torch.float32, device)
    fused = tiny.model("fusedkv", torch.float32, device)
    fused.load_state_dict(lite.state_dict(), strict=False)
    for layer in fused.model.layers[3:]:
        weights = layer.attention.fusion
        with torch.no_grad():
            for side, entries in ((weights.key, (0.0, 1.0)), (weights.value, (1.0, 0.0))):
                side.copy_(torch.tensor(entries, device=device)[:, None, None].expand_as(side))
    prompts = [prompt.to(device) for prompt in tiny.prompts(9, 5)]
    outputs = []
    for model in (lite, fused):
        with torch.no_grad():
            whole = model(prompts[0][None])
        cache = model.new_cache(10, page_size=4, max_batch=2)
        rows = cache.add([10, 6])
        first = model.prefill(cache, rows, prompts)
        outputs.append((whole, first, model.decode(cache, rows, first.argmax(-1))))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def fresh(plan, **overrides) -> FusedKVForCausalLM:
    """A model as training finds it: embeddings so small that an epsilon of 0.1 would drown them."""
    return FusedKVForCausalLM(tiny.config(plan, **{"rms_norm_eps": 1e-6, **overrides}))


def train(model, steps=8, autocast=None) -> list[float]:
    ids = torch.randint(0, tiny.VOCAB, (2, 17), device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_plan
def test_every_plan_trains(plan):
    losses = train(fresh(plan, fusion_init="lite"))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("fusion_init", ["standard", "equivalent"])
def test_every_initialisation_trains(fusion_init):
    losses = train(fresh("fusedkv", fusion_init=fusion_init))
    assert losses[-1] < losses[0] - 0.3


def test_gqa_and_windows_train_under_autocast(device):
    shape = dict(num_kv_heads=1, sliding_window=4, head_dim=64 if device == "cuda" else 16)
    model = fresh("fusedkv", **shape).to(device)
    losses = train(model, autocast=torch.bfloat16)
    assert losses[-1] < losses[0] - 0.3


def gradients(model: FusedKVForCausalLM, call, ids) -> list[torch.Tensor]:
    model.zero_grad()
    call(ids, ids).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("plan", ["fusedkv", "fusedkv_lite", "vanilla"])
def test_training_compiles_without_graph_breaks(device, plan):
    model = tiny.model(plan, torch.float32, device, num_layers=4)
    ids = torch.randint(0, tiny.VOCAB, (2, 9), device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"  # which needs no C++ compiler
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend=backend), ids)
    eager = gradients(model, model, ids)
    oracle = widened(model)
    exact = gradients(oracle, oracle, ids.cpu())

    def scaled(grads):  # to compare parameters of any size in one sweep
        return torch.cat([(g.cpu() / e.abs().max()).flatten() for g, e in zip(grads, exact, strict=True)])

    assert_close_2x(scaled(compiled), scaled(exact), scaled(eager), absolute=1e-6)


def test_reconstruction_layers_own_no_key_or_value_weights():
    names = [name for name, _ in tiny.model("fusedkv").named_parameters()]
    upper = [n.split(".", 3)[3] for n in names if n.startswith("model.layers.4.")]
    assert sorted(upper) == [
        "attention.fusion.key",
        "attention.fusion.value",
        "attention.o_proj.weight",
        "attention.q_norm.weight",
        "attention.q_proj.weight",
        "attention_norm.weight",
        "mlp.down_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp_norm.weight",
    ]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(torch.zeros(0, 4).long()), "input_ids: expected int64 or int32.*got torch.int64 .0, 4."),
        (lambda m: m(torch.zeros(1, 0).long()), "input_ids: expected int64 or int32.*neither of them 0"),
        (lambda m: m(torch.zeros(4).long()), "input_ids: expected int64 or int32"),
        (lambda m: m(torch.zeros(1, 4)), "input_ids: expected int64 or int32.*got torch.float32"),
        (
            lambda m: m(torch.zeros(1, 129).long()),
            "input_ids: expected at most 128 tokens a sequence, got 129",
        ),
        (
            lambda m: m(torch.zeros(1, 4).long(), torch.zeros(1, 3).long()),
            r"targets: expected shape \[1, 4\], got \[1, 3\]",
        ),
    ],
)
def test_forward_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny.model())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, c, p: m.prefill(c, [], []), "prefill: rows: expected at least one sequence, got 0"),
        (lambda m, c, p: m.prefill(c, [0], [p, p]), "prefill: prompts: expected 1, one a row, got 2"),
        (lambda m, c, p: m.prefill(c, [0], [p[:0]]), r"prompts\[0\]: expected .* at least one token"),
        (lambda m, c, p: m.prefill(c, [0], [p.float()]), r"prompts\[0\]: expected int64 or int32"),
        (lambda m, c, p: m.prefill(c, [0], [p], chunk=0), "chunk: expected at least 1 token, got 0"),
        (lambda m, c, p: m.prefill(c, [0, 1], [p, p.repeat(3)]), "row 1: expected at most 8 tokens.*got 15"),
        (lambda m, c, p: m.prefill(c, [0, 2], [p, p]), r"rows: expected rows in use, \[0, 1\], got 2"),
        (lambda m, c, p: m.prefill(c, [1, 1], [p, p]), "rows: expected different rows"),
        (lambda m, c, p: m.decode(c, [], p[:0]), "decode: rows: expected at least one sequence"),
        (lambda m, c, p: m.decode(c, [0], p), r"decode: tokens: expected int64 or int32 \[1\]"),
        (
            lambda m, c, p: m.prefill(c, [0, 1], [p, p.index_fill(0, torch.tensor([3]), tiny.VOCAB)]),
            r"prefill: prompts\[1\]: expected token ids 0 to 96, got 97",
        ),
        (lambda m, c, p: m.prefill(c, [0], [-1 - p], 2), r"prompts\[0\]: expected token ids 0 to 96, got -"),
        (
            lambda m, c, p: m.decode(c, [0, 1], torch.tensor([5, 97])),
            "decode: tokens: expected token ids 0 to 96, got 97",
        ),
        (
            lambda m, c, p: m.decode(c, [0], torch.tensor([-2])),
            "decode: tokens: expected token ids 0 to 96, got -2",
        ),
        (
            lambda m, c, p: (c.advance([1], [8]), m.decode(c, [0, 1], p[:2])),
            "row 1: expected at most 8 .*got 9",
        ),
    ],
)
def test_cached_calls_refuse_bad_input_and_write_nothing(call, message):
    model = tiny.model()
    cache = model.new_cache(4, page_size=4, max_batch=3)
    tiny.poison(cache)
    cache.add([8, 8])
    with pytest.raises(ValueError, match=message):
        call(model, cache, tiny.prompts(5)[0])
    assert cache.length(0) == 0 and cache.seq_lens[0] == 0 and cache.seq_lens[2] == 0
    assert cache.length(1) == cache.seq_lens[1] in (0, 8)
    assert all(pool.isnan().all() for pool in (*cache.keys.values(), *cache.values.values()))


def generate_with(model, cache, prompt):
    return generate(model, [prompt], 2, cache=cache)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, cache, prompt: model.prefill(cache, [0], [prompt]),
        lambda model, cache, prompt: model.decode(cache, [0], prompt[:1]),
        generate_with,
    ],
    ids=["prefill", "decode", "generate"],
)
@pytest.mark.parametrize("other", ["plan", "option", "dtype", "device", "type"])
def test_a_cache_of_another_model_is_refused(call, other):
    config, options = tiny.config("fusedkv"), dict(page_size=4, max_batch=2, dtype=torch.float64)
    if other == "plan":
        config = tiny.config("fusedkv_lite")
    elif other == "option":
        config = tiny.config("fusedkv", rope_theta=1e5)
    elif other in ("dtype", "device"):
        options[other] = {"dtype": torch.float32, "device": "meta"}[other]
    cache = {} if other == "type" else PagedKVCache(config, 4, **options)
    if other != "type":
        cache.add([8])
    with pytest.raises(ValueError, match=r"(prefill|decode|generate): cache: expected "):
        call(tiny.model("fusedkv"), cache, tiny.prompts(5)[0])
    if other != "type":
        assert cache.length(0) == 0 and cache.num_free_pages == 2


def test_construction_on_the_meta_device(device):
    """The checkpoint fills the weights, and the RoPE table, which is in no checkpoint, is computed again."""
    filled = tiny.model("fusedkv", torch.float32, device, rope_theta=300.0)
    with torch.device("meta"):
        model = FusedKVForCausalLM(filled.config)
    model = model.to(filled.dtype).to_empty(device=device)
    model.load_state_dict(filled.state_dict())
    table, expected = model.model.rotary(), filled.model.rotary()
    assert table.dtype == torch.float32 and table.device == expected.device
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(x, filled.state_dict()[name]) for name, x in model.state_dict().items())
    assert {p.dtype for n, p in model.named_parameters() if "fusion" in n} == {torch.float32}


def test_a_half_precision_default_dtype(device):
    torch.manual_seed(1)
    config = tiny.config("fusedkv", head_dim=64, tie_word_embeddings=True)
    usual = FusedKVForCausalLM(config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = FusedKVForCausalLM(config).to(device)
        assert model.dtype == torch.bfloat16
        assert {p.dtype for n, p in model.named_parameters() if "fusion" in n} == {torch.float32}
        assert torch.equal(model.model.rotary().cpu(), usual.model.rotary())
        model.load_state_dict(usual.state_dict())
        prompts = tiny.prompts(7, 3)
        tokens = generate(model, prompts, 4).tokens
        train(model, steps=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert tokens == generate(usual.to(device, torch.bfloat16), prompts, 4).tokens


@every_plan
def test_autocast_changes_nothing_with_a_cache(device, plan):
    model, prompts = tiny.model(plan, torch.float32, device), tiny.prompts(9, 4)
    outputs, fp8_sources = [], "only" if plan.source_layers else "none"
    for enabled in (False, True):
        with torch.autocast(device, dtype=torch.float16, enabled=enabled):
            cache = model.new_cache(8, page_size=4, max_batch=2, fp8_sources=fp8_sources)
            rows = cache.add([12, 8])
            first = model.prefill(cache, rows, prompts, chunk=5)
            outputs.append((first, model.decode(cache, rows, first.argmax(-1))))
    for outside, inside in zip(*outputs, strict=True):
        assert inside.dtype == model.dtype and torch.equal(outside, inside)


@every_plan
def test_checkpoint_round_trip(plan, tmp_path):
    model = tiny.model(plan, torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    loaded = FusedKVForCausalLM.from_pretrained(tmp_path / "model")
    ids = tiny.prompts(9)[0][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert loaded.config == model.config


def test_checkpoint_dtype_and_device(device, tmp_path):
    tiny.model("fusedkv", torch.float32).save_pretrained(tmp_path)
    loaded = FusedKVForCausalLM.from_pretrained(tmp_path, device=device, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.device.type == device
    assert {p.dtype for n, p in loaded.named_parameters() if "fusion" in n} == {torch.float32}
    assert loaded.model.rotary().dtype == torch.float32
    assert loaded.model.rotary().device == loaded.device
    whole = FusedKVForCausalLM.from_pretrained(tmp_path)
    assert all(p.data_ptr() % 16 == 0 for p in (*whole.parameters(), *loaded.parameters()))


def test_bad_checkpoints_name_every_tensor(tmp_path):
    model = tiny.model("fusedkv", torch.float32)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    tensors["model.surplus"] = torch.zeros(2)
    tensors["model.layers.3.attention.fusion.key"] = torch.zeros(2, 2, 16)
    save_file(tensors, weights)
    with pytest.raises(ValueError) as error:
        FusedKVForCausalLM.from_pretrained(tmp_path)
    for part in (
        "missing ['model.norm.weight']",
        "extra ['model.surplus']",
        "model.layers.3.attention.fusion.key: expected shape [2, 2, 8], got [2, 2, 16]",
    ):
        assert part in str(error.value)

    model.save_pretrained(tmp_path)
    good = load_file(weights)
    name = "model.layers.1.attention.q_norm.weight"
    for dtype in (torch.int64, torch.float16, torch.float8_e4m3fn):
        save_file({**good, name: good[name].to(dtype)}, weights)
        with pytest.raises(ValueError, match=re.escape(name)):
            FusedKVForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.4.attention.fusion.key"
    save_file({**good, name: good[name].int()}, weights)
    with pytest.raises(ValueError, match=re.escape(name) + ": expected a floating dtype"):
        FusedKVForCausalLM.from_pretrained(tmp_path)

    weights.write_bytes(b"pickle me")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        FusedKVForCausalLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        FusedKVForCausalLM.from_pretrained(tmp_path)


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    tiny.model("fusedkv", torch.float32).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fusedkv_ext.model.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        tiny.model("vanilla", torch.float32).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_json_holds_the_plan(tmp_path):
    plan = CrossLayerPlan.from_layer_types("0_1_2_0_1_2")
    tiny.model(plan, torch.float32).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert [layer["key_sources"] for layer in stored["plan"]["layers"]] == [[0], [1], [2]] * 2


def test_a_row_of_nan_reaches_no_other_sequence():
    model = tiny.model("fusedkv")
    prompts, outputs = tiny.prompts(6, 7), []
    for spoil in (False, True):
        cache = model.new_cache(6, page_size=4, max_batch=2)
        rows = cache.add([10, 10])
        model.prefill(cache, rows, prompts)
        if spoil:
            pages = cache.block_table[rows[0]]
            for pool in itertools.chain(cache.keys.values(), cache.values.values()):
                pool[pages[pages >= 0].long()] = float("nan")
        outputs.append(model.decode(cache, rows, torch.tensor([1, 2])))
    assert outputs[1][0].isnan().all() and torch.equal(outputs[0][1], outputs[1][1])


@torch.no_grad()
def attention_hints(device, monkeypatch, hint, plan, fp8_sources="none", steps=1):
    """The argument `hint` of every fused_attention of some decode steps."""
    made, hints = tiny.model(plan, device=device), []
    cache = made.new_cache(8, page_size=16, max_batch=1, fp8_sources=fp8_sources)
    rows = cache.add([20])
    made.prefill(cache, rows, [x.to(device) for x in tiny.prompts(5)])
    fused_attention = ops.fused_attention

    def spy(*args, **rest):
        hints.append(rest[hint])
        return fused_attention(*args, **rest)

    monkeypatch.setattr(ops, "fused_attention", spy)
    for _ in range(steps):
        made.decode(cache, rows, torch.zeros(1, dtype=torch.int64, device=device))
    return hints


def test_the_attention_that_makes_the_schedule_alone_waits_for_it(device, monkeypatch):
    early = attention_hints(device, monkeypatch, "early_cache", "fusedkv", steps=2)
    assert early == 2 * [False, *[True] * (tiny.LAYERS - 1)]


@pytest.mark.parametrize(
    "plan, fp8_sources, kept",
    [
        ("vanilla", "none", ()),
        ("fusedkv", "none", (2, 3, 4, 5)),  # the last storage layer's sources come again at once
        ("fusedkv", "copy", (3, 4, 5)),  # that layer reads its pages, those above their copies
        ("fusedkv_lite", "none", (2, 3, 4, 5)),
        ("cla", "none", range(6)),
    ],
)
def test_sources_that_the_next_layer_reads_stay_in_the_l2(device, monkeypatch, plan, fp8_sources, kept):
    hints = attention_hints(device, monkeypatch, "keep_sources", plan, fp8_sources)
    assert hints == [i in kept for i in range(tiny.LAYERS)]
