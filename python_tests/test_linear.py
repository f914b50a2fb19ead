import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x

from fusedkv_ext import ops

HALF = [torch.float16, torch.bfloat16]
EPS = 1e-5


def matrices(tokens, hidden, rows, dtype, device):
    x = torch.randn(tokens, hidden, device=device)
    weight = torch.randn(rows, hidden, device=device) * hidden**-0.5
    norm = 1 + 0.3 * torch.randn(hidden, device=device)
    return x.to(dtype), weight.to(dtype), norm.to(dtype)


def plain_swiglu(x, weight, norm):
    x = x if norm is None else F.rms_norm(x, norm.shape, norm, EPS)
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


def doubles(*tensors):
    return [None if x is None else x.double() for x in tensors]


def check(actual, exact, plain):
    """The 2x rule; one rounding of the largest value is allowed besides, which plain torch may by luck not
    need where there are few values."""
    rounding = torch.finfo(actual.dtype).eps / 2
    largest = exact.abs().max().item() if exact.numel() else 0.0
    assert_close_2x(actual, exact, plain, absolute=rounding * largest)


def like(x):
    """A copy with the same strides and the same alignment, which decide on the library's kernel."""
    base = x if x._base is None else x._base
    return base.clone().as_strided(x.shape, x.stride(), x.storage_offset())


def check_add(x, weight, out):
    before, again = out.clone(), like(out)
    ops.linear_add(out, x, weight)
    ops.linear_add(again, x, weight, early_weight=True)
    assert torch.equal(again, out)
    wide = doubles(before, x, weight)
    check(out, wide[0] + F.linear(*wide[1:]), before + F.linear(x, weight))


def check_swiglu(x, weight, norm):
    out = ops.swiglu_linear(x, weight, norm, EPS)
    assert torch.equal(ops.swiglu_linear(x, weight, norm, EPS, early_weight=True), out)
    assert out.dtype == x.dtype and out.is_contiguous()
    check(out, plain_swiglu(*doubles(x, weight, norm)), plain_swiglu(x, weight, norm))


# Both sides of each capacity of the kernels for few tokens, and what is left to the library.
TOKENS = [1, 7, 8, 9, 32, 33, 64, 65, 200]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALF)
def test_matches_oracle(device, dtype, tokens):
    for hidden, size in ((2048, 2048), (264, 96), (712, 24)):
        x, weight, norm = matrices(tokens, hidden, 2 * size, dtype, device)
        check_add(x, weight[:size], torch.randn(tokens, size, device=device).to(dtype))
        check_swiglu(x, weight, norm)
        check_swiglu(x, weight, None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 80),
    hidden=st.integers(1, 60),
    size=st.integers(1, 40),
    normed=st.booleans(),
    dtype=st.sampled_from(HALF),
)
def test_any_shape(device, tokens, hidden, size, normed, dtype):
    x, weight, norm = matrices(tokens, 8 * hidden, 16 * size, dtype, device)
    check_swiglu(x, weight, norm if normed else None)
    check_add(x, weight, torch.randn(tokens, 16 * size, device=device).to(dtype))


@pytest.mark.parametrize("tokens", [3, 20, 100])
def test_layouts(device, tokens):
    """Rows with gaps and misaligned starts, in all three matrices; the gaps of an output stay as they are."""
    dtype = torch.bfloat16
    wide = torch.randn(tokens, 200, device=device).to(dtype)
    weight = torch.randn(64, 200, device=device).to(dtype) * 0.1
    out = torch.randn(tokens, 96, device=device).to(dtype)
    for first in (0, 8, 1):
        x, w = wide[:, first : first + 128], weight[:, first : first + 128]
        around = out.clone()
        check_add(x, w, around[:, 16:80])
        assert torch.equal(around[:, :16], out[:, :16]) and torch.equal(around[:, 80:], out[:, 80:])
        check_add(x, w.contiguous(), around[:, 3:67])
        check_swiglu(x, w, None)
        check_swiglu(x, w.contiguous(), torch.ones(128, device=device, dtype=dtype))


def test_x_may_be_large_before_its_norm(device):
    """bfloat16 has the range; in float16 the norm is applied first."""
    for dtype in HALF:
        x, weight, norm = matrices(5, 256, 64, dtype, device)
        check_swiglu(x * 5000, weight, norm * 20)


@pytest.mark.parametrize("tokens", [2, 64, 70])
def test_nan_stays_in_its_row(device, tokens):
    x, weight, norm = matrices(tokens, 128, 64, torch.bfloat16, device)
    x[1, 5] = float("nan")
    rows = ops.swiglu_linear(x, weight, norm).isnan()
    assert rows[1].all() and rows.sum() == rows.shape[1]
    out = torch.zeros(tokens, 64, device=device, dtype=torch.bfloat16)
    ops.linear_add(out, x, weight)
    assert out[1].isnan().all() and out.isnan().sum() == 64


def test_float32_and_float64_on_the_cpu():
    for dtype in (torch.float32, torch.float64):
        x, weight, norm = matrices(4, 24, 20, dtype, "cpu")
        expected = plain_swiglu(*doubles(x, weight, norm)).to(dtype)
        torch.testing.assert_close(ops.swiglu_linear(x, weight, norm, EPS), expected)
        out = torch.ones(4, 20, dtype=dtype)
        ops.linear_add(out, x, weight)
        torch.testing.assert_close(out, 1 + F.linear(x, weight))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 16, 1)), r"x: expected shape \[\*, \*\], got \[2, 16, 1\]"),
        (dict(x=torch.zeros(2, 16).int()), "x: expected dtype .*, got .*int32"),
        (dict(weight=torch.zeros(32, 24)), r"weight: expected shape \[\*, 16\], got \[32, 24\]"),
        (dict(weight=torch.zeros(32, 16).double()), "weight: expected dtype .*float32, got .*float64"),
        (dict(weight=torch.zeros(0, 16)), "weight: expected 1 row or more, got 0"),
    ],
)
def test_bad_matrices(change, message):
    given = dict(x=torch.zeros(2, 16), weight=torch.zeros(32, 16)) | change
    with pytest.raises(ValueError, match="^swiglu_linear: " + message):
        ops.swiglu_linear(**given)
    with pytest.raises(ValueError, match="^linear_add: " + message):
        ops.linear_add(torch.zeros(2, 32), **given)


def test_bad_outputs_and_norms(device):
    x, weight, norm = matrices(2, 16, 32, torch.bfloat16, device)
    for out in (x.new_zeros(2, 31), x.new_zeros(3, 32), x.new_zeros(2, 32).float()):
        with pytest.raises(ValueError, match=r"^linear_add: out: expected"):
            ops.linear_add(out, x, weight)
        assert not out.any()
    for bad in (norm[:8], norm.float()):
        with pytest.raises(ValueError, match=r"^swiglu_linear: input_norm: expected"):
            ops.swiglu_linear(x, weight, bad)
    with pytest.raises(ValueError, match=r"^swiglu_linear: weight: expected 2 \* I rows"):
        ops.swiglu_linear(x, weight[:15])


@pytest.mark.parametrize("dtype", HALF)
def test_opcheck(device, dtype):
    x, weight, norm = matrices(3, 32, 64, dtype, device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fusedkv.swiglu_linear.default, (x, weight, norm), test_utils=tests)
    out = x.new_zeros(3, 64)
    torch.library.opcheck(torch.ops.fusedkv.linear_add.default, (out, x, weight), test_utils=tests)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_bits_are_the_same_in_every_run_and_in_a_graph(tokens):
    x, weight, norm = matrices(tokens, 2048, 4096, torch.bfloat16, "cuda")
    out = torch.randn(tokens, 4096, device="cuda").bfloat16()
    before = out.clone()

    def run():
        out.copy_(before)
        ops.linear_add(out, x, weight)
        return ops.swiglu_linear(x, weight, norm)

    first, added = run(), out.clone()
    for _ in range(100):
        assert torch.equal(run(), first) and torch.equal(out, added)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, first) and torch.equal(out, added)


def test_autocast_leaves_the_ops_alone(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    other = torch.float16 if device == "cuda" else torch.bfloat16
    x, weight, norm = matrices(100, 64, 64, dtype, device)
    expected, out = ops.swiglu_linear(x, weight, norm), torch.zeros(100, 64, device=device, dtype=dtype)
    with torch.autocast(device, dtype=other):
        assert torch.equal(ops.swiglu_linear(x, weight, norm), expected)
        ops.linear_add(out, x, weight)
    torch.testing.assert_close(out, F.linear(x, weight))


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 8, 20, 64])
def test_reads_wait_for_the_kernel_before(tokens):
    """That one, of our own, lets the next one start early, and writes x (the weight is read early) or the
    weight (it is not)."""
    for _ in range(40):
        x, weight, _ = matrices(tokens, 1024, 2048, torch.bfloat16, "cuda")
        gates = torch.randn(tokens, 2 * 1024, device="cuda").bfloat16()
        wide = torch.randn(2048, 2 * 1024, device="cuda").bfloat16()
        out, again = torch.zeros(2, tokens, 2048, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        ops.linear_add(out, ops.swiglu(gates), weight, early_weight=True)
        ops.linear_add(again, x, ops.swiglu(wide))
        written_x, written_weight = ops.swiglu(gates), ops.swiglu(wide)
        torch.cuda.synchronize()
        for got, a, b in ((out, written_x, weight), (again, x, written_weight)):
            expected = torch.zeros_like(out)
            ops.linear_add(expected, a, b)
            assert torch.equal(got, expected)


@pytest.mark.cuda
def test_overlap_is_refused():
    x, weight, _ = matrices(3, 64, 64, torch.bfloat16, "cuda")
    for out in (x, x[:1].expand(3, -1)):
        with pytest.raises(ValueError, match=r"^linear_add: out: expected memory of its own"):
            ops.linear_add(out, x.clone() if out.stride(0) == 0 else x, weight)
    check_swiglu(x[:1].expand(3, -1), weight, None)
