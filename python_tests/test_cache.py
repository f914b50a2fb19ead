import pytest
import tiny
import torch

from fusedkv_ext import CrossLayerPlan, LayerPlan, PagedKVCache
from fusedkv_ext.cache import FP8_SOURCES


def make(num_pages=6, page_size=4, max_batch=3, plan="fusedkv", **options) -> PagedKVCache:
    return PagedKVCache(tiny.config(plan), num_pages, page_size, max_batch, **options)


NBYTES_PLANS = {
    **tiny.PLANS,
    "fusedkv_2": CrossLayerPlan.fusedkv(6, n=2),
    "yoco_5": CrossLayerPlan.yoco(6, n=5),
}


@pytest.mark.parametrize("plan", NBYTES_PLANS.values(), ids=NBYTES_PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nbytes_is_the_papers_share_of_vanilla(plan, dtype):
    """The paper's Table 1: 2 S Hkv D elements a storage layer, where vanilla has 2 L S Hkv D."""
    config = tiny.config(plan)
    cache, vanilla = (PagedKVCache(c, 10, page_size=8, dtype=dtype) for c in (config, tiny.config("vanilla")))
    assert vanilla.nbytes == 2 * 6 * 80 * config.num_kv_heads * config.head_dim * dtype.itemsize
    assert cache.nbytes * 6 == vanilla.nbytes * len(plan.storage_layers)
    assert cache.vanilla_nbytes == vanilla.nbytes == vanilla.vanilla_nbytes
    assert cache.keys.keys() == cache.values.keys() == set(plan.storage_layers)


FP8_LAYERS = {  # the storage layers that another layer reads
    "cla": (0, 2, 4),
    "yoco": (2,),
    "fusedkv": (0, 2),
    "fusedkv_lite": (0, 2),
    "fusedkv_lite_learnable": (0, 2),
    "fusedkv_lite_rev": (0, 2),
    "dense_fusion": (0, 1, 2),
    "fusedkv_lite_1": (0,),
    "layer_types": (0, 1, 3),
}


@pytest.mark.parametrize("name", tiny.FP8_PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nbytes_with_sources_in_fp8(name, dtype):
    plan, sources = tiny.PLANS[name], FP8_LAYERS[name]
    caches = {mode: make(plan=plan, dtype=dtype, fp8_sources=mode) for mode in FP8_SOURCES}
    elements = 2 * 6 * 4 * 2 * 16  # of a layer: keys and values, pages, page size, Hkv, D
    stored = len(plan.storage_layers)
    assert caches["none"].nbytes == elements * stored * dtype.itemsize
    assert caches["copy"].nbytes == elements * (stored * dtype.itemsize + len(sources))
    assert caches["only"].nbytes == elements * ((stored - len(sources)) * dtype.itemsize + len(sources))
    assert caches["none"].fp8_layers == () and caches["only"].fp8_layers == sources
    assert caches["copy"].key_copies.keys() == caches["copy"].value_copies.keys() == set(sources)
    for cache in caches.values():
        assert cache.vanilla_nbytes == elements * 6 * dtype.itemsize and cache.dtype == dtype
        for layer in plan.storage_layers:
            alone = cache.fp8_sources == "only" and layer in sources
            expected = torch.float8_e4m3fn if alone else dtype
            assert cache.keys[layer].dtype == cache.values[layer].dtype == expected


def test_the_readmes_share_of_vanilla():
    """Half of the layers stored, two of them as sources of one byte: 1/2 - 1/L, or 1/2 + 1/L beside bf16."""
    for layers in (6, 10, 16):
        config = tiny.config("fusedkv", num_layers=layers)
        for mode, numerator in (("only", layers - 2), ("none", layers), ("copy", layers + 2)):
            cache = PagedKVCache(config, 3, dtype=torch.bfloat16, fp8_sources=mode)
            assert cache.nbytes * 2 * layers == cache.vanilla_nbytes * numerator


def test_pages_are_reserved_and_given_back():
    cache = make()
    first, second = cache.add([5, 16])
    assert (cache.capacity(first), cache.capacity(second), cache.num_free_pages) == (8, 16, 0)
    pages = cache.block_table[[first, second]]
    taken = pages[pages >= 0].tolist()
    assert sorted(taken) == list(range(6))
    cache.free([second])
    assert cache.num_free_pages == 4 and (cache.block_table[second] == -1).all()
    cache.extend(first, 20)
    assert cache.capacity(first) == 20 and cache.num_free_pages == 1
    assert cache.block_table[first, :2].tolist() == pages[0, :2].tolist(), "extending must keep old pages"
    cache.extend(first, 3)
    assert cache.capacity(first) == 20
    cache.free([first])
    assert cache.num_free_pages == 6


def test_a_full_cache_changes_nothing():
    cache = make(max_batch=4)
    row, _ = cache.add([9, 1])
    table = cache.block_table.clone()
    for action in (
        lambda: cache.add([4, 8]),  # the first of the two would fit
        lambda: cache.extend(row, 24),
    ):
        with pytest.raises(ValueError, match=r"cache full: expected at most 2 free pages.*got 3 pages"):
            action()
    assert cache.num_free_pages == 2 and torch.equal(cache.block_table, table)
    assert cache.add([4, 4]) == [2, 3]


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda cache: cache.add([]), "capacities: expected at least one sequence, got 0"),
        (lambda cache: cache.add([1, 1, 1]), "rows: expected 3 free sequences, got 2"),
        (lambda cache: cache.add([25]), "capacity: expected 1 to 24 tokens a sequence, got 25"),
        (lambda cache: cache.add([0]), "capacity: expected 1 to 24 tokens a sequence, got 0"),
        (lambda cache: cache.extend(2, 4), r"rows: expected rows in use, \[0\], got 2"),
        (lambda cache: cache.free([0, 0]), r"rows: expected different rows, got \[0, 0\]"),
        (lambda cache: cache.free([7]), r"rows: expected rows in use, \[0\], got 7"),
        (lambda cache: cache.length(1), r"rows: expected rows in use, \[0\], got 1"),
        (lambda cache: cache.prefill_chunk([0], [7]), "row 0: expected at most 8 tokens in its pages, got 9"),
        (lambda cache: cache.advance([0], [7]), "row 0: expected at most 8 tokens in its pages, got 9"),
        (lambda cache: cache.check_append([-1], [1]), r"rows: expected rows in use, \[0\], got -1"),
        (lambda cache: cache.check_append([0], [0]), r"counts: expected 1 positive numbers.*got \[0\]"),
        (lambda cache: cache.advance([0], [-1]), r"counts: expected 1 positive numbers.*got \[-1\]"),
        (lambda cache: cache.advance([0], [1, 1]), r"counts: expected 1 positive numbers.*got \[1, 1\]"),
        (lambda cache: cache.advance([0], []), r"counts: expected 1 positive numbers.*got \[\]"),
        (lambda cache: cache.prefill_chunk([0], [1, 2]), r"counts: expected 1 positive numbers"),
    ],
)
def test_bad_calls_change_nothing(action, message):
    cache = make()
    cache.add([5])
    cache.advance([0], [2])
    before = (cache.num_free_pages, cache.block_table.clone(), cache.seq_lens.clone())
    with pytest.raises(ValueError, match=message):
        action(cache)
    assert cache.num_free_pages == before[0] and cache.length(0) == 2
    assert torch.equal(cache.block_table, before[1]) and torch.equal(cache.seq_lens, before[2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_pages": 0}, "num_pages: expected an integer of at least 1, got 0"),
        ({"num_pages": True}, "num_pages: expected an integer of at least 1, got True"),
        ({"page_size": -1}, "page_size: expected an integer of at least 1, got -1"),
        ({"max_batch": 1.5}, r"max_batch: expected an integer of at least 1, got 1\.5"),
        ({"dtype": torch.int8}, r"dtype: expected .* on cpu, got torch\.int8"),
        ({"dtype": torch.float8_e4m3fn}, r"dtype: expected .* on cpu, got torch\.float8_e4m3fn"),
        ({"fp8_sources": "both"}, "fp8_sources: expected none or copy or only, got 'both'"),
        ({"fp8_sources": None}, "fp8_sources: expected none or copy or only, got None"),
        ({"fp8_sources": True}, "fp8_sources: expected none or copy or only, got True"),
        ({"fp8_sources": torch.float8_e4m3fn}, "fp8_sources: expected none or copy or only, got torch"),
        (
            {"fp8_sources": "copy", "plan": "vanilla"},
            "fp8_sources: expected none for the plan vanilla, in which no layer reads another, got 'copy'",
        ),
        (
            {"fp8_sources": "only", "plan": CrossLayerPlan.cla(6, factor=1)},
            "fp8_sources: expected none for the plan cla, .*got 'only'",
        ),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.cuda
def test_cuda_refuses_what_its_kernels_lack():
    with pytest.raises(ValueError, match=r"dtype: expected .* on cuda, got torch\.float32"):
        make(device="cuda")
    with pytest.raises(ValueError, match="head_dim: expected 64 or 128 on cuda, got 16"):
        make(device="cuda", dtype=torch.bfloat16)


def test_decode_step_finds_slots_and_advances(device):
    shape = dict(head_dim=64) if device == "cuda" else {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = tiny.config(CrossLayerPlan.vanilla(6), **shape)
    cache = PagedKVCache(config, 6, 4, 3, dtype=dtype, device=device)
    rows = cache.add([8, 8, 4])
    cache.advance(rows, [4, 7, 4])
    step = cache.decode_step(
        torch.tensor(rows, device=device), torch.tensor([True, False, True], device=device)
    )
    page = cache.block_table[0, 1].item()
    assert step.slot_mapping.tolist() == [page * 4, -1, -1], "row 1 is inactive, row 2 is full"
    assert step.positions.tolist() == [4, 7, 4]
    assert step.seq_lens.tolist() == [5, 0, 0] and cache.seq_lens.tolist() == [4, 7, 4]
    step.commit()
    assert cache.seq_lens.tolist() == [5, 7, 4]


def ones(**change) -> torch.Tensor:
    return torch.full((2, 16), **{"fill_value": 1.0, **change})


READER = torch.nn.Identity()  # any module: the cache uses it as a key only
TWO = CrossLayerPlan.fusedkv(6).layers[-1]


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda c: c.set_scales(1, ones(), ones()), r"layer: expected one held in e4m3, \(0, 2\), got 1"),
        (lambda c: c.set_scales(0, ones()[0], ones()), r"k_scale: .*float32 \[2, 16\].*got .*\[16\]"),
        (lambda c: c.set_scales(0, ones(), ones(dtype=torch.float64)), "v_scale: .*got torch.float64"),
        (lambda c: c.set_scales(0, ones(device="meta"), ones()), "k_scale: .*on cpu, got .*on meta"),
        (lambda c: c.set_scales(0, ones(), ones(fill_value=0.0)), "v_scale: expected positive finite"),
        (lambda c: c.set_scales(0, ones(fill_value=-2.0), ones()), "k_scale: expected positive finite"),
        (lambda c: c.set_scales(0, ones(), ones(fill_value=float("nan"))), "v_scale: expected positive"),
        (lambda c: c.set_scales(0, ones(), ones(fill_value=float("inf"))), "v_scale: expected positive"),
        (lambda c: c.write_arguments(0), "scales of layer 0: expected set_scales .*got none"),
        (lambda c: c.own(2), "scales of layer 2: expected set_scales .*got none"),
        (lambda c: c.set_weights(READER, TWO, None, None), "scales of layer 0: expected set_scales"),
        (lambda c: c.fused(READER), "weights: expected set_weights .*got none"),
        (
            lambda c: c.set_weights(READER, LayerPlan((5,), (0,)), None, None),
            r"plan: expected sources among layers \[0, 1, 2\], got \[5\]",
        ),
        (
            lambda c: c.set_weights(READER, LayerPlan((0,), (1,)), None, None),
            r"plan: expected sources held in e4m3, \(0, 2\), got \[1\]",
        ),
    ],
)
def test_a_step_without_scales_is_refused(action, message):
    cache = make(fp8_sources="only")
    with pytest.raises(ValueError, match="PagedKVCache: " + message):
        action(cache)
    assert cache.write_arguments(1)["k_scale"] is None, "a layer that nobody else reads needs no scales"


def test_scales_are_folded_into_the_weights():
    cache = make(fp8_sources="only")
    scales = {layer: (torch.rand(2, 16) + 0.1, torch.rand(2, 16) + 0.1) for layer in (0, 2)}
    for layer in (0, 2):
        cache.set_scales(layer, *scales[layer])
    a, b = torch.randn(2, 2, 2, 16)
    cache.set_weights(READER, TWO, a, b)
    fused = cache.fused(READER)
    assert torch.equal(fused.key_weights, torch.stack((a[0] * scales[0][0], a[1] * scales[2][0])))
    assert torch.equal(fused.value_weights, torch.stack((b[0] * scales[0][1], b[1] * scales[2][1])))
    assert [x.data_ptr() for x in fused.keys] == [cache.keys[i].data_ptr() for i in (0, 2)]
    assert [x.data_ptr() for x in fused.values] == [cache.values[i].data_ptr() for i in (0, 2)]
    cache.set_weights(other := torch.nn.Identity(), LayerPlan((2,), (0,)), None, None)
    assert torch.equal(cache.fused(other).key_weights, scales[2][0][None])
    assert torch.equal(cache.fused(other).value_weights, scales[0][1][None])
    assert torch.equal(cache.own(0).key_weights, scales[0][0][None])


def test_scales_change_only_while_the_cache_is_empty():
    """Tokens in e4m3 mean nothing without the scales that they were written with."""
    cache = make(fp8_sources="copy")
    for layer in (0, 2):
        cache.set_scales(layer, ones(), ones())
    cache.set_weights(READER, TWO, None, None)
    held = cache.fused(READER)
    rows = cache.add([5])
    cache.advance(rows, [3])
    cache.set_scales(0, ones(), ones())  # the same again
    with pytest.raises(ValueError, match=r"scales of layer 0: .*until all rows are freed.*with 3 tok"):
        cache.set_scales(0, ones(fill_value=2.0), ones())
    assert torch.equal(cache.scales(0)[0], ones()) and torch.equal(cache.fused(READER).key_weights[0], ones())
    cache.free(rows)
    cache.set_scales(0, ones(fill_value=2.0), ones())
    with pytest.raises(ValueError, match=r"weights: expected set_weights .*got those for other scales"):
        cache.fused(READER)
    address = held.key_weights.data_ptr()
    cache.set_weights(READER, TWO, None, None)
    assert torch.equal(held.key_weights, torch.stack((ones(fill_value=2.0), ones())))
    assert cache.fused(READER).key_weights.data_ptr() == address, "a captured graph reads this address"


def test_kept_weights_are_copies():
    """The cache must not write its products into a parameter, nor follow one."""
    cache, weights = make(), torch.randn(2, 2, 16)
    expected = weights.clone()
    cache.set_weights(READER, TWO, weights, weights)
    cache.set_weights(READER, TWO, torch.zeros_like(weights), torch.zeros_like(weights))
    assert torch.equal(weights, expected)
    cache.set_weights(READER, TWO, weights, weights)
    weights.zero_()
    assert torch.equal(cache.fused(READER).value_weights, expected)


def test_weights_set_in_inference_mode_can_be_set_outside_of_it():
    cache = make(fp8_sources="only")
    for value, inference in ((1.0, True), (2.0, False)):
        with torch.inference_mode(inference):
            for layer in (0, 2):
                cache.set_scales(layer, ones(fill_value=value), ones())
            cache.set_weights(READER, TWO, None, None)
    assert torch.equal(cache.fused(READER).key_weights, ones(fill_value=2.0).expand(2, 2, 16))
