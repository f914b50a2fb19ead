"""accept_tokens against a loop over the sequences in plain Python."""

import pytest
import torch
from arguments import moved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedkv_ext import ops

DONE = -1


def arguments(batch, steps, count, stops, commits, outside=False) -> dict[str, torch.Tensor]:
    """Seeded by torch's generator. Rows are different ones."""
    num_rows = batch + 2
    given = dict(
        chosen=torch.randint(0, 10, (batch,)),
        stop_tokens=torch.tensor(stops, dtype=torch.int64),
        active=torch.rand(batch) < 0.7,
        tokens=torch.randint(10, 20, (batch,)),
        emitted=torch.randint(100, 200, (steps, batch)),
        count=torch.tensor([count]),
    )
    if commits:
        given["seq_lens"] = torch.randint(0, 100, (num_rows,), dtype=torch.int32)
        given["rows"] = torch.randperm(num_rows)[:batch]
        given["lengths"] = torch.randint(200, 300, (batch,), dtype=torch.int32)
        if outside:
            given["rows"][::2] += num_rows
            given["rows"][1::4] -= num_rows
    return given


def plain(chosen, stop_tokens, active, tokens, emitted, count, seq_lens=None, rows=None, lengths=None):
    """What the mutated arguments become."""
    out = dict(active=active.tolist(), tokens=tokens.tolist(), emitted=emitted.tolist())
    for i, token in enumerate(chosen.tolist()):
        out["active"][i] &= token not in stop_tokens.tolist()
        if out["active"][i]:
            out["tokens"][i] = token
        if 0 <= count.item() < len(out["emitted"]):
            out["emitted"][count.item()][i] = token if out["active"][i] else DONE
    out["count"] = [count.item() + 1]
    if seq_lens is not None:
        out["seq_lens"] = seq_lens.tolist()
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            if 0 <= row < len(seq_lens):
                out["seq_lens"][row] = length
    return out


def check(given, device) -> None:
    wanted = plain(**given)
    on_device = {name: x.to(device, copy=True) for name, x in given.items()}
    assert ops.accept_tokens(**on_device) is None
    for name, x in on_device.items():
        assert x.tolist() == wanted.get(name, given[name].tolist()), name


@pytest.mark.parametrize("commits", [False, True])
@pytest.mark.parametrize("stops", [[], [3], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("batch", [0, 1, 5, 255, 257, 600])
def test_matches_oracle(device, batch, stops, commits):
    for count in range(3):
        check(arguments(batch, 3, count, stops, commits), device)


def test_example(device):
    """One goes on, one stops, one had stopped."""
    active = torch.tensor([True, True, False], device=device)
    chosen = torch.tensor([4, 2, 5], device=device)
    tokens, emitted = torch.tensor([7, 8, 9], device=device), torch.full((2, 3), 6, device=device)
    count, stops = torch.tensor([1], device=device), torch.tensor([2], device=device)
    ops.accept_tokens(chosen, stops, active, tokens, emitted, count)
    assert active.tolist() == [True, False, False] and tokens.tolist() == [4, 8, 9]
    assert emitted.tolist() == [[6, 6, 6], [4, DONE, DONE]] and count.tolist() == [2]


@pytest.mark.parametrize("count", [-1, 3, 2**40, -(2**40)])
def test_a_count_outside_emits_nothing(device, count):
    """Nor is anything beside `emitted` written."""
    given = arguments(5, 3, count, [1], True)
    around = torch.full((9, 5), 77, device=device)
    emitted = around[3:6]
    on_device = {name: x.to(device) for name, x in given.items()} | {"emitted": emitted}
    ops.accept_tokens(**on_device)
    assert (around == 77).all()
    assert on_device["count"].tolist() == [count + 1]
    assert on_device["tokens"].tolist() == plain(**given)["tokens"]


def test_rows_outside_are_skipped(device):
    check(arguments(40, 2, 0, [1], True, outside=True), device)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 40),
    steps=st.integers(0, 4),
    count=st.integers(-2, 6),
    stops=st.lists(st.integers(-1, 12), max_size=5),
    commits=st.booleans(),
    outside=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(device, batch, steps, count, stops, commits, outside, seed):
    torch.manual_seed(seed)
    check(arguments(batch, steps, count, stops, commits, outside), device)


def test_opcheck(device):
    for commits in (False, True):
        given = {name: x.to(device) for name, x in arguments(5, 3, 1, [1, 2], commits).items()}
        torch.library.opcheck(torch.ops.fusedkv.accept_tokens.default, (), given)


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("chosen", torch.zeros(5, dtype=torch.int32), "expected dtype int64, got int32"),
        ("chosen", torch.zeros(5, 1, dtype=torch.int64), r"expected shape \[\*\], got \[5, 1\]"),
        ("stop_tokens", torch.zeros(1, dtype=torch.int32), "expected dtype int64, got int32"),
        ("stop_tokens", torch.zeros(1, dtype=torch.int64, device="meta"), "expected device .*, got meta"),
        ("active", torch.zeros(5, dtype=torch.int64), "expected dtype bool, got int64"),
        ("active", torch.zeros(4, dtype=torch.bool), r"expected shape \[5\], got \[4\]"),
        ("tokens", torch.zeros(6, dtype=torch.int64), r"expected shape \[5\], got \[6\]"),
        ("emitted", torch.zeros(3, 4, dtype=torch.int64), r"expected shape \[\*, 5\], got \[3, 4\]"),
        ("emitted", torch.zeros(3, 5, dtype=torch.int64)[::2], "expected a contiguous tensor, got strides"),
        ("count", torch.zeros((), dtype=torch.int64), r"expected shape \[1\], got \[\]"),
        ("count", torch.zeros(1, dtype=torch.int32), "expected dtype int64, got int32"),
        ("seq_lens", torch.zeros(7, dtype=torch.int64), "expected dtype int32, got int64"),
        ("rows", torch.zeros(5, dtype=torch.int32), "expected dtype int64, got int32"),
        ("rows", torch.zeros(4, dtype=torch.int64), r"expected shape \[5\], got \[4\]"),
        ("lengths", torch.zeros(5, dtype=torch.int64), "expected dtype int32, got int64"),
        ("seq_lens, rows, lengths", None, "expected all or none of them, got 2 of 3"),
    ],
)
def test_bad_argument(device, argument, value, message):
    """Nothing is written then."""
    given = {name: x.to(device) for name, x in arguments(5, 3, 1, [1], True).items()}
    if value is None:
        del given["rows"]
    else:
        given[argument] = moved(value, device)
    before = {name: x.clone() for name, x in given.items()}
    with pytest.raises(ValueError, match=f"^accept_tokens: {argument}: {message}"):
        ops.accept_tokens(**given)
    assert all(x.is_meta or torch.equal(x, before[name]) for name, x in given.items())


@pytest.mark.cuda
def test_graph_replays_count_the_steps():
    steps = 6
    given = {name: x.cuda() for name, x in arguments(5, steps, 0, [1], True).items()}
    given["active"].fill_(True)
    state = {name: x.cpu() for name, x in given.items()}
    ops.accept_tokens(**{name: x.clone() for name, x in given.items()})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.accept_tokens(**given)
    for _ in range(steps + 1):  # the last one is outside
        given["chosen"].random_(0, 10)
        state["chosen"] = given["chosen"].cpu()
        after = plain(**state)
        state |= {name: torch.tensor(x, dtype=state[name].dtype) for name, x in after.items()}
        graph.replay()
        assert all(torch.equal(x.cpu(), state[name]) for name, x in given.items())
