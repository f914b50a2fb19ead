"""What the tests of the RoPE ops share: inputs, and an oracle that does not use fusedkv_ext.reference."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


def op_checks(fp8: bool) -> tuple[str, ...]:
    """The checks of torch.library.opcheck; that of the schema compares by allclose, which float8 lacks."""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return checks if fp8 else ("test_schema", *checks)


def cos_sin_table(max_positions: int, d: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[max_positions, D]: cosines, then sines, of position * 10000^(-2j/D)."""
    angles = torch.arange(max_positions).double()[:, None] * 1e4 ** (-torch.arange(0, d, 2).double() / d)
    return torch.cat((angles.cos(), angles.sin()), -1).to(device, dtype)


def make_positions(tokens: int, table: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Positions in any order; every seventh token's lies outside the table."""
    positions = torch.randint(table.shape[0], (tokens,))
    positions[3::14] = -1
    positions[10::14] = table.shape[0]
    return positions.to(table.device, dtype)


def make_caches(
    tokens: int, page_size: int, heads: int, d: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """NaN-filled key and value caches, views of one pool with gaps, and slots scattered over their pages.

    Every fifth slot is outside the cache.
    """
    pages = (2 * tokens + 2) // page_size + 2
    pool = torch.full((pages, page_size, 2 * heads + 1, d), float("nan")).to(device, dtype)
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[2::10] = -1
    slots[7::10] = pages * page_size
    return pool[:, :, :heads], pool[:, :, heads : 2 * heads], slots.to(device)


def make_copies(cache: Tensor) -> tuple[Tensor, Tensor]:
    """NaN-filled e4m3 key and value copies of the shape of `cache`, with the heads outside the tokens."""
    pages, page_size, heads, d = cache.shape
    filled = [torch.full((pages, heads, page_size, d), float("nan")) for _ in range(2)]
    return tuple(x.to(cache.device, FP8).transpose(1, 2) for x in filled)


def finish_heads(
    heads: Tensor,
    positions: Tensor,
    table: Tensor,
    norm: Tensor | None,
    eps: float,
    interleaved: bool,
    wide: torch.dtype,
) -> Tensor:
    """RMSNorm and RoPE of heads [T, H, D] at precision `wide`: each pair is a complex number to turn."""
    heads, d = heads.to(wide), heads.shape[-1]
    if norm is not None:
        heads = heads / (heads.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.to(wide)
    channels = torch.arange(d, device=heads.device)
    first = channels[::2] if interleaved else channels[: d // 2]
    second = first + (1 if interleaved else d // 2)
    pairs = torch.complex(heads[..., first], heads[..., second])
    inside = (positions >= 0) & (positions < table.shape[0])
    padded = torch.cat((table, torch.full_like(table[:1], float("nan")))).to(wide)
    rows = padded[torch.where(inside, positions, table.shape[0])]
    turned = pairs * torch.complex(rows[:, : d // 2], rows[:, d // 2 :])[:, None]
    out = torch.empty_like(heads)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def written(
    cache: Tensor, rows: Tensor, slots: Tensor, positions: Tensor, table: Tensor, scale: Tensor | None
) -> Tensor:
    """What the NaN-filled cache should hold after the write of rows [T, H, D], before rounding."""
    expected = torch.full(cache.shape, float("nan"), dtype=rows.dtype, device=rows.device)
    num_pages, page_size = cache.shape[:2]
    for row, slot, position in zip(rows, slots.tolist(), positions.tolist(), strict=True):
        if 0 <= slot < num_pages * page_size and 0 <= position < table.shape[0]:
            value = row if scale is None else row / scale.to(row.dtype)
            expected[slot // page_size, slot % page_size] = (
                value.clamp(-448, 448) if cache.dtype == FP8 else value
            )
    return expected


def written_sides(inputs: dict, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """`written` for the caches and, where the inputs have them, the copies, to which the scales then belong.

    rows: of "k" and "v".
    """
    indices = [inputs[name] for name in ("slot_mapping", "positions", "cos_sin")]
    results = {}
    for side, x in rows.items():
        cache, copy, scale = (inputs[f"{side}_{name}"] for name in ("cache", "copy", "scale"))
        results[f"{side}_cache"] = written(cache, x, *indices, scale if copy is None else None)
        if copy is not None:
            results[f"{side}_copy"] = written(copy, x, *indices, scale)
    return results


def outputs(inputs: dict) -> dict[str, Tensor]:
    """What the op of these inputs writes."""
    names = ("q_out", "k_cache", "v_cache", "k_copy", "v_copy")
    return {name: inputs[name] for name in names if inputs[name] is not None}


def all_nan(inputs: dict) -> bool:
    return all(x.float().isnan().all() for x in outputs(inputs).values())


def same_outputs(inputs: dict, others: dict) -> bool:
    pairs = zip(outputs(inputs).values(), outputs(others).values(), strict=True)
    return all(torch.equal(a.float().nan_to_num(9.0), b.float().nan_to_num(9.0)) for a, b in pairs)


def change_indices(inputs: dict) -> None:
    """Give every token another position and, where there are slots, another slot, in place."""
    for name in ("positions", "slot_mapping"):
        if inputs.get(name) is not None:
            inputs[name].copy_(inputs[name].roll(1))
