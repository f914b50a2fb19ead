"""decode_places against a loop over the sequences in plain Python."""

import pytest
import torch
from arguments import moved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedkv_ext import ops

NAMES = ("positions", "slot_mapping", "table", "lens", "lengths")
DTYPES = (torch.int32, torch.int64, torch.int32, torch.int32, torch.int32)


def plain(seq_lens, block_table, rows, active, page_size) -> dict[str, list]:
    out = {name: [] for name in NAMES}
    lens, tables = seq_lens.tolist(), block_table.tolist()
    for i, row in enumerate(rows.tolist()):
        known = 0 <= row < len(lens)
        before = lens[row] if known else 0
        table = tables[row] if known else [-1] * block_table.shape[1]
        page = table[before // page_size] if 0 <= before < len(table) * page_size else -1
        written = page >= 0 and (active is None or bool(active[i]))
        out["positions"].append(before)
        out["slot_mapping"].append(page * page_size + before % page_size if written else -1)
        out["table"].append(table)
        out["lens"].append(before + 1 if written else 0)
        out["lengths"].append(before + written)
    return out


def check(seq_lens, block_table, rows, active, page_size) -> None:
    inputs = [x if x is None else x.clone() for x in (seq_lens, block_table, rows, active)]
    outputs = ops.decode_places(seq_lens, block_table, rows, active, page_size)
    for x, before in zip((seq_lens, block_table, rows, active), inputs, strict=True):
        assert x is None or torch.equal(x, before)
    wanted = plain(*(x if x is None else x.cpu() for x in inputs), page_size)
    for name, dtype, got in zip(NAMES, DTYPES, outputs, strict=True):
        assert got.dtype == dtype and got.is_contiguous() and got.device == seq_lens.device, name
        assert got.tolist() == wanted[name], name
    assert outputs[2].shape == (len(rows), block_table.shape[1])


def cache(lens, table, device):
    return (torch.tensor(x, dtype=torch.int32, device=device) for x in (lens, table))


def test_example(device):
    """A new page, the middle of one, no page, not active, full to the end of the table, and an empty row."""
    seq_lens, table = cache(
        [4, 6, 4, 1, 8, 0], [[7, 5], [3, 2], [9, -1], [4, -1], [1, 6], [8, -1]], device=device
    )
    rows = torch.tensor([5, 0, 1, 2, 3, 4], device=device)
    active = torch.tensor([True, True, True, True, False, True], device=device)
    positions, slots, gathered, lens, lengths = ops.decode_places(seq_lens, table, rows, active, 4)
    assert positions.tolist() == [0, 4, 6, 4, 1, 8]
    assert slots.tolist() == [32, 20, 10, -1, -1, -1]
    assert lens.tolist() == [1, 5, 7, 0, 0, 0] and lengths.tolist() == [1, 5, 7, 4, 1, 8]
    assert gathered.tolist() == [[8, -1], [7, 5], [3, 2], [9, -1], [4, -1], [1, 6]]


# From a CUDA device's point of view any of these would be a read outside of the cache.
@pytest.mark.parametrize("row", [-1, -4, 3, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_a_row_outside_is_not_written(device, row):
    seq_lens, table = cache([1, 2, 3], [[5], [6], [7]], device)
    rows = torch.tensor([1, row], device=device)
    outputs = ops.decode_places(seq_lens, table, rows, None, 4)
    assert [x.tolist() for x in outputs] == [[2, 0], [26, -1], [[6], [-1]], [3, 0], [3, 0]]


@pytest.mark.parametrize("length", [-1, -(2**31), 8, 9, 2**31 - 1])
def test_a_length_outside_is_not_written(device, length):
    seq_lens, table = cache([length], [[5, 6]], device)
    check(seq_lens, table, torch.tensor([0], device=device), None, 4)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 40),
    num_rows=st.integers(1, 20),
    max_pages=st.integers(1, 300),
    page_size=st.integers(1, 300),
    gap=st.integers(0, 3),
    outside=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(device, batch, num_rows, max_pages, page_size, gap, outside, masked, seed):
    torch.manual_seed(seed)
    longest = max_pages * page_size
    seq_lens = torch.randint(-2 if outside else 0, longest + 2, (num_rows,), dtype=torch.int32)
    wide = torch.randint(0, 2**20, (num_rows, max_pages + gap), dtype=torch.int32)
    table = wide[:, :max_pages]
    table[torch.rand(table.shape) < 0.2] = -1
    beyond = num_rows if outside else 0
    rows = torch.randint(-beyond, num_rows + beyond, (batch,))
    active = torch.rand(batch) < 0.7 if masked else None
    table = wide.to(device)[:, :max_pages]
    active = active if active is None else active.to(device)
    check(seq_lens.to(device), table, rows.to(device), active, page_size)


def test_slots_are_64_bit(device):
    seq_lens, table = cache([5], [[2**31 - 1]], device)
    _, slots, *_ = ops.decode_places(seq_lens, table, torch.tensor([0], device=device), None, 64)
    assert slots.tolist() == [(2**31 - 1) * 64 + 5]


def test_opcheck(device):
    seq_lens, table = cache([1, 2, 3], [[5, 4], [6, 3], [7, 2]], device)
    rows = torch.tensor([2, 0], device=device)
    for active in (None, torch.tensor([True, False], device=device)):
        torch.library.opcheck(torch.ops.fusedkv.decode_places.default, (seq_lens, table, rows, active, 4))


ARGUMENTS = dict(
    seq_lens=torch.zeros(3, dtype=torch.int32),
    block_table=torch.zeros(3, 2, dtype=torch.int32),
    rows=torch.zeros(2, dtype=torch.int64),
    active=torch.ones(2, dtype=torch.bool),
    page_size=16,
)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("seq_lens", torch.zeros(3, dtype=torch.int64), "expected dtype int32, got int64"),
        ("seq_lens", torch.zeros(3, 1, dtype=torch.int32), r"expected shape \[\*\], got \[3, 1\]"),
        ("seq_lens", torch.zeros(6, dtype=torch.int32)[::2], "expected stride 1 in the last dim.*, got 2"),
        ("block_table", torch.zeros(3, 2, dtype=torch.int64), "expected dtype int32, got int64"),
        ("block_table", torch.zeros(4, 2, dtype=torch.int32), r"expected shape \[3, \*\], got \[4, 2\]"),
        ("block_table", torch.zeros(3, 0, dtype=torch.int32), r"expected at least one row and .*\[3, 0\]"),
        ("block_table", torch.zeros(2, 3, dtype=torch.int32).t(), "expected stride 1 in the last dimension"),
        ("rows", torch.zeros(2, dtype=torch.int32), "expected dtype int64, got int32"),
        ("rows", torch.zeros(1, 2, dtype=torch.int64), r"expected shape \[\*\], got \[1, 2\]"),
        ("rows", torch.zeros(2, dtype=torch.int64, device="meta"), "expected device .*, got meta"),
        ("active", torch.ones(2, dtype=torch.uint8), "expected dtype bool, got "),
        ("active", torch.ones(3, dtype=torch.bool), r"expected shape \[2\], got \[3\]"),
        ("page_size", 0, r"expected 1 to 2\^31 - 1, got 0"),
        ("page_size", 2**31, r"expected 1 to 2\^31 - 1, got 2147483648"),
    ],
)
def test_bad_argument(device, argument, value, message):
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in ARGUMENTS.items()}
    arguments[argument] = moved(value, device) if torch.is_tensor(value) else value
    with pytest.raises(ValueError, match=f"^decode_places: {argument}: {message}"):
        ops.decode_places(**arguments)


@pytest.mark.cuda
def test_graph_replays_with_new_lengths():
    seq_lens, table = cache([0, 3], [[5, 4], [6, 3]], "cuda")
    rows, active = torch.tensor([1, 0], device="cuda"), torch.tensor([True, True], device="cuda")
    ops.decode_places(seq_lens, table, rows, active, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.decode_places(seq_lens, table, rows, active, 4)
        seq_lens[rows] = captured[-1]
    for step in range(6):
        active[0] = step != 2
        wanted = plain(*(x.cpu() for x in (seq_lens, table, rows, active)), 4)
        graph.replay()
        assert {name: x.tolist() for name, x in zip(NAMES, captured, strict=True)} == wanted
