"""rope_write_kv against a float64 oracle that turns complex numbers."""

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


def make_inputs(
    device: str,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype | None = None,
    tokens: int = 19,
    hq: int = 4,
    hkv: int = 2,
    d: int = 64,
    page_size: int = 16,
    norm: bool = True,
    scales: bool = False,
    position_dtype: torch.dtype = torch.int64,
    interleaved: bool = False,
    copies: bool = False,
) -> dict:
    """Keyword arguments of one call, with a qkv whose tokens have gaps between them."""
    table = cos_sin_table(50, d, device, torch.float64 if dtype == torch.float64 else torch.float32)
    qkv = torch.randn(tokens, hq + 2 * hkv + 1, d).to(device, dtype)[:, :-1]
    k_cache, v_cache, slots = make_caches(tokens, page_size, hkv, d, cache_dtype or dtype, device)
    k_copy, v_copy = make_copies(k_cache) if copies else (None, None)
    return {
        "qkv": qkv,
        "q_out": torch.full((tokens, hq, d), float("nan"), device=device, dtype=dtype) if hq else None,
        "k_cache": k_cache if hkv else None,
        "v_cache": v_cache if hkv else None,
        "positions": make_positions(tokens, table, position_dtype),
        "cos_sin": table,
        "q_norm": (1 + 0.3 * torch.randn(d)).to(device, dtype) if norm else None,
        "k_norm": (1 + 0.3 * torch.randn(d)).to(device, dtype) if norm else None,
        "eps": 1e-5,
        "interleaved": interleaved,
        "slot_mapping": slots if hkv else None,
        # Small enough for some values to saturate e4m3.
        "k_scale": (torch.rand(hkv, d) * 0.02 + 0.003).to(device) if scales and hkv else None,
        "v_scale": (torch.rand(hkv, d) * 0.02 + 0.003).to(device) if scales and hkv else None,
        "k_copy": k_copy,
        "v_copy": v_copy,
    }


def expected(inputs: dict, wide: torch.dtype) -> dict[str, torch.Tensor]:
    """The outputs at precision `wide`, not rounded."""
    hq = 0 if inputs["q_out"] is None else inputs["q_out"].shape[1]
    hkv = 0 if inputs["k_cache"] is None else inputs["k_cache"].shape[2]
    q, k, v = inputs["qkv"].to(wide).split([hq, hkv, hkv], 1)
    positions, table = inputs["positions"], inputs["cos_sin"]

    def rotated(x, norm):
        return finish_heads(x, positions, table, norm, inputs["eps"], inputs["interleaved"], wide)

    results = {}
    if hq:
        results["q_out"] = rotated(q, inputs["q_norm"])
    if hkv:
        results |= written_sides(inputs, {"k": rotated(k, inputs["k_norm"]), "v": v})
    return results


def check(inputs: dict) -> None:
    ops.rope_write_kv(**inputs)
    exact, rounded = expected(inputs, torch.float64), expected(inputs, torch.float32)
    for name, want in exact.items():
        assert_close_2x(inputs[name], want, rounded[name].to(inputs[name].dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": BF16, "tokens": 1},
        {"dtype": F16, "tokens": 19, "position_dtype": torch.int32, "page_size": 100},
        {"dtype": BF16, "cache_dtype": FP8, "tokens": 33, "scales": True, "hq": 5, "hkv": 1},
        {"dtype": F16, "cache_dtype": FP8, "tokens": 7, "page_size": 1},
        {"dtype": BF16, "hq": 0, "hkv": 3, "tokens": 40, "norm": False, "scales": True},
        {"dtype": F16, "hq": 3, "hkv": 0, "tokens": 40},
        {"dtype": BF16, "hq": 1, "hkv": 1, "tokens": 300, "norm": False},
        {"dtype": BF16, "copies": True, "scales": True, "tokens": 33, "hq": 5, "hkv": 3},
        {"dtype": F16, "copies": True, "tokens": 7, "hq": 0, "page_size": 100},
        # So many that the CUDA kernel takes several heads a thread.
        {"dtype": BF16, "copies": True, "scales": True, "tokens": 2300, "hq": 9, "hkv": 3},
        {"dtype": F16, "cache_dtype": FP8, "tokens": 2300, "hq": 17, "hkv": 1, "norm": False},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_matches_oracle(device, d, interleaved, options):
    check(make_inputs(device, d=d, interleaved=interleaved, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 96])
def test_cpu_takes_wide_dtypes_and_any_even_head_dim(dtype, d):
    check(make_inputs("cpu", dtype=dtype, d=d))


@pytest.mark.parametrize("missing", ["q_norm", "k_norm"])
def test_one_norm_alone(device, missing):
    check(make_inputs(device) | {missing: None})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(device, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([BF16, F16]))
    copies = data.draw(st.booleans())
    check(
        make_inputs(
            device,
            dtype=dtype,
            cache_dtype=dtype if copies else data.draw(st.sampled_from([dtype, FP8])),
            tokens=data.draw(st.integers(1, 40)),
            hq=data.draw(st.integers(0, 9)),
            hkv=data.draw(st.integers(1, 5)),
            d=data.draw(st.sampled_from([64, 128])),
            page_size=data.draw(st.integers(1, 70)),
            norm=data.draw(st.booleans()),
            scales=data.draw(st.booleans()),
            position_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
            interleaved=data.draw(st.booleans()),
            copies=copies,
        )
    )


def test_no_tokens(device):
    inputs = make_inputs(device, tokens=0, copies=True)
    ops.rope_write_kv(**inputs)
    assert all_nan(inputs)


def test_two_runs_are_identical(device):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        inputs = make_inputs(device, tokens=129, copies=True)
        ops.rope_write_kv(**inputs)
        results.append([x.contiguous().view(torch.uint8) for x in outputs(inputs).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("copies", [False, True])
def test_opcheck(device, copies):
    inputs = make_inputs(device, scales=True, copies=copies)
    inputs["positions"].clamp_(0, 9)  # NaN outputs would not compare equal
    for name in ("k_cache", "v_cache") + ("k_copy", "v_copy") * copies:
        inputs[name] = torch.zeros_like(inputs[name])
    op = torch.ops.fusedkv.rope_write_kv.default
    torch.library.opcheck(op, tuple(inputs.values()), test_utils=op_checks(fp8=copies))


@pytest.mark.parametrize("copies", [False, True])
def test_compiles_without_graph_breaks(device, copies):
    torch.manual_seed(2)
    eager = make_inputs(device, copies=copies)
    compiled = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in eager.items()}
    ops.rope_write_kv(**eager)
    backend = "aot_eager" if device == "cpu" else "inductor"
    torch.compile(ops.rope_write_kv, fullgraph=True, backend=backend)(**compiled)
    assert same_outputs(eager, compiled)


def check_repeated(inputs: dict, call) -> None:
    """Call it with other positions and slots in the same tensors, on caches that are NaN again each time."""
    for _ in range(4):
        change_indices(inputs)
        for x in outputs(inputs).values():
            x.fill_(float("nan"))
        call()
        exact, rounded = expected(inputs, torch.float64), expected(inputs, torch.float32)
        for name, want in exact.items():
            assert_close_2x(inputs[name], want, rounded[name].to(inputs[name].dtype))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [{}, {"cache_dtype": FP8, "scales": True}, {"copies": True, "scales": True}], ids=str
)
def test_graph_replay_reads_new_positions_and_slots(options):
    inputs = make_inputs("cuda", **options)
    ops.rope_write_kv(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rope_write_kv(**inputs)
    check_repeated(inputs, graph.replay)


@pytest.mark.cuda
def test_compile_reduce_overhead():
    inputs = make_inputs("cuda")
    compiled = torch.compile(ops.rope_write_kv, fullgraph=True, mode="reduce-overhead")
    check_repeated(inputs, lambda: compiled(**inputs))


@pytest.mark.cuda
def test_cache_with_more_than_2_31_elements():
    inputs = make_inputs("cuda", tokens=4, hq=0, hkv=1, page_size=1, cache_dtype=FP8)
    step = 2**31 + 64
    pool = torch.full((step + 256,), float("nan"), dtype=BF16, device="cuda").to(FP8)
    inputs["k_cache"] = pool.as_strided((2, 1, 1, 64), (step, 64, 64, 1))
    inputs["v_cache"] = pool[64:].as_strided((2, 1, 1, 64), (step, 64, 64, 1))
    inputs["positions"].fill_(3)
    inputs["slot_mapping"] = torch.tensor([-1, 1, -1, 2], device="cuda")
    check(inputs)


BAD_ARGUMENTS = {
    "qkv: expected dtype": lambda a: a | {"qkv": a["qkv"].to(torch.int32)},
    r"qkv: expected shape \[\*, \*, \*\]": lambda a: a | {"qkv": a["qkv"].flatten(1)},
    r"qkv: expected shape \[\*, \*, 64\]": lambda a: a | {"qkv": a["qkv"][..., :32]},
    "qkv: expected stride 1": lambda a: a | {"qkv": a["qkv"].transpose(1, 2).contiguous().transpose(1, 2)},
    "qkv: expected heads packed": lambda a: a | {"qkv": torch.cat([a["qkv"]] * 2, 2)[..., :64]},
    r"qkv: expected 4 \(q_out\) \+ 2 \* 2 .* 64 channels, got 7": lambda a: a | {"qkv": a["qkv"][:, :-1]},
    "q_out: expected a contiguous": lambda a: a | {"q_out": torch.cat([a["q_out"]] * 2, 1)[:, ::2]},
    "q_out: expected shape": lambda a: a | {"q_out": a["q_out"][:-1]},
    "q_out: expected dtype bfloat16, got float32": lambda a: a | {"q_out": a["q_out"].float()},
    "k_cache, v_cache, slot_mapping: expected all or none": lambda a: a | {"slot_mapping": None},
    "k_cache: expected 4 dimensions, got 3": lambda a: a | {"k_cache": a["k_cache"][0]},
    "k_cache: expected dtype bfloat16 or float8": lambda a: a | {"k_cache": a["k_cache"].half()},
    r"v_cache: expected shape \[4, 16, 2, 64\]": lambda a: a | {"v_cache": a["v_cache"][:-1]},
    "v_cache: expected dtype bfloat16, got": lambda a: a | {"v_cache": a["v_cache"].to(FP8)},
    r"slot_mapping: expected dtype int64": lambda a: a | {"slot_mapping": a["slot_mapping"].int()},
    r"slot_mapping: expected shape \[20\]": lambda a: a | {"slot_mapping": a["slot_mapping"][1:]},
    "positions: expected dtype int32 or int64": lambda a: a | {"positions": a["positions"].float()},
    r"positions: expected shape \[20\], got \[19\]": lambda a: a | {"positions": a["positions"][1:]},
    "cos_sin: expected dtype float32": lambda a: a | {"cos_sin": a["cos_sin"].bfloat16()},
    "cos_sin: expected at least one position": lambda a: a | {"cos_sin": a["cos_sin"][:0]},
    "(head_dim|cos_sin): expected": lambda a: a | {"cos_sin": a["cos_sin"][:, :63].contiguous()},
    r"q_norm: expected shape \[64\]": lambda a: a | {"q_norm": a["q_norm"][1:]},
    "k_norm: expected dtype bfloat16": lambda a: a | {"k_norm": a["k_norm"].float()},
    r"k_scale: expected shape \[2, 64\]": lambda a: a | {"k_scale": torch.ones(64, device=a["qkv"].device)},
    "v_scale: expected dtype float32": lambda a: a | {"v_scale": torch.ones(2, 64).to(a["qkv"])},
    "k_copy, v_copy: expected both or none": lambda a: a | {"v_copy": None},
    "k_copy, v_copy: expected none without caches": lambda a: (
        a | dict.fromkeys(("k_cache", "v_cache", "slot_mapping"))
    ),
    "k_copy: expected dtype float8_e4m3fn, got bfloat16": lambda a: a | {"k_copy": a["k_copy"].to(BF16)},
    r"k_copy: expected shape \[4, 16, 2, 64\]": lambda a: a | {"k_copy": a["k_copy"].transpose(1, 2)},
    r"v_copy: expected shape \[4, 16, 2, 64\]": lambda a: a | {"v_copy": a["v_copy"][:-1]},
    "k_cache: expected the dtype of the input beside copies, got float8_e4m3fn": lambda a: (
        a | {name: a[name].to(FP8) for name in ("k_cache", "v_cache")}
    ),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_argument_is_named_and_nothing_is_written(device, message):
    good = make_inputs(device, tokens=20, copies=True)
    with pytest.raises(ValueError, match=f"rope_write_kv: {message}"):
        ops.rope_write_kv(**BAD_ARGUMENTS[message](good))
    assert all_nan(good)


@pytest.mark.cuda
def test_other_device_is_named():
    inputs = make_inputs("cuda")
    inputs["positions"] = inputs["positions"].cpu()
    with pytest.raises(ValueError, match="rope_write_kv: positions: expected device cuda:0, got cpu"):
        ops.rope_write_kv(**inputs)


@pytest.mark.cuda
def test_misaligned_cache_is_named():
    inputs = make_inputs("cuda", hkv=2, page_size=1)
    pool = torch.empty(inputs["k_cache"].numel() * 2, dtype=BF16, device="cuda")
    inputs["k_cache"] = pool[1 : 1 + inputs["k_cache"].numel()].view(inputs["k_cache"].shape)
    with pytest.raises(
        ValueError, match="rope_write_kv: k_cache: expected a start aligned to 16 bytes, got 2"
    ):
        ops.rope_write_kv(**inputs)
