import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x

HALF = [torch.float16, torch.bfloat16]
fuse_kv = torch.ops.fusedkv.fuse_kv
fuse_kv_backward = torch.ops.fusedkv.fuse_kv_backward


def make_sides(shape, num_k, num_v, dtype, device):
    """k_sources, v_sources, key_weights, value_weights of random values."""
    k_sources = list(torch.randn(num_k, *shape, device=device).to(dtype))
    v_sources = list(torch.randn(num_v, *shape, device=device).to(dtype))
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    key_weights = torch.randn(num_k, *shape[-2:], device=device, dtype=weight_dtype)
    value_weights = torch.randn(num_v, *shape[-2:], device=device, dtype=weight_dtype)
    return k_sources, v_sources, key_weights, value_weights


def convert(arguments, dtype, weight_dtype=None):
    k_sources, v_sources, key_weights, value_weights = arguments
    return (
        [s.to(dtype) for s in k_sources],
        [s.to(dtype) for s in v_sources],
        key_weights.to(weight_dtype or dtype),
        value_weights.to(weight_dtype or dtype),
    )


def plain_sum(sources, weights):
    total = weights[0] * sources[0]
    for w, s in zip(weights[1:], sources[1:], strict=True):
        total = total + w * s
    return total


def plain_fuse(k_sources, v_sources, key_weights, value_weights):
    return plain_sum(k_sources, key_weights), plain_sum(v_sources, value_weights)


def check_forward(arguments):
    dtype = arguments[0][0].dtype
    exact, same = plain_fuse(*convert(arguments, torch.float64)), plain_fuse(*convert(arguments, dtype))
    for out, want, plain in zip(fuse_kv(*arguments), exact, same, strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        assert_close_2x(out, want, plain)


def check_backward(arguments):
    dtype, shape = arguments[0][0].dtype, arguments[0][0].shape
    grads = [torch.randn(shape, device=arguments[2].device).to(dtype) for _ in range(2)]
    actual = fuse_kv_backward(*grads, *arguments)
    for side in range(2):
        sources, weights, grad = arguments[side], arguments[2 + side], grads[side]
        for s, weight in enumerate(weights):
            assert actual[side][s].dtype == dtype
            assert_close_2x(actual[side][s], weight.double() * grad.double(), weight.to(dtype) * grad)
        rows = (-1, *shape[-2:])
        exact = torch.stack([(grad.double() * s.double()).reshape(rows).sum(0) for s in sources])
        plain = torch.stack([(grad.float() * s.float()).reshape(rows).sum(0) for s in sources])
        assert actual[2 + side].dtype == weights.dtype and actual[2 + side].shape == weights.shape
        assert_close_2x(actual[2 + side], exact, plain)


@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (7, 2, 64), (2, 33, 3, 40), (2, 64), (300, 8, 128), (5, 36, 88)]
)
@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (1, 2), (2, 1), (3, 4), (8, 5)])
@pytest.mark.parametrize("dtype", HALF)
def test_matches_oracle(device, dtype, counts, shape):
    arguments = make_sides(shape, *counts, dtype, device)
    check_forward(arguments)
    check_backward(arguments)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    heads=st.integers(1, 6),
    d=st.integers(1, 17).map(lambda n: 8 * n),
    num_k=st.integers(1, 8),
    num_v=st.integers(1, 8),
    dtype=st.sampled_from(HALF),
)
def test_any_shape(device, leading, heads, d, num_k, num_v, dtype):
    arguments = make_sides((*leading, heads, d), num_k, num_v, dtype, device)
    check_forward(arguments)
    check_backward(arguments)


def test_many_rows(device):
    arguments = make_sides((2, 4099, 2, 64), 2, 2, torch.bfloat16, device)
    check_forward(arguments)
    check_backward(arguments)


@pytest.mark.parametrize("shape", [(0, 2, 64), (3, 0, 2, 64)])
def test_no_rows(device, shape):
    arguments = make_sides(shape, 2, 1, torch.bfloat16, device)
    k, v = fuse_kv(*arguments)
    assert k.shape == v.shape == shape
    grad_k, grad_v, grad_a, grad_b = fuse_kv_backward(k, v, *arguments)
    assert [g.shape for g in (*grad_k, *grad_v)] == [torch.Size(shape)] * 3
    assert not grad_a.any() and not grad_b.any()


def strided_source(kind, rows, heads, d, device):
    if kind == "slice of a packed projection":
        return torch.randn(rows, 9, d, device=device).half()[:, 2 : 2 + heads]
    if kind == "rows that do not flatten":
        return torch.randn(2, rows, heads, d, device=device).half()[:, : rows // 2]
    if kind == "sequence first":
        return torch.randn(rows, 2, heads, d, device=device).half().transpose(0, 1)
    if kind == "misaligned start":
        return torch.randn(rows * heads * d + 1, device=device).half()[1:].view(rows, heads, d)
    if kind == "misaligned rows":
        return torch.randn(rows, heads * d + 3, device=device).half()[:, : heads * d].unflatten(1, (heads, d))
    if kind == "expanded inner rows":
        return torch.randn(2, 1, heads, d, device=device).half().expand(2, rows, heads, d)
    return torch.randn(1, heads, d, device=device).half().expand(rows, heads, d)


@pytest.mark.parametrize(
    "kind",
    [
        "slice of a packed projection",
        "rows that do not flatten",
        "sequence first",
        "misaligned start",
        "misaligned rows",
        "expanded rows",
        "expanded inner rows",
    ],
)
def test_strided_sources(device, kind):
    odd = strided_source(kind, 10, 3, 64, device)
    k_sources, v_sources, key_weights, value_weights = make_sides(odd.shape, 2, 2, torch.float16, device)
    arguments = ([odd, k_sources[1]], [v_sources[0], odd], key_weights, value_weights)
    check_forward(arguments)
    check_backward(arguments)


def test_strided_weights(device):
    k_sources, v_sources, *_ = make_sides((6, 2, 64), 2, 2, torch.float16, device)
    key_weights, value_weights = torch.randn(2, 2, 4, 67, device=device)[:, :, 1:3, 3:]
    check_forward((k_sources, v_sources, key_weights, value_weights))
    check_backward((k_sources, v_sources, key_weights, value_weights))


@pytest.mark.parametrize("dtype", HALF)
def test_selecting_weights_give_lite(device, dtype):
    """FusedKV with a = (0, 1) and b = (1, 0) is FusedKV-Lite: K_n and V_1, bit for bit."""
    k_sources, v_sources, *_ = make_sides((50, 4, 64), 2, 2, dtype, device)
    zero, one = torch.zeros(4, 64, device=device), torch.ones(4, 64, device=device)
    k, v = fuse_kv(k_sources, v_sources, torch.stack((zero, one)), torch.stack((one, zero)))
    assert torch.equal(k.view(torch.int16), k_sources[1].view(torch.int16))
    assert torch.equal(v.view(torch.int16), v_sources[0].view(torch.int16))


def test_nan_stays_in_its_row(device):
    arguments = make_sides((20, 2, 64), 2, 2, torch.bfloat16, device)
    arguments[0][1][7] = float("nan")
    k, v = fuse_kv(*arguments)
    assert k[7].isnan().all() and not v.isnan().any()
    assert not k[torch.arange(20, device=device) != 7].isnan().any()


def leaves(arguments):
    return [x.requires_grad_() for x in (*arguments[0], *arguments[1], arguments[2], arguments[3])]


def test_autograd_matches_plain_torch(device):
    arguments = make_sides((2, 17, 2, 64), 2, 2, torch.bfloat16, device)
    grads = torch.randn(2, 2, 17, 2, 64, device=device)
    outs = fuse_kv(*arguments)  # no gradient is asked for yet
    assert not any(out.requires_grad for out in outs)

    def gradients(arguments, fuse):
        inputs = leaves(arguments)
        k, v = fuse(*arguments)
        return torch.autograd.grad(
            (k * grads[0].to(k.dtype)).sum() + (v * grads[1].to(v.dtype)).sum(), inputs
        )

    def detached(dtype, weight_dtype=None):
        copy = convert(arguments, dtype, weight_dtype)
        return (
            [s.detach() for s in copy[0]],
            [s.detach() for s in copy[1]],
            copy[2].detach(),
            copy[3].detach(),
        )

    grads = grads.bfloat16().double()
    actual = gradients(detached(torch.bfloat16, torch.float32), fuse_kv)
    exact = gradients(detached(torch.float64), plain_fuse)
    same = gradients(detached(torch.bfloat16), plain_fuse)
    for got, want, rough in zip(actual, exact, same, strict=True):
        assert_close_2x(got, want, rough)


def test_expanded_and_missing_gradients(device):
    arguments = make_sides((5, 2, 64), 2, 1, torch.float16, device)
    inputs = leaves(arguments)
    k, _ = fuse_kv(*arguments)
    grads = torch.autograd.grad(k.sum(), inputs)  # the gradient of k is an expanded one, that of v is absent
    torch.testing.assert_close(grads[0], arguments[2][0].half().expand(5, 2, 64))
    assert not grads[2].any() and not grads[4].any()
    total = torch.stack(arguments[0]).detach().double().sum(1)
    torch.testing.assert_close(grads[3].double(), total, rtol=1e-6, atol=1e-5)


def test_gradcheck():
    arguments = make_sides((3, 2, 4), 2, 3, torch.float64, "cpu")

    def flat(k1, k2, v1, v2, v3, key_weights, value_weights):
        return fuse_kv([k1, k2], [v1, v2, v3], key_weights, value_weights)

    assert torch.autograd.gradcheck(flat, leaves(arguments))


def test_opcheck(device):
    arguments = make_sides((2, 6, 2, 64), 2, 1, torch.bfloat16, device)
    grads = torch.randn(2, 2, 6, 2, 64, device=device).bfloat16()
    torch.library.opcheck(fuse_kv_backward.default, (*grads, *arguments))
    leaves(arguments)
    torch.library.opcheck(fuse_kv.default, arguments)


def test_two_runs_give_the_same_bits(device):
    arguments = make_sides((3000, 4, 64), 2, 2, torch.bfloat16, device)
    grads = torch.randn(2, 3000, 4, 64, device=device).bfloat16()
    runs = [fuse_kv_backward(*grads, *arguments) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_compiles_into_one_graph_with_backward(device):
    def loss(k_sources, v_sources, key_weights, value_weights):
        k, v = fuse_kv([s * 2 for s in k_sources], v_sources, key_weights, value_weights)
        return (k.float() * v.float().sin()).sum()

    backend = "aot_eager" if device == "cpu" else "inductor"
    results = []
    arguments = make_sides((6, 2, 64), 2, 2, torch.bfloat16, device)
    inputs = leaves(arguments)
    for run in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        value = run(*arguments)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


BAD = {
    "no key source": ("k_sources", lambda x: [], "k_sources: expected 1 to 8 tensors, got 0"),
    "no value source": ("v_sources", lambda x: [], "v_sources: expected 1 to 8 tensors, got 0"),
    "nine sources": ("v_sources", lambda x: x[:1] * 9, "v_sources: expected 1 to 8 tensors, got 9"),
    "dtype": (
        "k_sources",
        lambda x: [s.int() for s in x],
        r"k_sources\[0\]: expected .*dtype.*, got .*int32",
    ),
    "rank": (
        "k_sources",
        lambda x: [s[0, 0] for s in x],
        r"k_sources\[0\]: expected at least 2 dimensions, got 1",
    ),
    "mixed dtypes": (
        "k_sources",
        lambda x: [x[0], x[1].bfloat16()],
        r"k_sources\[1\]: expected dtype float16, got bfloat16",
    ),
    "value dtype": (
        "v_sources",
        lambda x: [s.bfloat16() for s in x],
        r"v_sources\[0\]: expected dtype float16, got bfloat16",
    ),
    "rows": (
        "k_sources",
        lambda x: [x[0], x[1][:3]],
        r"k_sources\[1\]: expected shape \[5, 2, 64\], got \[3, 2, 64\]",
    ),
    "heads": (
        "v_sources",
        lambda x: [s[:, :1] for s in x],
        r"v_sources\[0\]: expected shape .*2, 64\], got .*1, 64\]",
    ),
    "last stride": (
        "v_sources",
        lambda x: [x[0], x[1].repeat(1, 1, 2)[..., ::2]],
        r"v_sources\[1\]: expected stride 1 in the last dimension, got 2",
    ),
    "gaps between heads": (
        "v_sources",
        lambda x: [x[0], x[1].repeat(1, 1, 2)[..., :64]],
        r"v_sources\[1\]: expected heads packed without gaps, got ",
    ),
    "source device": (
        "k_sources",
        lambda x: [x[0], x[1].to("meta")],
        r"k_sources\[1\]: expected device .*, got meta",
    ),
    "weights dtype": ("key_weights", lambda x: x.half(), "key_weights: expected dtype float32, got float16"),
    "weights count": (
        "key_weights",
        lambda x: x[:1],
        r"key_weights: expected shape \[2, 2, 64\], got \[1, 2, 64\]",
    ),
    "weights shape": ("value_weights", lambda x: x[0], r"value_weights: expected shape .*, got \[2, 64\]"),
    "weights device": (
        "value_weights",
        lambda x: x.to("meta"),
        "value_weights: expected device .*, got meta",
    ),
}


def named(device):
    names = ("k_sources", "v_sources", "key_weights", "value_weights")
    return dict(zip(names, make_sides((5, 2, 64), 2, 2, torch.float16, device), strict=True))


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(device, case):
    name, spoil, message = BAD[case]
    arguments = named(device)
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match="^fuse_kv: " + message):
        fuse_kv(**arguments)
    grad = torch.zeros(5, 2, 64, device=device).half()
    with pytest.raises(ValueError, match="^fuse_kv(_backward)?: " + message):
        fuse_kv_backward(grad, grad, **arguments)


@pytest.mark.parametrize(
    "grad, message",
    [
        (torch.zeros(5, 2, 64), "expected dtype float16, got float32"),
        (torch.zeros(4, 2, 64).half(), r"expected shape \[5, 2, 64\], got \[4, 2, 64\]"),
        (torch.zeros(5, 2, 64, device="meta").half(), "expected device .*, got meta"),
    ],
)
def test_bad_gradient(device, grad, message):
    good = torch.zeros(5, 2, 64, device=device).half()
    bad = grad if grad.is_meta else grad.to(device)
    with pytest.raises(ValueError, match="^fuse_kv_backward: grad_k: " + message):
        fuse_kv_backward(bad, good, **named(device))
    with pytest.raises(ValueError, match="^fuse_kv_backward: grad_v: " + message):
        fuse_kv_backward(good, bad, **named(device))


@pytest.mark.cuda
def test_cuda_needs_head_dims_of_8():
    arguments = make_sides((5, 2, 12), 1, 1, torch.float16, "cuda")
    with pytest.raises(
        ValueError, match=r"fuse_kv: k_sources\[0\]: expected .*multiple of 8 on CUDA, got 12"
    ):
        fuse_kv(*arguments)


def fused_with_gradients(grads, k_sources, v_sources, key_weights, value_weights):
    """(k, v) and the gradients of all four arguments, one flat list."""
    inputs = [*k_sources, *v_sources, key_weights, value_weights]
    outs = fuse_kv(k_sources, v_sources, key_weights, value_weights)
    return [*outs, *torch.autograd.grad(outs, inputs, list(grads))]


def change(grads, arguments) -> None:
    """Other values in the same tensors."""
    with torch.no_grad():
        for x in (grads, *arguments[0], *arguments[1], *arguments[2:]):
            x.normal_()


@pytest.mark.cuda
def test_graph_replays_with_new_values():
    arguments = make_sides((40, 2, 64), 2, 2, torch.bfloat16, "cuda")
    grads = torch.randn(2, 40, 2, 64, device="cuda").bfloat16()
    leaves(arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fused_with_gradients(grads, *arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_with_gradients(grads, *arguments)
    for _ in range(3):
        change(grads, arguments)
        graph.replay()
        for got, wanted in zip(captured, fused_with_gradients(grads, *arguments), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.cuda
def test_compile_reduce_overhead_with_backward():
    arguments = make_sides((40, 2, 64), 2, 1, torch.bfloat16, "cuda")
    inputs = leaves(arguments)
    grads = torch.randn(2, 40, 2, 64, device="cuda").bfloat16()
    compiled = torch.compile(lambda *a: fuse_kv(*a), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        change(grads, arguments)
        torch.compiler.cudagraph_mark_step_begin()
        outs = compiled(*arguments)
        got = [out.detach().clone() for out in outs]
        got += torch.autograd.grad(outs, inputs, list(grads))
        for actual, wanted in zip(got, fused_with_gradients(grads, *arguments), strict=True):
            assert torch.equal(actual, wanted)
