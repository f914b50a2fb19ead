"""attention_schedule against a count in plain Python."""

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


def check_places(schedule, lengths, max_seq_len, num_q, hq, hkv, window) -> None:
    """Ranges lie one after the other and cover all blocks, once or once a head, for each size of units."""
    counts = plain_schedule(lengths, max_seq_len, num_q, hq, hkv, window)
    after_counts = -(-len(counts) // 4) * 4
    head_rows = hkv * -(-hq // hkv * num_q // 64)
    for places in schedule[after_counts : after_counts + PLACES].view(3, -1, 8).tolist():
        ends, taken = [], [place for place in places if place[5] > 0]
        assert places[: len(taken)] == taken
        for head_row, seq, block, blocks, length, remaining, parts, _ in taken:
            begin = ends[-1] if ends else 0
            assert head_row * counts[-1] + counts[seq] + block == begin
            assert blocks == counts[seq + 1] - counts[seq] > block
            assert length == min(max(int(lengths[seq]), 0), max_seq_len)
            ends.append(begin + remaining)
            merges = block > 0 and begin - block + blocks <= ends[-1]
            assert parts == (1 + sum(end > begin - block for end in ends[:-1]) if merges else 0)
        assert ends[-1] in (counts[-1], head_rows * counts[-1])


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
