"""rope_key_projection and rope_key_projection_write against a float64 oracle that turns complex numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x
from rope_cases import (
    FP8,
    all_nan,
    change_indices,
    cos_sin_table,
    finish_heads,
    make_caches,
    make_copies,
    make_positions,
    op_checks,
    outputs,
    same_outputs,
    written_sides,
)

from fusedkv_ext import ops

BF16, F16 = torch.bfloat16, torch.float16


def make_plain(
    device: str,
    dtype: torch.dtype = BF16,
    tokens: int = 19,
    hidden: int = 72,
    heads: int = 3,
    d: int = 64,
    norm: bool = True,
    bias: bool = True,
    interleaved: bool = False,
    position_dtype: torch.dtype = torch.int64,
) -> dict:
    """Keyword arguments of rope_key_projection, with an x whose rows have gaps between them."""
    table = cos_sin_table(50, d, device, torch.float64 if dtype == torch.float64 else torch.float32)
    return {
        "x": torch.randn(tokens, hidden + 8).to(device, dtype)[:, :hidden],
        "weight": (torch.randn(heads * d, hidden) * hidden**-0.5).to(device, dtype),
        "positions": make_positions(tokens, table, position_dtype),
        "cos_sin": table,
        "norm": (1 + 0.3 * torch.randn(d)).to(device, dtype) if norm else None,
        "eps": 1e-5,
        "bias": torch.randn(heads * d).to(device, dtype) if bias else None,
        "interleaved": interleaved,
    }


def make_write(
    device: str,
    cache_dtype: torch.dtype | None = None,
    hq: int = 2,
    hkv: int = 1,
    page_size: int = 16,
    scales: bool = False,
    copies: bool = False,
    **plain,
) -> dict:
    """Keyword arguments of rope_key_projection_write."""
    inputs = make_plain(device, heads=hq + 2 * hkv, **plain)
    x, norm = inputs["x"], inputs.pop("norm")
    tokens, d = x.shape[0], inputs["cos_sin"].shape[1]
    k_cache, v_cache, slots = make_caches(tokens, page_size, hkv, d, cache_dtype or x.dtype, device)
    k_copy, v_copy = make_copies(k_cache) if copies else (None, None)
    return inputs | {
        "q_out": torch.full((tokens, hq, d), float("nan"), device=device, dtype=x.dtype) if hq else None,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": slots,
        "q_norm": norm,
        "k_norm": None if norm is None else norm.flip(0),
        # Small enough for some values to saturate e4m3.
        "k_scale": (torch.rand(hkv, d) * 0.02 + 0.003).to(device) if scales else None,
        "v_scale": (torch.rand(hkv, d) * 0.02 + 0.003).to(device) if scales else None,
        "k_copy": k_copy,
        "v_copy": v_copy,
    }


def project(inputs: dict, dtype: torch.dtype) -> torch.Tensor:
    """The heads [T, H, D], by a product in `dtype`."""
    bias = None if inputs["bias"] is None else inputs["bias"].to(dtype)
    x = inputs["x"].to(dtype)
    if inputs.get("input_norm") is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[1:], inputs["input_norm"].to(dtype), inputs["eps"])
    product = torch.nn.functional.linear(x, inputs["weight"].to(dtype), bias)
    return product.unflatten(-1, (-1, inputs["cos_sin"].shape[1]))


def plain_oracle(inputs: dict, product: torch.dtype, wide: torch.dtype) -> torch.Tensor:
    """The product in one dtype, norm and RoPE in another."""
    positions, table = inputs["positions"], inputs["cos_sin"]
    heads = project(inputs, product)
    return finish_heads(heads, positions, table, inputs["norm"], inputs["eps"], inputs["interleaved"], wide)


def write_oracle(inputs: dict, product: torch.dtype, wide: torch.dtype) -> dict[str, torch.Tensor]:
    hq = 0 if inputs["q_out"] is None else inputs["q_out"].shape[1]
    hkv = inputs["k_cache"].shape[2]
    q, k, v = project(inputs, product).split([hq, hkv, hkv], 1)
    positions, table = inputs["positions"], inputs["cos_sin"]

    def rotated(x, norm):
        return finish_heads(x, positions, table, norm, inputs["eps"], inputs["interleaved"], wide)

    results = {"q_out": rotated(q, inputs["q_norm"])} if hq else {}
    return results | written_sides(inputs, {"k": rotated(k, inputs["k_norm"]), "v": v.to(wide)})


def check_plain(inputs: dict, call=ops.rope_key_projection) -> None:
    out = call(**inputs)
    dtype = inputs["x"].dtype
    exact = plain_oracle(inputs, torch.float64, torch.float64)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close_2x(out, exact, plain_oracle(inputs, dtype, torch.float32).to(dtype))


def check_write(inputs: dict, call=ops.rope_key_projection_write) -> None:
    call(**inputs)
    exact = write_oracle(inputs, torch.float64, torch.float64)
    rounded = write_oracle(inputs, inputs["x"].dtype, torch.float32)
    for name, want in exact.items():
        assert_close_2x(inputs[name], want, rounded[name].to(inputs[name].dtype))


# Every tile height of the kernels, ragged tiles, contractions that are shorter and longer than their rings of
# stages, in one part and in many.
SHAPES = [
    (1, 8),
    (1, 3000),
    (7, 72),
    (8, 600),
    (16, 1000),
    (17, 600),
    (33, 256),
    (64, 1000),
    (129, 1000),
    (300, 72),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_matches_oracle(device, dtype, tokens, hidden, d, interleaved):
    full = tokens % 2 == 1
    options = {"norm": full, "bias": full, "position_dtype": torch.int32 if full else torch.int64}
    check_plain(make_plain(device, dtype, tokens, hidden, heads=3, d=d, interleaved=interleaved, **options))


@pytest.mark.cuda
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "heads"), [(513, 72, 5), (1300, 1000, 3), (2100, 448, 12)])
def test_large_tiles_match_oracle(tokens, hidden, heads, norm, d):
    check_plain(make_plain("cuda", BF16, tokens, hidden, heads, d, norm))


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 72), (16, 256), (50, 72), (129, 256)])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": BF16, "hq": 3, "hkv": 1},
        {"dtype": F16, "hq": 0, "hkv": 2, "page_size": 1, "norm": False},
        {"dtype": BF16, "cache_dtype": FP8, "scales": True, "page_size": 100, "interleaved": True},
        {"dtype": F16, "cache_dtype": FP8, "bias": False, "position_dtype": torch.int32},
        {"dtype": BF16, "copies": True, "scales": True, "hq": 3, "hkv": 2},
        {"dtype": F16, "copies": True, "hq": 0, "interleaved": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_write_matches_oracle(device, options, tokens, hidden, d):
    check_write(make_write(device, tokens=tokens, hidden=hidden, d=d, **options))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [{}, {"cache_dtype": FP8, "scales": True}, {"copies": True, "scales": True}], ids=str
)
@pytest.mark.parametrize("d", [64, 128])
def test_large_tiles_write_matches_oracle(d, options):
    check_write(make_write("cuda", hq=3, hkv=2, d=d, tokens=1100, hidden=328, **options))


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("tokens", "hidden"), [(1, 2048), (8, 72), (20, 1000), (64, 264), (65, 264), (300, 72)]
)
@pytest.mark.parametrize("options", [{}, {"dtype": F16}, {"bias": False, "copies": True, "hq": 3}], ids=str)
def test_input_norm(device, options, tokens, hidden, d):
    inputs = make_write(device, tokens=tokens, hidden=hidden, d=d, **options)
    x = inputs["x"]
    inputs["x"] = x * (3 * torch.rand(tokens, 1, device=device) + 0.1).to(x.dtype)
    inputs["input_norm"] = (1 + 0.3 * torch.randn(hidden)).to(x)
    check_write(inputs)
    written = inputs | {name: x.clone() for name, x in outputs(inputs).items()}
    ops.rope_key_projection_write(**inputs, early_weight=True)
    assert same_outputs(inputs, written)


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_write_of_queries_alone_is_the_plain_op(device, tokens):
    inputs = make_plain(device, tokens=tokens)
    out = ops.rope_key_projection(**inputs)
    alone = inputs | {
        "q_norm": inputs["norm"],
        "q_out": torch.empty_like(out),
        "k_cache": None,
        "v_cache": None,
    }
    del alone["norm"]
    ops.rope_key_projection_write(**alone)
    assert torch.equal(alone["q_out"].nan_to_num(9.0), out.nan_to_num(9.0))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(device, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([BF16, F16]))
    copies = data.draw(st.booleans())
    check_write(
        make_write(
            device,
            cache_dtype=dtype if copies else data.draw(st.sampled_from([dtype, FP8])),
            copies=copies,
            hq=data.draw(st.integers(0, 5)),
            hkv=data.draw(st.integers(1, 3)),
            page_size=data.draw(st.integers(1, 70)),
            scales=data.draw(st.booleans()),
            dtype=dtype,
            tokens=data.draw(st.integers(1, 80)),
            hidden=8 * data.draw(st.integers(1, 20)),
            d=data.draw(st.sampled_from([64, 128])),
            norm=data.draw(st.booleans()),
            bias=data.draw(st.booleans()),
            interleaved=data.draw(st.booleans()),
            position_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
        )
    )


def test_no_tokens(device):
    assert ops.rope_key_projection(**make_plain(device, tokens=0)).shape == (0, 3, 64)
    inputs = make_write(device, tokens=0, copies=True)
    ops.rope_key_projection_write(**inputs)
    assert all_nan(inputs)


def test_rows_of_any_stride(device):
    inputs = make_plain(device)
    inputs["x"] = torch.randn(19, 75).to(device, BF16)[:, :72]
    check_plain(inputs)


def test_write_equals_plain_and_then_write_kv(device):
    """Both ops and `write_kv` round the same numbers. Small integers, so that no sum depends on its order."""
    inputs = make_write(device, hq=0, hkv=2, bias=False, scales=True, copies=True)
    inputs["x"] = torch.randint(-2, 3, (19, 72)).to(device, BF16)
    inputs["weight"] = torch.randint(-1, 2, (256, 72)).to(device, BF16)
    inputs["positions"] = inputs["positions"].clamp(0, 9)
    ops.rope_key_projection_write(**inputs)
    rotation = {n: inputs[n] for n in ("positions", "cos_sin", "eps", "interleaved")}
    k_rows, v_rows = inputs["weight"].chunk(2)
    k = ops.rope_key_projection(inputs["x"], k_rows.contiguous(), norm=inputs["k_norm"], **rotation)
    still = rotation | {"positions": torch.zeros_like(inputs["positions"])}  # the angle 0 leaves v as it is
    v = ops.rope_key_projection(inputs["x"], v_rows.contiguous(), **still)
    names = ("k_cache", "v_cache", "v_copy")
    again = {n: torch.full_like(inputs[n], float("nan")) for n in (*names, "k_copy")}
    ops.write_kv(k, v, slot_mapping=inputs["slot_mapping"], v_scale=inputs["v_scale"], **again)
    for name in names:  # not the copied keys: those are rounded from float32 here and from bf16 there
        assert torch.equal(again[name].float().nan_to_num(9.0), inputs[name].float().nan_to_num(9.0))


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 2048), (20, 1000), (64, 1000), (300, 72)])
def test_two_runs_are_identical(device, tokens, hidden):
    inputs = make_plain(device, tokens=tokens, hidden=hidden)
    first, second = (ops.rope_key_projection(**inputs).view(torch.int16) for _ in range(2))
    assert torch.equal(first, second)


def test_a_row_does_not_depend_on_the_others(device):
    """A NaN token spoils its own row only, and the result does not depend on how many tokens there are."""
    inputs = make_plain(device, tokens=16)
    inputs["positions"] = inputs["positions"].clamp(0, 9)
    clean = ops.rope_key_projection(**inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][5] = float("nan")
    out = ops.rope_key_projection(**inputs)
    assert out[5].isnan().all()
    others = [t for t in range(16) if t != 5]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("norm", "bias"), [(True, True), (False, False), (True, False)])
def test_gradcheck(norm, bias, interleaved):
    inputs = make_plain("cpu", torch.float64, 3, 8, 2, 6, norm, bias, interleaved)
    inputs["positions"] = torch.tensor([4, 0, 31])
    names = [n for n in ("x", "weight", "norm", "bias") if inputs[n] is not None]
    leaves = [inputs[n].clone().requires_grad_() for n in names]

    def f(*values):
        return ops.rope_key_projection(**inputs | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(f, leaves)


def check_gradients(inputs: dict, grad: torch.Tensor, call=ops.rope_key_projection) -> None:
    dtype = grad.dtype

    def gradients(f, to):
        names = [n for n in ("x", "weight", "norm", "bias") if inputs[n] is not None]
        leaves = {n: inputs[n].detach().to(to).requires_grad_() for n in names}
        out = f(inputs | leaves)
        return torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))

    actual = gradients(lambda a: call(**a), dtype)
    exact = gradients(lambda a: plain_oracle(a, torch.float64, torch.float64), torch.float64)
    rounded = gradients(lambda a: plain_oracle(a, dtype, torch.float32).to(dtype), dtype)
    for a, e, r in zip(actual, exact, rounded, strict=True):
        assert a.dtype == dtype
        assert_close_2x(a, e, r)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_match_float64_autograd(device, dtype, norm):
    inputs = make_plain(device, dtype, tokens=67, hidden=136, norm=norm)
    inputs["positions"] = inputs["positions"].clamp(0, 49)
    check_gradients(inputs, torch.randn(67, 3, 64).to(device, dtype))


def test_opcheck(device):
    inputs = make_plain(device)
    inputs["positions"].clamp_(0, 9)  # NaN outputs would not compare equal
    for name in ("x", "weight", "norm", "bias"):
        inputs[name] = inputs[name].clone().requires_grad_()
    torch.library.opcheck(torch.ops.fusedkv.rope_key_projection.default, (), inputs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("copies", [False, True])
def test_opcheck_write(device, copies):
    inputs = make_write(device, copies=copies)
    inputs["positions"].clamp_(0, 9)
    for name in ("k_cache", "v_cache") + ("k_copy", "v_copy") * copies:
        inputs[name] = torch.zeros_like(inputs[name])
    op = torch.ops.fusedkv.rope_key_projection_write.default
    torch.library.opcheck(op, (), inputs, test_utils=op_checks(fp8=copies))


def test_compiles_without_graph_breaks(device):
    inputs = make_plain(device)
    inputs["positions"].clamp_(0, 9)
    weight = inputs["weight"].requires_grad_()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(ops.rope_key_projection, fullgraph=True, backend=backend)
    results = []
    for f in (ops.rope_key_projection, compiled):
        out = f(**inputs)
        (grad,) = torch.autograd.grad(out.float().square().sum(), weight)
        results.append((out, grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("copies", [False, True])
def test_write_compiles_without_graph_breaks(device, copies):
    eager = make_write(device, copies=copies)
    compiled = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in eager.items()}
    backend = "aot_eager" if device == "cpu" else "inductor"
    ops.rope_key_projection_write(**eager)
    torch.compile(ops.rope_key_projection_write, fullgraph=True, backend=backend)(**compiled)
    assert same_outputs(eager, compiled)


def captured(op, inputs: dict):
    """A call with `inputs` that replays one captured graph."""
    op(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(**inputs)

    def replay(**same):
        assert all(same[name] is x for name, x in inputs.items())
        graph.replay()
        return out

    return replay


def recompiled(op, inputs: dict):
    # Inductor 2.11 loses the size symbols of two mutated views of one pool if shapes became dynamic.
    return torch.compile(op, fullgraph=True, mode="reduce-overhead", dynamic=False)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("repeat", [captured, recompiled])
def test_repeated_calls_read_new_positions(repeat, tokens):
    inputs = make_plain("cuda", tokens=tokens)
    call = repeat(ops.rope_key_projection, inputs)
    for _ in range(4):
        change_indices(inputs)
        inputs["x"].copy_(torch.randn(tokens, 72))
        check_plain(inputs, call)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("repeat", [captured, recompiled])
def test_repeated_writes_read_new_positions_and_slots(repeat, tokens):
    inputs = make_write("cuda", tokens=tokens, scales=True, copies=True)
    call = repeat(ops.rope_key_projection_write, inputs)
    for _ in range(4):
        change_indices(inputs)
        inputs["x"].copy_(torch.randn(tokens, 72))
        for x in outputs(inputs).values():
            x.fill_(float("nan"))
        check_write(inputs, call)


@pytest.mark.cuda
def test_gradients_with_reduce_overhead():
    inputs = make_plain("cuda", tokens=20)
    inputs["positions"].clamp_(0, 49)
    compiled = torch.compile(ops.rope_key_projection, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        change_indices(inputs)
        torch.compiler.cudagraph_mark_step_begin()
        check_gradients(inputs, torch.randn(20, 3, 64).to("cuda", BF16), compiled)


BAD_PLAIN = {
    "x: expected dtype": lambda a: a | {"x": a["x"].int()},
    r"x: expected shape \[\*, \*\], got": lambda a: a | {"x": a["x"][None]},
    "x: expected stride 1 in the last dimension": lambda a: a | {"x": torch.cat([a["x"]] * 2, 1)[:, ::2]},
    "x: expected a hidden size that is a multiple of 8, got 68": lambda a: a | {"x": a["x"][:, :68]},
    r"weight: expected shape \[\*, 72\], got \[192, 64\]": lambda a: a | {"weight": a["weight"][:, :64]},
    "weight: expected dtype bfloat16, got float32": lambda a: a | {"weight": a["weight"].float()},
    "weight: expected a contiguous tensor": lambda a: a | {"weight": a["weight"][::2]},
    "weight: expected rows that are a multiple of the head dim 64, got 191": lambda a: (
        a | {"weight": a["weight"][1:]}
    ),
    "weight: expected rows that are a multiple of the head dim 64, got 0": lambda a: (
        a | {"weight": a["weight"][:0]}
    ),
    r"bias: expected shape \[192\], got \[191\]": lambda a: a | {"bias": a["bias"][1:]},
    "bias: expected dtype bfloat16": lambda a: a | {"bias": a["bias"].float()},
    r"norm: expected shape \[64\], got \[63\]": lambda a: a | {"norm": a["norm"][1:]},
    r"positions: expected shape \[19\], got \[18\]": lambda a: a | {"positions": a["positions"][1:]},
    "positions: expected dtype int32 or int64": lambda a: a | {"positions": a["positions"].bool()},
    "cos_sin: expected dtype float32": lambda a: a | {"cos_sin": a["cos_sin"].half()},
}


@pytest.mark.parametrize("message", BAD_PLAIN)
def test_bad_argument_is_named(device, message):
    with pytest.raises(ValueError, match=f"rope_key_projection: {message}"):
        ops.rope_key_projection(**BAD_PLAIN[message](make_plain(device)))


BAD_WRITE = {
    r"weight: expected 1 \(q_out\) \+ 2 \* 1 .*, got 4 heads": lambda a: (
        a | {"q_out": a["q_out"][:, :1].contiguous()}
    ),
    r"q_out: expected shape \[19, \*, 64\]": lambda a: a | {"q_out": a["q_out"][1:]},
    "k_cache: expected 4 dimensions, got 3": lambda a: a | {"k_cache": a["k_cache"][0]},
    "v_cache: expected dtype bfloat16, got float8_e4m3fn": lambda a: a | {"v_cache": a["v_cache"].to(FP8)},
    "slot_mapping: expected dtype int64, got int32": lambda a: a | {"slot_mapping": a["slot_mapping"].int()},
    "q_norm: expected dtype bfloat16": lambda a: a | {"q_norm": a["q_norm"].float()},
    r"k_norm: expected shape \[64\]": lambda a: a | {"k_norm": a["k_norm"][:32]},
    r"v_scale: expected shape \[1, 64\]": lambda a: a | {"v_scale": torch.ones(2, 64, device=a["x"].device)},
    "k_copy, v_copy: expected both or none": lambda a: a | {"k_copy": None},
    "v_copy: expected dtype float8_e4m3fn, got float32": lambda a: a | {"v_copy": a["v_copy"].float()},
    r"k_copy: expected shape \[4, 16, 1, 64\]": lambda a: a | {"k_copy": a["k_copy"][1:]},
    r"input_norm: expected shape \[72\], got \[64\]": lambda a: a | {"input_norm": a["q_norm"]},
    "k_cache, v_cache, slot_mapping: expected all or none": lambda a: a | {"slot_mapping": None},
}


@pytest.mark.parametrize("message", BAD_WRITE)
def test_bad_write_argument_is_named_and_nothing_is_written(device, message):
    good = make_write(device, copies=True)
    with pytest.raises(ValueError, match=f"rope_key_projection_write: {message}"):
        ops.rope_key_projection_write(**BAD_WRITE[message](good))
    assert all_nan(good)
