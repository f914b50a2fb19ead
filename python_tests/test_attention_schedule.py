"""attention_schedule against a count in plain Python."""

from itertools import pairwise

import pytest
import torch

from fusedkv_ext import ops

EMPTY = 0xFFF5EED5 - 2**32  # kEmpty of schedule.cuh
PLACES = 3 * 192 * 8  # words


def plain_schedule(lengths, max_seq_len, num_q, hq, hkv, window) -> list[int]:
    """Cumulative counts of the 64-token blocks that some query token sees, at least one each."""
    ends = [0]
    for length in lengths.clamp(0, max_seq_len).tolist():
        first = max(0, length - num_q - window + 1) if window else 0  # what the first query token sees
        ends.append(ends[-1] + max(1, len({token // 64 for token in range(first, length)})))
    return ends


def counts_of(schedule, batch) -> list[int]:
    """What `plain_schedule` has; on CUDA zeros up to 16 bytes, places and empty partial results follow."""
    counts, rest = schedule.tolist()[: batch + 1], schedule[batch + 1 :]
    padding = -(batch + 1) % 4
    partials = rest[padding + PLACES :]
    assert not rest[:padding].any() and (partials == EMPTY).all()
    assert len(rest) == 0 or len(partials) >= 8 * 132
    return counts


def most_ranges(head_rows) -> tuple[int, bool]:
    """Of the batch or, where the heads do not go in step, of all heads."""
    workers = min(torch.cuda.get_device_properties("cuda").multi_processor_count, 192)
    in_step = head_rows == 1 or workers // head_rows * head_rows * 10 >= workers * 9
    return (workers // head_rows if in_step else workers), in_step


def places_of(schedule, batch) -> list[list[list[int]]]:
    """Those of ranges that take blocks, for units of 1, 2 and 4 blocks."""
    after_counts = -(-(batch + 1) // 4) * 4
    sizes = schedule[after_counts : after_counts + PLACES].view(3, -1, 8).tolist()
    taken = [[place for place in places if place[5] > 0] for places in sizes]
    assert all(places[: len(found)] == found for places, found in zip(sizes, taken, strict=True))
    return taken


def plain_begins(counts, rows, ranges, unit, is_long) -> list[int]:
    """Where ranges begin, and the end: at equal distances, to the nearest unit of their sequence.

    Where they are long, the beginning of a sequence counts for half a unit too.
    """
    batch, cost, step = len(counts) - 1, unit // 2 if is_long else 0, unit if is_long else 1
    size = counts[-1] + cost * batch
    begins = []
    for i in range(ranges):
        row, at = divmod(i * size * rows // ranges, size)
        seq = max(j for j in range(batch) if counts[j] + cost * j <= at)
        block = at - counts[seq] - cost * (seq + 1)
        rounded = max(0, block + step // 2) // step * step
        begins.append(row * counts[-1] + min(counts[seq] + rounded, counts[seq + 1]))
    return [*begins, rows * counts[-1]]


def longest(begins, counts, rows, unit) -> int:
    """Blocks of the range that takes longest, in whole units; a sequence in it takes half a unit besides."""
    starts = [row * counts[-1] + count for row in range(rows) for count in counts[:-1]]
    return max(
        -(-(end - begin) // unit) * unit + (1 + sum(begin < x < end for x in starts)) * (unit // 2)
        for begin, end in pairwise(begins)
        if end > begin
    )


def check_places(schedule, lengths, max_seq_len, num_q, hq, hkv, window) -> None:
    """Ranges lie one after the other and cover all blocks, once or once a head, for each size of units.

    Short ones are equal. Long ones are equal where the beginning of a sequence counts for half a unit, but
    for the unit to which they are rounded at both ends and what a beginning costs, which may lie in two of
    them. They are fewer than there are workers where the longest is then no longer.
    """
    counts = plain_schedule(lengths, max_seq_len, num_q, hq, hkv, window)
    head_rows = hkv * -(-hq // hkv * num_q // 64)
    most, in_step = most_ranges(head_rows)
    rows = 1 if in_step else head_rows
    for unit, taken in zip((1, 2, 4), places_of(schedule, len(lengths)), strict=True):
        cost = unit // 2
        is_long = rows * counts[-1] // most >= unit + cost
        ends, items = [], []
        for head_row, seq, block, blocks, length, remaining, part, parts in taken:
            begin = ends[-1] if ends else 0
            assert head_row * counts[-1] + counts[seq] + block == begin
            assert blocks == counts[seq + 1] - counts[seq] > block
            assert length == min(max(int(lengths[seq]), 0), max_seq_len)
            assert not is_long or block % unit == 0
            ends.append(begin + remaining)
            items.append((block, begin - block, begin - block + blocks, (part, parts)))
        assert ends[-1] == rows * counts[-1]
        begins = [0, *ends[:-1]]
        for i, (block, first, last, found) in enumerate(items):
            sharers = [j for j, end in enumerate(ends) if begins[j] < last and end > first]
            assert found == ((i - sharers[0], len(sharers)) if block > 0 else (0, 0))
        units = -(-ends[-1] // unit)
        full, few = (most, -(-units // -(-units // most))) if is_long else (min(most, units),) * 2
        full, few = (plain_begins(counts, rows, ranges, unit, is_long) for ranges in (full, few))
        is_no_longer = longest(few, counts, rows, unit) <= longest(full, counts, rows, unit)
        assert [*begins, ends[-1]] == (few if is_no_longer else full)
        starts = [row * counts[-1] + count for row in range(rows) for count in counts[:-1]]
        weights = [
            end - begin + (cost if is_long else 0) * sum(begin <= x < end for x in starts)
            for begin, end in pairwise([0, *ends])
        ]
        assert max(weights) - min(weights) <= 1 + (3 * unit if is_long and unit > 1 else 0)


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize("num_q", [1, 16])
def test_schedule(device, window, num_q):
    lengths = torch.tensor([0, 1, 64, 65, 70, 79, 80, 81, 135, 1000, -4, 10**8], dtype=torch.int32)
    args = (512, num_q, 24, 2, window)
    got = ops.attention_schedule(lengths.to(device), *args)
    assert got.dtype == torch.int32 and counts_of(got, len(lengths)) == plain_schedule(lengths, *args)
    if device == "cuda":
        check_places(got, lengths, *args)


def test_schedule_of_many_sequences(device):
    lengths = torch.randint(0, 5000, (1500,), dtype=torch.int32)
    args = (4096, 1, 8, 8, 0)
    got = ops.attention_schedule(lengths.to(device), *args)
    assert counts_of(got, len(lengths)) == plain_schedule(lengths, *args)
    if device == "cuda":
        check_places(got, lengths, *args)


@pytest.mark.cuda
@pytest.mark.parametrize("ranges_a_sequence", [1, 2, 4])
def test_what_can_be_split_evenly_is(ranges_a_sequence):
    """The cost of a beginning moves no end of a range when all sequences have as many of them."""
    most, in_step = most_ranges(8)
    if not in_step or most % ranges_a_sequence:
        pytest.skip(f"{most} ranges, in step: {in_step}")
    lengths = torch.full((most // ranges_a_sequence,), 8192, dtype=torch.int32)
    schedule = ops.attention_schedule(lengths.cuda(), 8192, 1, 32, 8)
    for places in places_of(schedule, len(lengths)):
        assert {place[5] for place in places} == {128 // ranges_a_sequence}


def test_too_many_blocks(device):
    lengths = torch.zeros(129, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"max_seq_len: expected fewer than 2\^31 blocks of 64 tokens"):
        ops.attention_schedule(lengths, 2**31 - 1, 1, 2, 2)


def test_bad_schedule_arguments(device):
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="attention_schedule: num_query_heads: expected a multiple"):
        ops.attention_schedule(lengths, 512, 1, 7, 2)
    with pytest.raises(ValueError, match="attention_schedule: num_query_tokens: expected 1 to 16, got 17"):
        ops.attention_schedule(lengths, 512, 17, 8, 2)


def test_opcheck(device):
    lengths = torch.tensor([5, 70], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.fusedkv.attention_schedule, (lengths, 512, 1, 8, 2))
