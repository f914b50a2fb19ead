import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x

from fusedkv_ext.ops import swiglu

HALF = [torch.float16, torch.bfloat16]


def plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def check(gate_up):
    out = swiglu(gate_up)
    assert out.dtype == gate_up.dtype and out.is_contiguous()
    assert_close_2x(out, plain(gate_up.double()), plain(gate_up))


# The last three are around the size from which a thread computes two vectors.
@pytest.mark.parametrize(
    "shape", [(16,), (1, 8192), (3, 5, 48), (64, 2 * 2752), (256, 8192), (257, 8192), (301, 8208)]
)
@pytest.mark.parametrize("dtype", HALF)
def test_matches_oracle(device, dtype, shape):
    check(torch.randn(shape, device=device).mul(3).to(dtype))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    size=st.integers(1, 40),
    spread=st.floats(1e-3, 40),  # products stay below the largest f16; test_extremes goes beyond
    dtype=st.sampled_from([*HALF, torch.float32, torch.float64]),
)
def test_any_shape(device, leading, size, spread, dtype):
    if device == "cuda":
        size, dtype = 8 * size, torch.float16 if dtype == torch.float64 else torch.bfloat16
    check((torch.randn(*leading, 2 * size, device=device) * spread).to(dtype))


def test_rounds_once(device):
    """Plain torch rounds silu(gate) too, which shows in the error."""
    gate_up = torch.randn(100, 1024, device=device).bfloat16()
    exact = plain(gate_up.double())
    largest = ((swiglu(gate_up).double() - exact) / exact).abs().max()
    assert largest < 2**-8 * 1.01 < ((plain(gate_up).double() - exact) / exact).abs().max()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 16)])
def test_no_rows(device, shape):
    out = swiglu(torch.zeros(shape, device=device, dtype=torch.float16))
    assert out.shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("dtype", HALF)
def test_extremes(device, dtype):
    inf, large = float("inf"), torch.finfo(dtype).max
    gate = torch.tensor([-inf, -large, -1e4, -60, -0.0, 60, 1e4, large, inf, float("nan")])
    up = torch.tensor([0.0, 1.0, -1e4, large, -large, inf, -inf, float("nan")])
    gate, up = (x.flatten() for x in torch.meshgrid(gate, up, indexing="ij"))
    gate_up = torch.cat((gate, up)).to(device, dtype)
    actual, expected = swiglu(gate_up), plain(gate_up.double()).to(dtype)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_nan_stays_in_its_place(device):
    gate_up = torch.randn(6, 64, device=device).half()
    gate_up[2, 3] = gate_up[4, 32 + 9] = float("nan")
    assert swiglu(gate_up).isnan().nonzero().tolist() == [[2, 3], [4, 9]]


def strided_rows(kind, device):
    x = torch.randn(10, 4, 80, device=device).half()
    if kind == "slice of wider rows":
        return x[..., 8:40]
    if kind == "rows that do not flatten":
        return x[:, :3]
    if kind == "sequence first":
        return x.transpose(0, 1)
    if kind == "misaligned start":
        return x.flatten()[1 : 1 + 6 * 64].view(6, 64)
    if kind == "misaligned rows":
        return torch.randn(10, 67, device=device).half()[:, :64]
    if kind == "one row, misaligned stride":
        return torch.randn(3, 71, device=device).half()[1:2, 5:69]
    if kind == "expanded inner rows":
        return x[:, :1].expand(-1, 5, -1)
    return x[0, :1].expand(7, -1)


@pytest.mark.parametrize(
    "kind",
    [
        "slice of wider rows",
        "rows that do not flatten",
        "sequence first",
        "misaligned start",
        "misaligned rows",
        "one row, misaligned stride",
        "expanded inner rows",
        "expanded rows",
    ],
)
def test_strided_rows(device, kind):
    check(strided_rows(kind, device))


def test_gradcheck():
    gate_up = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)
    assert torch.autograd.gradgradcheck(swiglu, gate_up)


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_matches_plain_torch(device, dtype):
    gate_up = (3 * torch.randn(7, 5, 96, device=device)).to(dtype)
    grad = torch.randn(7, 5, 48, device=device).to(dtype)

    def gradient(function, dtype):
        x = gate_up.to(dtype).detach().requires_grad_()
        return torch.autograd.grad(function(x), x, grad.to(dtype))[0]

    actual = gradient(swiglu, dtype)
    assert actual.dtype == dtype
    assert_close_2x(actual, gradient(plain, torch.float64), gradient(plain, dtype))


def test_expanded_gradient(device):
    gate_up = torch.randn(4, 32, device=device).half().requires_grad_()
    ones = torch.ones(4, 16, device=device).half()
    (expanded,) = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)
    assert torch.equal(expanded, torch.autograd.grad(swiglu(gate_up), gate_up, ones)[0])


def test_opcheck(device):
    for x in (torch.randn(3, 5, 32, device=device).bfloat16(), strided_rows("sequence first", device)):
        torch.library.opcheck(torch.ops.fusedkv.swiglu.default, (x.requires_grad_(),))


def test_compiles_into_one_graph_with_backward(device):
    def loss(x):
        return swiglu(x * 2).float().square().sum()

    backend = "aot_eager" if device == "cpu" else "inductor"
    gate_up, results = torch.randn(6, 64, device=device).bfloat16().requires_grad_(), []
    for run in (loss, torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)):
        value = run(gate_up)
        results.append((value, *torch.autograd.grad(value, gate_up)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    "gate_up, message",
    [
        (torch.tensor(1.0).half(), "expected at least 1 dimension, got 0"),
        (torch.zeros(4, 16, dtype=torch.int64), "expected dtype .*, got int64"),
        (torch.zeros(4, 16).to(torch.float8_e4m3fn), "expected dtype .*, got float8_e4m3fn"),
        (torch.zeros(4, 15).half(), r"expected a last dimension of 2 \* I, .*, got 15"),
        (torch.zeros(4, 0).half(), r"expected a last dimension of 2 \* I, .*, got 0"),
        (torch.zeros(32, 16).half().t(), "expected stride 1 in the last dimension, got 16"),
    ],
)
def test_bad_argument(device, gate_up, message):
    with pytest.raises(ValueError, match="^swiglu: gate_up: " + message):
        swiglu(gate_up.to(device))


@pytest.mark.cuda
def test_cuda_refuses_what_its_loads_do_not_fit():
    with pytest.raises(ValueError, match=r"I a multiple of 8 on CUDA and below 2\^30, got 24"):
        swiglu(torch.zeros(4, 24, device="cuda").half())
    with pytest.raises(ValueError, match="expected dtype float16 or bfloat16, got float32"):
        swiglu(torch.zeros(4, 32, device="cuda"))


@pytest.mark.cuda
def test_graph_replays_with_new_values():
    gate_up = torch.randn(40, 2 * 768, device="cuda").bfloat16()
    weight = torch.randn(2 * 768, 2 * 768, device="cuda").bfloat16() / 30

    def chain():  # the kernel waits for those before it, and those after it for the kernel
        return swiglu(swiglu(gate_up @ weight).repeat(1, 2) @ weight)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(5):
        gate_up.normal_()
        graph.replay()
        assert torch.equal(captured, chain())
