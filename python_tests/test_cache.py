import pytest
import tiny
import torch

from fusedkv_ext import CrossLayerPlan, PagedKVCache


def make(num_pages=6, page_size=4, max_batch=3, plan="fusedkv", **options) -> PagedKVCache:
    return PagedKVCache(tiny.config(plan), num_pages, page_size, max_batch, **options)


NBYTES_PLANS = {
    **tiny.PLANS,
    "fusedkv_2": CrossLayerPlan.fusedkv(6, n=2),
    "yoco_5": CrossLayerPlan.yoco(6, n=5),
}


@pytest.mark.parametrize("plan", NBYTES_PLANS.values(), ids=NBYTES_PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nbytes_is_the_papers_share_of_vanilla(plan, dtype):
    """The paper's Table 1: 2 S Hkv D elements a storage layer, where vanilla has 2 L S Hkv D."""
    config = tiny.config(plan)
    cache, vanilla = (PagedKVCache(c, 10, page_size=8, dtype=dtype) for c in (config, tiny.config("vanilla")))
    assert vanilla.nbytes == 2 * 6 * 80 * config.num_kv_heads * config.head_dim * dtype.itemsize
    assert cache.nbytes * 6 == vanilla.nbytes * len(plan.storage_layers)
    assert cache.vanilla_nbytes == vanilla.nbytes == vanilla.vanilla_nbytes
    assert cache.keys.keys() == cache.values.keys() == set(plan.storage_layers)


def test_pages_are_reserved_and_given_back():
    cache = make()
    first, second = cache.add([5, 16])
    assert (cache.capacity(first), cache.capacity(second), cache.num_free_pages) == (8, 16, 0)
    pages = cache.block_table[[first, second]]
    taken = pages[pages >= 0].tolist()
    assert sorted(taken) == list(range(6))
    cache.free([second])
    assert cache.num_free_pages == 4 and (cache.block_table[second] == -1).all()
    cache.extend(first, 20)
    assert cache.capacity(first) == 20 and cache.num_free_pages == 1
    assert cache.block_table[first, :2].tolist() == pages[0, :2].tolist(), "extending must keep old pages"
    cache.extend(first, 3)
    assert cache.capacity(first) == 20
    cache.free([first])
    assert cache.num_free_pages == 6


def test_a_full_cache_changes_nothing():
    cache = make(max_batch=4)
    row, _ = cache.add([9, 1])
    table = cache.block_table.clone()
    for action in (
        lambda: cache.add([4, 8]),  # the first of the two would fit
        lambda: cache.extend(row, 24),
    ):
        with pytest.raises(ValueError, match=r"cache full: expected at most 2 free pages.*got 3 pages"):
            action()
    assert cache.num_free_pages == 2 and torch.equal(cache.block_table, table)
    assert cache.add([4, 4]) == [2, 3]


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda cache: cache.add([]), "capacities: expected at least one sequence, got 0"),
        (lambda cache: cache.add([1, 1, 1]), "rows: expected 3 free sequences, got 2"),
        (lambda cache: cache.add([25]), "capacity: expected 1 to 24 tokens a sequence, got 25"),
        (lambda cache: cache.add([0]), "capacity: expected 1 to 24 tokens a sequence, got 0"),
        (lambda cache: cache.extend(2, 4), r"rows: expected rows in use, \[0\], got 2"),
        (lambda cache: cache.free([0, 0]), r"rows: expected different rows, got \[0, 0\]"),
        (lambda cache: cache.free([7]), r"rows: expected rows in use, \[0\], got 7"),
        (lambda cache: cache.length(1), r"rows: expected rows in use, \[0\], got 1"),
        (lambda cache: cache.prefill_chunk([0], [7]), "row 0: expected at most 8 tokens in its pages, got 9"),
        (lambda cache: cache.advance([0], [7]), "row 0: expected at most 8 tokens in its pages, got 9"),
        (lambda cache: cache.check_append([-1], [1]), r"rows: expected rows in use, \[0\], got -1"),
        (lambda cache: cache.check_append([0], [0]), r"counts: expected 1 positive numbers.*got \[0\]"),
        (lambda cache: cache.advance([0], [-1]), r"counts: expected 1 positive numbers.*got \[-1\]"),
        (lambda cache: cache.advance([0], [1, 1]), r"counts: expected 1 positive numbers.*got \[1, 1\]"),
        (lambda cache: cache.advance([0], []), r"counts: expected 1 positive numbers.*got \[\]"),
        (lambda cache: cache.prefill_chunk([0], [1, 2]), r"counts: expected 1 positive numbers"),
    ],
)
def test_bad_calls_change_nothing(action, message):
    cache = make()
    cache.add([5])
    cache.advance([0], [2])
    before = (cache.num_free_pages, cache.block_table.clone(), cache.seq_lens.clone())
    with pytest.raises(ValueError, match=message):
        action(cache)
    assert cache.num_free_pages == before[0] and cache.length(0) == 2
    assert torch.equal(cache.block_table, before[1]) and torch.equal(cache.seq_lens, before[2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_pages": 0}, "num_pages: expected a positive integer, got 0"),
        ({"page_size": -1}, "page_size: expected a positive integer, got -1"),
        ({"max_batch": 1.5}, r"max_batch: expected a positive integer, got 1\.5"),
        ({"dtype": torch.int8}, r"dtype: expected .* on cpu, got torch\.int8"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.cuda
def test_cuda_refuses_what_its_kernels_lack():
    with pytest.raises(ValueError, match=r"dtype: expected .* on cuda, got torch\.float32"):
        make(device="cuda")
    with pytest.raises(ValueError, match="head_dim: expected 64 or 128 on cuda, got 16"):
        make(device="cuda", dtype=torch.bfloat16)


def test_decode_step_finds_slots_and_advances(device):
    shape = dict(head_dim=64) if device == "cuda" else {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = tiny.config(CrossLayerPlan.vanilla(6), **shape)
    cache = PagedKVCache(config, 6, 4, 3, dtype=dtype, device=device)
    rows = cache.add([8, 8, 4])
    cache.advance(rows, [4, 7, 4])
    step = cache.decode_step(
        torch.tensor(rows, device=device), torch.tensor([True, False, True], device=device)
    )
    page = cache.block_table[0, 1].item()
    assert step.slot_mapping.tolist() == [page * 4, -1, -1], "row 1 is inactive, row 2 is full"
    assert step.positions.tolist() == [4, 7, 4]
    assert step.seq_lens.tolist() == [5, 0, 0] and cache.seq_lens.tolist() == [4, 7, 4]
    step.commit()
    assert cache.seq_lens.tolist() == [5, 7, 4]
