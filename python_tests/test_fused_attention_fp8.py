"""fused_attention over e4m3 sources: what is not a matter of every cache dtype."""

import dataclasses

import pytest
import torch
from attention_cases import (
    BF16_E4M3,
    E4M3,
    F16_E4M3,
    LAYOUTS,
    SOURCES,
    check,
    make_case,
    over_dtypes,
    run,
)

FINITE = [code for code in range(256) if code & 0x7F != 0x7F]  # 0x7f and 0xff are NaN


def all_numbers(device) -> torch.Tensor:
    return torch.tensor(FINITE, dtype=torch.uint8, device=device).view(E4M3)


def test_unused_slots_hold_nan():
    """Else no test of this folder would notice a read of one."""
    case = make_case("cpu", BF16_E4M3, lengths=(5,), page_size=16)
    codes = case.k_sources[0].view(torch.uint8)
    page = case.block_table[0, 0]
    assert (codes[page, 5:] == 0x7F).all() and (codes[page, :5] & 0x7F != 0x7F).all()


@over_dtypes(F16_E4M3, BF16_E4M3)
def test_queries_out_of_range(device, dtypes):
    """A NaN stays a NaN and reaches no other row; what is too large for f16 saturates."""
    case = make_case(device, dtypes, lengths=(70, 5), head_dim=128)
    case.q[0, 0, 3, 5] = float("nan")
    case.q[1, 0, 2] = min(1e6, torch.finfo(case.q.dtype).max / 2)
    bad = run(case).isnan()
    assert bad[0, 0, 3].all()
    bad[0, 0, 3] = False
    assert not bad.any()


@over_dtypes(F16_E4M3, BF16_E4M3)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_number_as_a_value(device, dtypes, head_dim):
    """With one token the output is its value, which f16 and bf16 hold exactly."""
    batch = len(FINITE)
    case = make_case(
        device, dtypes, (1,) * batch, heads=(2, 1), head_dim=head_dim, num_k=1, num_v=1, weighted=False
    )
    numbers = all_numbers(device).float()
    rows = torch.arange(batch, device=device)
    values = numbers[
        (rows[:, None] + torch.arange(head_dim, device=device)) % batch
    ]  # differ between channels
    wide = case.v_sources[0].float()
    wide[case.block_table[:, 0].long(), 0] = values[:, None]
    case.v_sources[0].copy_(wide)
    assert torch.equal(run(case)[:, 0], values[:, None].expand(-1, 2, -1).to(dtypes[0]))


@over_dtypes(F16_E4M3, BF16_E4M3)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_number_as_a_key(device, dtypes, head_dim):
    """A key of one number in one channel, which the query makes a score of 2, beside a key of zeros."""
    numbers = all_numbers(device).float()
    numbers = numbers[numbers != 0]
    batch = len(numbers)
    case = make_case(device, dtypes, (2,) * batch, heads=(2, 1), head_dim=head_dim, page_size=2)
    rows = torch.arange(batch, device=device)
    keys = torch.zeros(batch, head_dim, device=device)
    keys[rows, rows % head_dim] = numbers
    case.q.copy_((keys / numbers[:, None].square())[:, None, None])
    for source in case.k_sources:
        wide = source.float()
        wide[case.block_table[:, 0].long()] = 0
        wide[case.block_table[:, 0].long(), 1] = keys[:, None]
        source.copy_(wide)
    case.key_weights.copy_(torch.tensor([1.5, 0.5], device=device)[:, None, None])
    case.scale = 1.0
    check(case)


@pytest.mark.parametrize("num_k, num_v", SOURCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_queries(num_k, num_v, layout):
    check(
        make_case("cpu", (torch.float32, E4M3), (0, 1, 65, 300), 3, num_k=num_k, num_v=num_v, layout=layout)
    )


@over_dtypes(F16_E4M3, BF16_E4M3)
def test_equals_dequantised_sources(dtypes):
    """On the CPU, the same numbers in sources of the dtype of q give the same bits."""
    case = make_case("cpu", dtypes, lengths=(5, 70, 300))
    wide = dataclasses.replace(
        case,
        k_sources=[s.to(dtypes[0]) for s in case.k_sources],
        v_sources=[s.to(dtypes[0]) for s in case.v_sources],
    )
    assert torch.equal(run(case), run(wide))


def to(side, index, dtype):
    def change(case):
        sources = getattr(case, side)
        sources[index] = sources[index].to(dtype)

    return change


OF_Q_OR_E4M3 = "expected dtype float16(, that of q,)? or float8_e4m3fn( on CUDA)?"
BAD_DTYPES = {
    r"k_sources\[1\]: expected dtype float8_e4m3fn, got float16": to("k_sources", 1, torch.float16),
    r"v_sources\[0\]: expected dtype float8_e4m3fn, got float16": to("v_sources", 0, torch.float16),
    r"k_sources\[1\]: expected dtype float16, got float8_e4m3fn": to("k_sources", 0, torch.float16),
    rf"v_sources\[1\]: {OF_Q_OR_E4M3}, got bfloat16": to("v_sources", 1, torch.bfloat16),
    rf"k_sources\[0\]: {OF_Q_OR_E4M3}, got float32": to("k_sources", 0, torch.float32),
    rf"k_sources\[0\]: {OF_Q_OR_E4M3}, got [Ff]loat8_e5m2": to("k_sources", 0, torch.float8_e5m2),
}


@pytest.mark.parametrize("message", BAD_DTYPES)
def test_bad_dtypes(device, message):
    case = make_case(device, F16_E4M3, lengths=(5, 70))
    BAD_DTYPES[message](case)
    with pytest.raises(ValueError, match="fused_attention: " + message):
        run(case)


@pytest.mark.cuda
@pytest.mark.parametrize("side", ["k_sources", "v_sources"])
@pytest.mark.parametrize(
    "gap, start, message",
    [(8, 0, "strides that are multiples of 16 bytes"), (16, 8, "a start aligned to 16 bytes")],
)
def test_unaligned_sources(side, gap, start, message):
    case = make_case("cuda", F16_E4M3, lengths=(5, 70))
    setattr(case, side, [torch.nn.functional.pad(s.half(), (0, gap)).to(E4M3) for s in getattr(case, side)])
    setattr(case, side, [s[..., start : start + 64] for s in getattr(case, side)])
    with pytest.raises(ValueError, match=rf"fused_attention: {side}\[0\]: expected {message}"):
        run(case)
