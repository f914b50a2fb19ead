import pytest
import quantised
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkv_ext import (
    DecoderLayer,
    FusionWeights,
    LayerPlan,
    PagedKVCache,
    ReconstructionAttention,
    StorageAttention,
    extension,
    ops,
    reference,
)
from fusedkv_ext.attention import causal_attention
from fusedkv_ext.modules import (
    RMSNorm,
    SwiGLU,
    initialise_fusion,
    projects_in_one_launch,
    rope_table,
)

HKV, D = 2, 16


def random_fusion(**options) -> FusionWeights:
    fusion = FusionWeights(2, 2, HKV, D, **options)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    return fusion


@pytest.mark.parametrize("interleaved", [False, True])
def test_key_weights_are_tied_in_rope_pairs(interleaved):
    fusion = random_fusion(interleaved=interleaved)
    key, value = fusion()
    assert fusion.key.shape == (2, HKV, D // 2) and fusion.value.shape == (2, HKV, D)
    assert key.shape == value.shape == (2, HKV, D) and torch.equal(value, fusion.value)
    pairs = (key[..., 0::2], key[..., 1::2]) if interleaved else key.chunk(2, -1)
    assert torch.equal(pairs[0], fusion.key) and torch.equal(pairs[1], fusion.key)

    grad = torch.randn_like(key)
    key.backward(grad)
    pairs = (grad[..., 0::2], grad[..., 1::2]) if interleaved else grad.chunk(2, -1)
    torch.testing.assert_close(fusion.key.grad, pairs[0] + pairs[1])


def test_kinds_of_weights():
    key, value = FusionWeights(3, 1, HKV, D, "scalar", "none")()
    assert value is None and key.is_contiguous()
    assert torch.equal(key, torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, HKV, D))
    assert list(FusionWeights(1, 1, HKV, D, "none", "none").parameters()) == []


@pytest.mark.parametrize(
    "args, message",
    [
        ((2, 2, HKV, 15), "head_dim: expected a positive even number, got 15"),
        ((2, 2, 0, D), "num_kv_heads: expected 1 or more, got 0"),
        ((0, 2, HKV, D), "num_key_sources: expected 1 to 8 with channel weights, got 0"),
        ((2, 9, HKV, D), "num_value_sources: expected 1 to 8 with channel weights, got 9"),
        ((2, 1, HKV, D, "none", "none"), "num_key_sources: expected 1 to 1 with none weights, got 2"),
        ((1, 2, HKV, D, "none", "none"), "num_value_sources: expected 1 to 1 with none weights, got 2"),
        ((2, 2, HKV, D, "vector"), "key_weights: expected none or scalar or channel, got 'vector'"),
        ((2, 2, HKV, D, "scalar", None), "value_weights: expected none or scalar or channel, got None"),
    ],
)
def test_fusion_weights_refuse(args, message):
    with pytest.raises(ValueError, match="FusionWeights: " + message):
        FusionWeights(*args)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_relative_positions_only_when_tied(interleaved):
    """The paper's eq. (7): untied weights add a term in m + n."""
    table = rope_table(D, 200).double()
    q, k = torch.randn(2, 1, 1, D, dtype=torch.float64)

    def score(weights: torch.Tensor, m: int, n: int) -> torch.Tensor:
        query = reference.apply_rope(q, torch.tensor([m]), table, interleaved)
        key = reference.apply_rope(k, torch.tensor([n]), table, interleaved)
        return (query * weights * key).sum()

    tied = random_fusion(interleaved=interleaved)()[0][0, 0].double()
    torch.testing.assert_close(score(tied, 20, 5), score(tied, 190, 175))
    untied = tied + torch.randn(D)
    assert (score(untied, 20, 5) - score(untied, 190, 175)).abs() > 1e-3


def test_fusion_weights_stay_float32():
    fusion = random_fusion()
    before = fusion.key.detach().clone()
    for convert in (fusion.half, fusion.bfloat16):
        convert()
        assert fusion.key.dtype == torch.float32 and torch.equal(fusion.key, before)
    assert fusion.double().key.dtype == torch.float64


def test_fusion_weights_are_float32_under_any_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        fusions = FusionWeights(2, 2, HKV, D), FusionWeights(2, 2, HKV, D, "scalar", "scalar")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for fusion in fusions for x in (*fusion.parameters(), *fusion())} == {torch.float32}


def stack_of_fusion(num_layers: int) -> list[FusionWeights]:
    return [random_fusion() for _ in range(num_layers)]


def test_lite_initialisation():
    stack = stack_of_fusion(3)
    initialise_fusion(stack, "lite")
    for fusion in stack:
        key, value = fusion()
        assert torch.equal(key, torch.tensor([0.0, 1.0])[:, None, None].expand(2, HKV, D))
        assert torch.equal(value, torch.tensor([1.0, 0.0])[:, None, None].expand(2, HKV, D))


def test_standard_initialisation():
    stack = [FusionWeights(2, 2, 8, 64) for _ in range(8)]
    initialise_fusion(stack, "standard")
    drawn = torch.cat([p.detach().flatten() for fusion in stack for p in fusion.parameters()])
    assert drawn.mean().abs() < 0.05 and (drawn.std() - 1).abs() < 0.05


def test_equivalent_initialisation_is_the_unrolled_iterative_form():
    stack = stack_of_fusion(4)
    torch.manual_seed(7)
    initialise_fusion(stack, "equivalent")
    k1, kn, v1, vn = torch.randn(4, HKV, D)

    torch.manual_seed(7)  # the same draws, used the iterative way
    before = kn
    for fusion in stack:
        carry, extra = torch.randn(HKV, D // 2), torch.randn(HKV, D // 2)
        before = carry.repeat(1, 2) * before + extra.repeat(1, 2) * kn
        key = fusion()[0]
        torch.testing.assert_close(key[0] * k1 + key[1] * kn, before)
    before = vn
    for fusion in stack:
        carry, extra = torch.randn(HKV, D), torch.randn(HKV, D)
        before = carry * before + extra * v1
        value = fusion()[1]
        torch.testing.assert_close(value[0] * v1 + value[1] * vn, before)


def test_an_unknown_initialisation_changes_nothing():
    stack = stack_of_fusion(2)
    before = [p.clone() for fusion in stack for p in fusion.parameters()]
    with pytest.raises(ValueError, match=r"initialise_fusion: kind: expected standard or .*got 'zeros'"):
        initialise_fusion(stack, "zeros")
    assert all(map(torch.equal, before, (p for fusion in stack for p in fusion.parameters())))


def test_rope_table_layout_and_precision():
    table = rope_table(D, 100_001, theta=1e6)
    angles = 100_000 * 1e6 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    exact = torch.cat((angles.cos(), angles.sin())).float()
    assert table.dtype == torch.float32 and table.shape == (100_001, D)
    torch.testing.assert_close(table[-1], exact, rtol=0, atol=1e-6)
    assert torch.equal(table[0], torch.tensor([1.0] * 8 + [0.0] * 8))


def test_rms_norm_and_swiglu_are_their_formulas():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    norm = RMSNorm(8, eps=0.1).double()
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight)
    mlp = SwiGLU(8, 12).double()
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    hidden = (x @ gate.t()) * torch.sigmoid(x @ gate.t()) * (x @ up.t())
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.t())


def test_cached_swiglu_adds_its_output_in_place():
    mlp, x, residual = SwiGLU(8, 12).double(), *torch.randn(2, 5, 8, dtype=torch.float64)
    before = x.clone(), residual.clone()
    with torch.no_grad():
        assert mlp.cached(x, residual) is residual
        torch.testing.assert_close(residual, before[1] + mlp(x))
        norm, normed = RMSNorm(8, eps=0.1).double(), residual.clone()
        nn.init.normal_(norm.weight)
        mlp.cached(x, normed, norm)
        torch.testing.assert_close(normed, residual + mlp(norm(x)))
    assert torch.equal(x, before[0])


def naive_attention(q, k, v, window):
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bshd->bhqs", q, k) * q.shape[-1] ** -0.5
    queries, length = scores.shape[-2:]
    distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    return torch.einsum("bhqs,bshd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("queries, length", [(1, 1), (9, 9), (1, 9), (4, 9), (600, 700)])
@pytest.mark.parametrize("window", [0, 1, 3, 530, 5000])
def test_causal_attention(heads, kv_heads, queries, length, window):
    q = torch.randn(2, queries, heads, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, length, kv_heads, 4, dtype=torch.float64)
    torch.testing.assert_close(causal_attention(q, k, v, window), naive_attention(q, k, v, window))


class TwoLayers(nn.Module):
    """A user's own model: two storage layers and one that reconstructs from both."""

    def __init__(self, heads=4, kv_heads=2, head_dim=D, interleaved=False, window=0):
        super().__init__()
        shape, rest = (32, heads, kv_heads, head_dim), dict(interleaved=interleaved)
        plan = LayerPlan((0, 1), (0, 1), "channel", "channel")
        attentions = (
            StorageAttention(*shape, layer=0, window=window, **rest),
            StorageAttention(*shape, layer=1, window=window, **rest),
            ReconstructionAttention(*shape, plan=plan, **rest),
        )
        self.layers = nn.ModuleList(DecoderLayer(attention, 32, 48) for attention in attentions)
        nn.init.normal_(attentions[2].fusion.key)
        nn.init.normal_(attentions[2].fusion.value)

    def forward(self, x, cos_sin):
        sources = {}
        for i, layer in enumerate(self.layers):
            x, own = layer(x, cos_sin, sources)
            if own is not None:
                sources[i] = own
        return x


class Rounded(nn.Module):
    """The same layers, with the sources rounded to e4m3."""

    def __init__(self, model: TwoLayers, mode: str):
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x, cos_sin):
        return quantised.run_layers(self.model.layers, x, cos_sin, (0, 1), self.mode)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fp8_sources", ["none", *quantised.MODES])
def test_projecting_in_one_launch_changes_nothing(monkeypatch, fp8_sources, interleaved):
    """Both ways of projecting give the same, also for a prompt of which the last layer needs no queries."""
    made = TwoLayers(interleaved=interleaved).double()
    table, x = rope_table(D, 64).double(), torch.randn(10, 32).double()
    plan = tiny.CrossLayerPlan("own", (LayerPlan((0,), (0,)), LayerPlan((1,), (1,)), PLAN))
    config = tiny.config(plan, num_layers=3, num_kv_heads=HKV, head_dim=D)

    @torch.no_grad()
    def run(one_launch):
        monkeypatch.setattr("fusedkv_ext.modules.projects_in_one_launch", lambda x: one_launch)
        cache = PagedKVCache(config, 4, page_size=4, dtype=torch.float64, fp8_sources=fp8_sources)
        rows = cache.add([12])
        for layer in made.layers:
            layer.bind(cache, table)
        step = cache.prefill_chunk(rows, [9])
        made.layers[1].write_kv(made.layers[0].cached(x[:9].clone(), table, step), table, step)
        cache.advance(rows, [9])
        step, h = cache.decode_step(torch.tensor(rows)), x[9:].clone()
        for layer in made.layers:
            h = layer.cached(h, table, step)
        slots = cache.block_table[0, :3].long()
        pools = (cache.keys, cache.values, cache.key_copies, cache.value_copies)
        return [h.double(), *(pool[i][slots].double().flatten(0, 1)[:10] for pool in pools for i in pool)]

    for one, two in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_no_fused_projection_where_there_is_no_kernel():
    assert not projects_in_one_launch(torch.zeros(1, 64))
    assert not projects_in_one_launch(torch.zeros(1, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("layer", [0, 2])
def test_norms_and_residual_sums_are_part_of_the_ops(layer):
    """Two ops a layer add to x itself, and nothing else is added; the MLP's norm is left to its op."""

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket._qualified_op_name.partition("::")[2])
            if names[-1] == "linear_add":
                targets.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    made, table, x = TwoLayers(), rope_table(D, 64), torch.randn(1, 32)
    plan = tiny.CrossLayerPlan("own", (LayerPlan((0,), (0,)), LayerPlan((1,), (1,)), PLAN))
    cache = PagedKVCache(tiny.config(plan, num_layers=3, num_kv_heads=HKV, head_dim=D), 4, page_size=4)
    for each in made.layers:
        each.bind(cache, table)
    step, names, targets = cache.decode_step(torch.tensor(cache.add([1]))), [], []
    with torch.no_grad(), Ops():
        out = made.layers[layer].cached(x, table, step)
    assert out is x and targets == [x.data_ptr()] * 2
    assert names.count("mm") == 1, "the projection; on a CPU its norm is apart"
    assert names.count("swiglu_linear") == 1 and not {"add", "addmm_", "swiglu"} & set(names)


def test_a_weight_that_is_computed_is_not_read_early(monkeypatch):
    """A parametrization writes the weight by the kernel right before the op."""
    mlp, early = SwiGLU(8, 12), []
    linear_add = ops.linear_add

    def spy(out, x, weight, early_weight):
        early.append(early_weight)
        linear_add(out, x, weight)

    monkeypatch.setattr(ops, "linear_add", spy)
    with torch.no_grad():
        mlp.cached(torch.randn(2, 8), torch.zeros(2, 8))
        nn.utils.parametrizations.weight_norm(mlp.down_proj)
        x, out = torch.randn(2, 8), torch.zeros(2, 8)
        mlp.cached(x, out)
        torch.testing.assert_close(out, mlp(x))
    assert early == [True, False]


@pytest.mark.cuda
def test_tokens_are_projected_in_one_launch_on_hopper():
    x = torch.zeros(65, 72, device="cuda", dtype=torch.bfloat16)
    hopper = torch.cuda.get_device_capability() == (9, 0) and "90a" in extension.load().architectures
    assert projects_in_one_launch(x) == projects_in_one_launch(x[:64]) == hopper
    assert not projects_in_one_launch(x.float()) and not projects_in_one_launch(x[:, :71])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fp8_sources", ["none", *quantised.MODES])
def test_modules_alone_learn_and_agree_with_the_cache(device, interleaved, kv_heads, fp8_sources):
    d, dtype = (64, torch.bfloat16) if device == "cuda" else (D, torch.float64)
    exact = TwoLayers(4, kv_heads, d, interleaved, window=5)
    made = TwoLayers(4, kv_heads, d, interleaved, window=5).to(device, dtype)
    exact.double().load_state_dict({name: x.cpu().double() for name, x in made.state_dict().items()})
    made.load_state_dict(exact.state_dict())
    cos_sin = rope_table(d, 64).to(device)
    table = cos_sin if device == "cuda" else cos_sin.double()
    x = torch.randn(1, 11, 32, device=device, dtype=dtype)

    made(x, table).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in made.parameters())

    plan = tiny.CrossLayerPlan("own", (LayerPlan((0,), (0,)), LayerPlan((1,), (1,)), PLAN))
    shape = dict(num_layers=3, num_kv_heads=kv_heads, head_dim=d)
    options = dict(dtype=dtype, device=device, fp8_sources=fp8_sources)
    cache = PagedKVCache(tiny.config(plan, **shape), 4, page_size=4, **options)
    tiny.poison(cache)
    rows = cache.add([11])
    for layer in made.layers:
        layer.bind(cache, table)
    if fp8_sources != "none":
        exact, made = Rounded(exact, fp8_sources), Rounded(made, fp8_sources)
    layers = made.layers if fp8_sources == "none" else made.model.layers
    with torch.no_grad():
        h = x[0, :9].clone()
        step = cache.prefill_chunk(rows, [9])
        for layer in layers:
            h = layer.cached(h, table, step)
        cache.advance(rows, [9])
        outputs = [h]
        for t in (9, 10):
            h = x[0, t : t + 1].clone()
            step = cache.decode_step(torch.tensor(rows, device=device))
            for layer in layers:
                h = layer.cached(h, table, step)
            cache.advance(rows, [1])
            outputs.append(h)
        whole = exact(x.cpu().double(), cos_sin.cpu().double())
        assert_close_2x(torch.cat(outputs), whole[0], made(x, table)[0], absolute=1e-12)


PLAN = LayerPlan((0, 1), (0, 1), "channel", "channel")


def storage_layer(qk_norm=True, interleaved=False, hidden=32, dtype=torch.float64) -> DecoderLayer:
    """Two heads of 8 channels; weights and norms of very different sizes."""
    attention = StorageAttention(hidden, 4, 2, 8, qk_norm=qk_norm, interleaved=interleaved)
    layer = DecoderLayer(attention, hidden, 48)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * torch.randn_like(parameter).exp())
    return layer.to(dtype)


YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_are_their_formula(interleaved, qk_norm, scaling, dtype):
    layer = storage_layer(qk_norm, interleaved, dtype=dtype)
    table = rope_table(8, 100, scaling=scaling)
    got = layer.attention.kv_scales(layer.attention_norm.weight, table)
    for actual, expected in zip(got, quantised.scales(layer, table), strict=True):
        assert actual.dtype == torch.float32 and actual.shape == (2, 8) and not actual.requires_grad
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_a_row_of_zeros_has_scale_one():
    layer = storage_layer(qk_norm=False)
    rows = layer.attention.qkv_proj.weight.unflatten(0, (-1, 8))[4:]
    with torch.no_grad():
        rows[0, 3] = rows[0, 7] = 0.0  # a rotated pair of keys
        rows[1, 3] = 0.0  # half a pair
        rows[2, 5] = 0.0  # a channel of values
        rows[3, 6] = 1e-38  # so small that float32 has no normal number for its scale
    k_scale, v_scale = layer.attention.kv_scales(layer.attention_norm.weight, rope_table(8, 4))
    assert k_scale[0, 3] == k_scale[0, 7] == v_scale[0, 5] == v_scale[1, 6] == 1.0
    expected = quantised.scales(layer, rope_table(8, 4))
    assert k_scale[1, 3] == k_scale[1, 7] and torch.isclose(k_scale[1, 3], expected[0][1, 3])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    qk_norm=st.booleans(),
    interleaved=st.booleans(),
    yarn=st.booleans(),
    size=st.floats(-6, 6),
    channel=st.integers(0, 31),
)
def test_no_key_and_no_value_is_beyond_the_scales(seed, qk_norm, interleaved, yarn, size, channel):
    """Random inputs, and those that reach the bound: along one row of the projection times the gain."""
    torch.manual_seed(seed)
    layer = storage_layer(qk_norm, interleaved)
    gain, rows = layer.attention_norm.weight, layer.attention.qkv_proj.weight[-32:]
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    x[0, :20] *= torch.randn(32, dtype=torch.float64).exp()
    x[0, 20:] = rows[channel] * gain
    table = rope_table(8, 100, scaling=YARN if yarn else None).double()
    k_scale, v_scale = layer.attention.kv_scales(gain, table)
    with torch.no_grad():
        _, (k, v) = layer.attention(layer.attention_norm(x * 10.0**size), table)
    bounds = 448 * k_scale.double(), 448 * v_scale.double()
    assert (k.abs() <= bounds[0] * (1 + 1e-6)).all() and (v.abs() <= bounds[1] * (1 + 1e-6)).all()
    if channel >= 16 and size >= 0:  # or the epsilon of the norm shows
        reached = (v.abs() / bounds[1]).flatten(2)[0, 20, channel - 16]
        assert reached > 0.99, "the bound is looser than its formula"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision_rounds_to_the_largest_e4m3_at_worst(qk_norm):
    layer = storage_layer(qk_norm, dtype=torch.bfloat16)
    gain, rows = layer.attention_norm.weight, layer.attention.qkv_proj.weight[-32:]
    x = (rows * gain)[None] * 100  # one token along each row
    table = rope_table(8, 100)
    scales = layer.attention.kv_scales(gain, table)
    _, keys_values = layer.attention(layer.attention_norm(x), table)
    for x, scale in zip(keys_values, scales, strict=True):
        assert (x.float().abs() < 464 * scale).all()  # half way from 448 to what would be the next number
    assert (keys_values[1].float().abs() / scales[1]).amax() > 440


def test_layers_are_bound_from_the_lowest_up():
    model = TwoLayers()
    plan = tiny.CrossLayerPlan("own", (LayerPlan((0,), (0,)), LayerPlan((1,), (1,)), PLAN))
    cache = PagedKVCache(tiny.config(plan, num_layers=3), 4, page_size=4, fp8_sources="only")
    table, x = rope_table(D, 64), torch.randn(4, 32)

    def run():
        rows = cache.add([4])
        step = cache.prefill_chunk(rows, [4])
        h = x.clone()
        try:
            for layer in model.layers:
                h = layer.cached(h, table, step)
        finally:
            cache.free(rows)
        return h

    with torch.no_grad(), pytest.raises(ValueError, match=r"scales of layer 0: expected .*bind.*got none"):
        run()
    with pytest.raises(ValueError, match=r"scales of layer 0: expected .*bind.*got none"):
        model.layers[2].bind(cache, table)
    for layer in model.layers[:2]:
        layer.bind(cache, table)
    with torch.no_grad(), pytest.raises(ValueError, match=r"weights: expected .*bind.*got none"):
        run()
    model.layers[2].bind(cache, table)
    with torch.no_grad():
        before = run()
        model.layers[1].attention.k_norm.weight.mul_(3.0)
        model.layers[1].attention.q_norm.weight.div_(3.0)  # the scores of layer 1 stay, those of layer 2 not
        model.layers[1].bind(cache, table)
        with pytest.raises(ValueError, match=r"weights: expected .*again.*got those for other scales"):
            run()
        model.layers[2].bind(cache, table)
        after = run()
        expected = quantised.run_layers(model.layers, x[None], table, (0, 1), "only")[0]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: StorageAttention(32, 4, 3, D),
            "StorageAttention: num_heads: expected a multiple .* 3, got 4",
        ),
        (lambda: StorageAttention(32, 0, 2, D), "StorageAttention: num_heads: expected .*got 0"),
        (lambda: StorageAttention(32, 4, 0, D), "StorageAttention: num_.*heads: expected "),
        (lambda: StorageAttention(0, 4, 2, D), "StorageAttention: hidden_size: expected .*got 0"),
        (lambda: StorageAttention(32, 4, 2, D, window=-1), "StorageAttention: window: expected .*got -1"),
        (
            lambda: ReconstructionAttention(32, 4, 2, 7, PLAN),
            "ReconstructionAttention: head_dim: .*even number, got 7",
        ),
        (lambda: ReconstructionAttention(32, 0, 2, D, PLAN), "ReconstructionAttention: num_heads: .*got 0"),
    ],
)
def test_attention_refuses_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change, argument",
    [
        (dict(x=torch.zeros(2, 9, 32)), "cos_sin"),  # longer than the table
        (dict(x=torch.zeros(2, 5, 31)), "x"),
        (dict(x=torch.zeros(5, 32)), "x"),
        (dict(cos_sin=rope_table(D + 2, 8)), "cos_sin"),
        (dict(cos_sin=rope_table(D // 2, 8)), "cos_sin"),
        (dict(bad=None), r"sources\[1\]"),
        (dict(bad=torch.zeros(2, 4, 2, D)), r"sources\[1\]"),
        (dict(bad=torch.zeros(1, 5, 2, D)), r"sources\[1\]"),
        (dict(bad=torch.zeros(2, 5, 1, D)), r"sources\[1\]"),
        (dict(bad=torch.zeros(2, 5, 2, 2 * D)), r"sources\[1\]"),
    ],
)
def test_attention_refuses_inputs_that_do_not_fit(change, argument):
    good = torch.zeros(2, 5, 2, D)
    inputs = dict(x=torch.zeros(2, 5, 32), cos_sin=rope_table(D, 8), bad=good)

    def storage(x, cos_sin, bad):
        StorageAttention(32, 4, 2, D)(x, cos_sin)

    def reconstruction(x, cos_sin, bad):
        sources = {0: (good, good)} if bad is None else {0: (good, good), 1: (good, bad)}
        ReconstructionAttention(32, 4, 2, D, PLAN)(x, cos_sin, sources)

    calls = {"StorageAttention": storage, "ReconstructionAttention": reconstruction}
    for name, call in calls.items():
        call(**inputs)
        if name == "ReconstructionAttention" or "bad" not in change:
            with pytest.raises(ValueError, match=f"{name}: {argument}: expected "):
                call(**{**inputs, **change})
