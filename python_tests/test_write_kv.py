import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x
from rope_cases import op_checks

HALF = [torch.float16, torch.bfloat16]
E4M3 = torch.float8_e4m3fn
LAYOUTS = ["contiguous", "packed", "packed_heads", "hnd"]
write_kv = torch.ops.fusedkv.write_kv


def poison(*shape, dtype, device):
    """A tensor whose every byte is 0xff: NaN in each floating dtype."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device).view(dtype).view(shape)


def poison_like(x):
    return poison(*x.shape, dtype=x.dtype, device="cpu")


def make_caches(layout, pages, page_size, heads, d, dtype, device):
    """Poisoned K and V caches [pages, page_size, heads, d] in one of the layouts."""

    def new(*shape):
        return poison(*shape, dtype=dtype, device=device)

    if layout == "packed":
        return new(pages, page_size, 2, heads, d).unbind(2)
    if layout == "packed_heads":
        return new(pages, page_size, heads, 2 * d).split(d, -1)
    if layout == "hnd":
        return tuple(new(pages, heads, page_size, d).transpose(1, 2) for _ in range(2))
    return new(pages, page_size, heads, d), new(pages, page_size, heads, d)


def scattered_slots(tokens, num_slots, device):
    """Distinct slots, of which some are replaced by -1 and by slots outside the cache."""
    slots = torch.randperm(num_slots)[:tokens]
    for token, bad in enumerate((-1, num_slots, -2, 2**40, -(2**63))):
        slots[token * 3 : token * 3 + 1] = bad
    return slots.to(device)


def bits(x):
    return x.contiguous().view(torch.uint8)


def check_cache(x, cache, slots, scale):
    """Compare the written slots with x / scale, and every other bit with the poison."""
    num_slots = cache.shape[0] * cache.shape[1]
    written = torch.zeros(num_slots, dtype=torch.bool)
    kept = (slots >= 0) & (slots < num_slots)
    written[slots[kept].cpu()] = True
    exact, same = poison(*cache.shape, dtype=torch.float64, device="cpu"), poison_like(cache)
    wide = x.double() if scale is None else x.double() / scale.double()
    plain = x if scale is None else x / scale.to(x.dtype)
    exact.flatten(0, 1)[slots[kept].cpu()] = wide[kept].cpu()
    same.flatten(0, 1)[slots[kept].cpu()] = plain[kept].cpu().to(cache.dtype)
    assert_close_2x(cache.float(), exact, same.float())
    rows = cache.cpu().flatten(0, 1)
    assert (bits(rows[~written]) == 0xFF).all(), "a slot that no token names was written"
    if scale is None:
        assert torch.equal(bits(rows[written]), bits(same.flatten(0, 1)[written]))


def check_against_oracle(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None, k_copy=None, v_copy=None):
    """Run the op on poisoned caches and compare them, and the copies, to which the scales then belong."""
    write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale, k_copy, v_copy)
    for x, cache, copy, scale in ((k, k_cache, k_copy, k_scale), (v, v_cache, v_copy, v_scale)):
        check_cache(x, cache, slots, scale if copy is None else None)
        if copy is not None:
            check_cache(x, copy, slots, scale)


@pytest.mark.parametrize("page_size", [1, 16, 64, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_matches_oracle(device, dtype, fp8, layout, page_size):
    tokens, heads, d = 37, 3, 64
    caches = make_caches(layout, 130 // page_size + 1, page_size, heads, d, E4M3 if fp8 else dtype, device)
    k, v = torch.randn(2, tokens, heads, d, device=device, dtype=dtype)
    slots = scattered_slots(tokens, caches[0].shape[0] * page_size, device)
    check_against_oracle(k, v, *caches, slots)


@pytest.mark.parametrize("scaled", ["k", "v", "kv"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_scales_divide(device, dtype, fp8, scaled):
    heads, d = 2, 128
    caches = make_caches("contiguous", 3, 16, heads, d, E4M3 if fp8 else dtype, device)
    k, v = torch.randn(2, 20, heads, d, device=device, dtype=dtype)
    k_scale, v_scale = torch.rand(2, heads, d, device=device) + 0.25
    slots = torch.randperm(48, device=device)[:20]
    check_against_oracle(
        k, v, *caches, slots, k_scale if "k" in scaled else None, v_scale if "v" in scaled else None
    )


@pytest.mark.parametrize("tokens", [20, 1200])  # few and many to the CUDA launch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_copies(device, dtype, scaled, layout, tokens):
    heads, d = 8, 128
    pages = tokens // 16 + 2
    caches = make_caches("packed", pages, 16, heads, d, dtype, device)
    copies = make_caches(layout, pages, 16, heads, d, E4M3, device)
    k, v = torch.randn(2, tokens, heads, d, device=device, dtype=dtype)
    scales = torch.rand(2, heads, d, device=device) + 0.25 if scaled else (None, None)
    check_against_oracle(k, v, *caches, scattered_slots(tokens, pages * 16, device), *scales, *copies)


@pytest.mark.parametrize("dtype", HALF)
def test_fp8_saturates_and_keeps_nan(device, dtype):
    values = [1e4, -1e4, float("inf"), -float("inf"), 448.0, 460.0, float("nan"), 1.0]
    expected = [448.0, -448.0, 448.0, -448.0, 448.0, 448.0, float("nan"), 1.0]
    x = torch.tensor(values, dtype=dtype, device=device).repeat(1, 1, 2)
    k_cache, v_cache = make_caches("contiguous", 1, 1, 1, 16, E4M3, device)
    write_kv(x, x, k_cache, v_cache, torch.zeros(1, dtype=torch.int64, device=device))
    for cache in (k_cache, v_cache):
        torch.testing.assert_close(
            cache.float().cpu().flatten(), torch.tensor(expected * 2), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("slots", [[], [-1, -1, -1], [64, 2**62, -(2**62)]])
@pytest.mark.parametrize("pages", [0, 4])
def test_nothing_to_write(device, slots, pages):
    caches = make_caches("contiguous", pages, 16, 2, 64, torch.bfloat16, device)
    k, v = torch.randn(2, len(slots), 2, 64, device=device, dtype=torch.bfloat16)
    write_kv(k, v, *caches, torch.tensor(slots, dtype=torch.int64, device=device))
    assert all((bits(cache) == 0xFF).all() for cache in caches)


def strided_inputs(kind, tokens, heads, d, device):
    if kind == "slice of a packed projection":
        _, k, v = torch.randn(tokens, 7 + 2 * heads, d, device=device).half().split([7, heads, heads], 1)
    elif kind == "heads first":
        k, v = torch.randn(2, heads, tokens, d, device=device).half().transpose(1, 2)
    elif kind == "misaligned start":
        k, v = (
            torch.randn(2, tokens * heads * d + 1, device=device).half()[:, 1:].unflatten(1, (-1, heads, d))
        )
    else:
        k, v = torch.randn(2, tokens, heads, d + 3, device=device).half()[..., :d]
    return k, v


@pytest.mark.parametrize(
    "kind", ["slice of a packed projection", "heads first", "misaligned start", "misaligned heads"]
)
def test_strided_inputs(device, kind):
    k, v = strided_inputs(kind, 11, 2, 64, device)
    caches = make_caches("hnd", 2, 16, 2, 64, torch.float16, device)
    check_against_oracle(k, v, *caches, scattered_slots(11, 32, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_takes_wide_dtypes(dtype):
    k, v = torch.randn(2, 9, 2, 6, dtype=dtype)
    caches = make_caches("packed", 3, 5, 2, 6, dtype, "cpu")
    k_copy, v_copy = make_caches("packed", 3, 5, 2, 6, E4M3, "cpu")
    check_against_oracle(k, v, *caches, scattered_slots(9, 15, "cpu"), k_copy=k_copy, v_copy=v_copy)


def good_arguments(device):
    k, v = torch.randn(2, 5, 2, 64, device=device).half()
    k_cache, v_cache = make_caches("contiguous", 2, 16, 2, 64, torch.float16, device)
    k_copy, v_copy = make_caches("hnd", 2, 16, 2, 64, E4M3, device)
    return {
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": torch.arange(5, device=device),
        "k_scale": torch.ones(2, 64, device=device),
        "v_scale": torch.ones(2, 64, device=device),
        "k_copy": k_copy,
        "v_copy": v_copy,
    }


BAD = {
    "k dtype": ("k", lambda x: x.long(), "k: expected dtype .*float16.*, got int64"),
    "k rank": ("k", lambda x: x[0], r"k: expected shape \[\*, \*, \*\], got \[2, 64\]"),
    "v dtype": ("v", lambda x: x.bfloat16(), "v: expected dtype float16, got bfloat16"),
    "v tokens": ("v", lambda x: x[:4], r"v: expected shape \[5, 2, 64\], got \[4, 2, 64\]"),
    "v heads": ("v", lambda x: x[:, :1], r"v: expected shape \[5, 2, 64\], got \[5, 1, 64\]"),
    "v stride": (
        "v",
        lambda x: x.repeat(1, 1, 2)[..., ::2],
        "v: expected stride 1 in the last dimension, got 2",
    ),
    "k_cache rank": ("k_cache", lambda x: x[0], "k_cache: expected "),
    "k_cache dtype": ("k_cache", lambda x: x.bfloat16(), "k_cache: expected dtype .*float16.*, got bfloat16"),
    "k_cache head dim": (
        "k_cache",
        lambda x: x[..., :32],
        r"k_cache: expected shape .*2, 64\], got .*2, 32\]",
    ),
    "v_cache dtype": ("v_cache", lambda x: x.to(E4M3), "v_cache: expected dtype float16, got float8_e4m3fn"),
    "v_cache pages": (
        "v_cache",
        lambda x: x[:1],
        r"v_cache: expected shape \[2, 16, 2, 64\], got \[1, 16, 2, 64\]",
    ),
    "v_cache heads": ("v_cache", lambda x: x[:, :, :1], r"v_cache: expected shape .*2, 64\], got .*1, 64\]"),
    "v_cache stride": (
        "v_cache",
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        "v_cache: expected stride 1 in the last dimension, got 2",
    ),
    "v_cache device": ("v_cache", lambda x: x.to("meta"), "v_cache: expected device .*, got meta"),
    "slot_mapping dtype": (
        "slot_mapping",
        lambda x: x.int(),
        "slot_mapping: expected dtype int64, got int32",
    ),
    "slot_mapping size": ("slot_mapping", lambda x: x[:3], r"slot_mapping: expected shape \[5\], got \[3\]"),
    "slot_mapping device": (
        "slot_mapping",
        lambda x: x.to("meta"),
        "slot_mapping: expected device .*, got meta",
    ),
    "k_scale dtype": ("k_scale", lambda x: x.half(), "k_scale: expected dtype float32, got float16"),
    "v_scale shape": ("v_scale", lambda x: x[0], r"v_scale: expected shape \[2, 64\], got \[64\]"),
    "k_copy alone": ("v_copy", lambda x: None, "k_copy, v_copy: expected both or none of them, got"),
    "k_copy dtype": ("k_copy", lambda x: x.half(), "k_copy: expected dtype float8_e4m3fn, got float16"),
    "k_copy pages": (
        "k_copy",
        lambda x: x[1:],
        r"k_copy: expected shape \[2, 16, 2, 64\], got \[1, 16, 2, 64\]",
    ),
    "v_copy heads": ("v_copy", lambda x: x[:, :, :1], r"v_copy: expected shape .*2, 64\], got .*1, 64\]"),
    "v_copy stride": (
        "v_copy",
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        "v_copy: expected stride 1 in the last dimension, got 2",
    ),
    "v_copy device": ("v_copy", lambda x: x.to("meta"), "v_copy: expected device .*, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(device, case):
    name, spoil, message = BAD[case]
    arguments = good_arguments(device)
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match="^write_kv: " + message):
        write_kv(**arguments)
    for name in ("k_cache", "v_cache", "k_copy", "v_copy"):
        cache = arguments[name]
        unwritten = cache is None or cache.is_meta or cache.float().isnan().all()
        assert unwritten, f"{name} was written in spite of the error"


def test_copies_beside_fp8_caches(device):
    arguments = good_arguments(device)
    caches = make_caches("contiguous", 2, 16, 2, 64, E4M3, device)
    arguments |= zip(("k_cache", "v_cache"), caches, strict=True)
    with pytest.raises(ValueError, match="write_kv: k_cache: expected the dtype of the input beside"):
        write_kv(**arguments)
    assert all((bits(cache) == 0xFF).all() for cache in (*caches, arguments["k_copy"], arguments["v_copy"]))


@pytest.mark.cuda
@pytest.mark.parametrize("d, width", [(64, 68), (12, 12)])
def test_cuda_needs_aligned_caches(d, width):
    cache = torch.zeros(2, 16, 2, width, device="cuda").half()[..., :d]
    k = torch.zeros(3, 2, d, device="cuda").half()
    with pytest.raises(ValueError, match=r"write_kv: k(_cache)?: expected .*multiple"):
        write_kv(k, k, cache, cache.clone(), torch.arange(3, device="cuda"))


@pytest.mark.parametrize("copied", [False, True])
def test_opcheck(device, copied):
    arguments = good_arguments(device)
    if not copied:
        arguments |= {"k_copy": None, "v_copy": None}
    torch.library.opcheck(write_kv.default, (), arguments, test_utils=op_checks(fp8=copied))


def test_meta_tensors():
    write_kv(**good_arguments("meta"))


def test_two_runs_give_the_same_bits(device):
    k, v = torch.randn(2, 300, 4, 64, device=device).bfloat16()
    scale = torch.rand(4, 64, device=device) + 0.5
    slots = torch.randperm(320, device=device)[:300]
    runs = []
    for _ in range(2):
        caches = make_caches("contiguous", 20, 16, 4, 64, E4M3, device)
        write_kv(k, v, *caches, slots, scale, scale)
        runs.append([bits(cache) for cache in caches])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("copied", [False, True])
def test_compiles_into_one_graph(device, copied):
    def step(x, k_cache, v_cache, slots, *copies):
        k, v = (x * 2).chunk(2, 1)
        write_kv(k, v, k_cache, v_cache, slots, None, None, *copies)
        return k_cache[0].float().sum(), v + 1

    backend = "aot_eager" if device == "cpu" else "inductor"
    x = torch.randn(6, 4, 64, device=device).half()
    slots = torch.arange(6, device=device)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        caches = [torch.zeros(1, 16, 2, 64, device=device).half() for _ in range(2)]
        copies = [cache.to(E4M3) for cache in caches] * copied
        results.append([*run(x, *caches, slots, *copies), *caches, *(copy.float() for copy in copies)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 6),
    d=st.integers(1, 17).map(lambda n: 16 * n),
    page_size=st.integers(1, 70),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(HALF),
    fp8=st.sampled_from(["none", "caches", "copies"]),
)
def test_any_shape(device, tokens, heads, d, page_size, layout, dtype, fp8):
    shape = (tokens // page_size + 1, page_size, heads, d)
    caches = make_caches(layout, *shape, E4M3 if fp8 == "caches" else dtype, device)
    k_copy, v_copy = make_caches("hnd", *shape, E4M3, device) if fp8 == "copies" else (None, None)
    k, v = torch.randn(2, tokens, heads, d, device=device, dtype=dtype)
    slots = scattered_slots(tokens, caches[0].shape[0] * page_size, device)
    check_against_oracle(k, v, *caches, slots, k_copy=k_copy, v_copy=v_copy)


@pytest.mark.cuda
def test_offsets_beyond_32_bits():
    page_stride, heads, d = 2**31 + 64, 1, 64
    storage = torch.zeros(page_stride + heads * d, dtype=torch.uint8, device="cuda")
    cache = storage.view(E4M3).as_strided((2, 1, heads, d), (page_stride, d, d, 1))
    k = torch.randn(1, heads, d, device="cuda").half()
    other = torch.zeros(2, 1, heads, d, device="cuda").to(E4M3)
    write_kv(k, k, cache, other, torch.ones(1, dtype=torch.int64, device="cuda"))
    assert torch.equal(bits(cache[1]), bits(k.to(E4M3)))


@pytest.mark.cuda
def test_graph_replays_with_new_slots():
    k, v = torch.randn(2, 4, 2, 64, device="cuda").half()
    caches = make_caches("contiguous", 4, 16, 2, 64, torch.float16, "cuda")
    copies = make_caches("contiguous", 4, 16, 2, 64, E4M3, "cuda")
    slots = torch.full((4,), -1, device="cuda")
    write_kv(k, v, *caches, slots, None, None, *copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_kv(k, v, *caches, slots, None, None, *copies)
    for first in (0, 30):
        slots.copy_(torch.arange(first, first + 4))
        graph.replay()
        for x, cache in zip((k, v) * 2, (*caches, *copies), strict=True):
            assert torch.equal(bits(cache.flatten(0, 1)[first : first + 4]), bits(x.to(cache.dtype)))
