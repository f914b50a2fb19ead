"""fused_attention against plain torch that does not use fusedkv_ext.reference."""

import dataclasses

import pytest
import torch
from attention_cases import (
    BF16,
    BF16_E4M3,
    F16,
    F16_E4M3,
    HUGE,
    LAYOUTS,
    SOURCES,
    check,
    make_case,
    over_dtypes,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_cases import op_checks

from fusedkv_ext import ops


@over_dtypes(F16, BF16, F16_E4M3, BF16_E4M3)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_k, num_v", SOURCES)
def test_sources(device, dtypes, head_dim, num_k, num_v):
    check(make_case(device, dtypes, (0, 1, 63, 64, 65, 300), 1, (12, 4), head_dim, 16, num_k, num_v))


# Query heads of a group x query tokens: 1 to 80 query rows, on both sides of every shape of the kernel.
ROWS = [(1, 1), (1, 4), (4, 2), (3, 3), (16, 1), (17, 1), (2, 16), (11, 3), (8, 8), (5, 13), (10, 8)]


@over_dtypes(F16, BF16, BF16_E4M3)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("group, num_q", ROWS)
def test_kernel_shapes(device, dtypes, head_dim, sources, group, num_q):
    lengths = (0, 2, 64, 290)
    check(make_case(device, dtypes, lengths, num_q, (2 * group, 2), head_dim, 16, sources, sources))


@pytest.mark.parametrize("group", [1, 2, 7, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("num_q", [1, 3, 16])
def test_rows(device, group, num_q):
    check(make_case(device, lengths=(2, 16, 200), num_q=num_q, heads=(2 * group, 2)))


@over_dtypes(BF16, BF16_E4M3)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 24, 64, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_and_layouts(device, dtypes, head_dim, page_size, layout):
    lengths = (0, 1, 63, 64, 65, 1000)
    check(make_case(device, dtypes, lengths, page_size=page_size, layout=layout, head_dim=head_dim))


@over_dtypes(BF16, BF16_E4M3)
def test_keys_and_values_laid_out_differently(device, dtypes):
    case = make_case(device, dtypes, lengths=(3, 100), page_size=24)
    case.v_sources = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in case.v_sources]
    check(case)


@over_dtypes(BF16, BF16_E4M3)
@pytest.mark.parametrize("window", [1, 17, 64, 100, 1000])
@pytest.mark.parametrize("num_q", [1, 5, 16])
def test_window(device, dtypes, window, num_q):
    check(make_case(device, dtypes, lengths=(0, 4, 90, 400), num_q=num_q, window=window))


@over_dtypes(BF16, BF16_E4M3)
@pytest.mark.parametrize("weighted", [True, False])
def test_without_weights_sources_count_once(device, dtypes, weighted):
    check(make_case(device, dtypes, lengths=(70,), weighted=weighted))


@pytest.mark.cuda
@over_dtypes(BF16, BF16_E4M3)
@pytest.mark.parametrize("lengths", [(20000,), (9000, 1, 0, 130, 5000), (1,) * 300, (64,) * 133])
@pytest.mark.parametrize("heads, num_q", [((8, 1), 1), ((8, 1), 16), ((32, 8), 1), ((16, 4), 8), ((4, 4), 1)])
def test_split_sequences(dtypes, lengths, heads, num_q):
    check(make_case("cuda", dtypes, lengths, heads=heads, head_dim=128, page_size=64, num_q=num_q))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    num_q=st.integers(1, 16),
    hkv=st.integers(1, 4),
    group=st.integers(1, 20),
    head_dim=st.sampled_from([64, 128]),
    page_size=st.integers(1, 130),
    sources=st.sampled_from(SOURCES),
    weighted=st.booleans(),
    window=st.sampled_from([0, 0, 1, 31, 200]),
    layout=st.sampled_from(LAYOUTS),
    dtypes=st.sampled_from([F16, BF16, F16_E4M3, BF16_E4M3]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(
    lengths, num_q, hkv, group, head_dim, page_size, sources, weighted, window, layout, dtypes, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = (hkv * group, hkv)
    check(
        make_case(
            device, dtypes, lengths, num_q, heads, head_dim, page_size, *sources, weighted, window, layout
        )
    )


def test_matches_torch_attention():
    """Against torch's own attention, on keys and values formed beforehand."""
    case = make_case("cpu", (torch.float64,) * 2, lengths=(50,), num_q=4, page_size=50)
    case.key_weights, case.value_weights = case.key_weights.double(), case.value_weights.double()
    page = case.block_table[0, 0]
    keys, values = (
        sum(w * s[page] for w, s in zip(weights, sources, strict=True)).transpose(0, 1)[None]
        for weights, sources in (
            (case.key_weights, case.k_sources),
            (case.value_weights, case.v_sources),
        )
    )
    mask = torch.arange(50) <= 46 + torch.arange(4)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(run(case), expected)


def test_unit_weights_equal_lite(device):
    """FusedKV with a = (0, 1) and b = (1, 0) is FusedKV-Lite.

    Bit for bit where both add in the same order: on the CPU, and on CUDA up to one block of 64 tokens.
    Beyond, the kernels for one and for two sources share the tokens out to different numbers of warps.
    """
    case = make_case(device, lengths=(5, 64, 300), head_dim=128)
    case.key_weights[0], case.key_weights[1] = 0.0, 1.0
    case.value_weights[0], case.value_weights[1] = 1.0, 0.0
    lite = dataclasses.replace(
        case,
        k_sources=case.k_sources[1:],
        v_sources=case.v_sources[:1],
        key_weights=None,
        value_weights=None,
    )
    out, expected = run(case), run(lite)
    exact = 3 if device == "cpu" else 2
    assert torch.equal(out[:exact], expected[:exact])
    check(case)
    check(lite)


def test_unknown_pages_are_invisible(device):
    """A page outside the cache hides its tokens and nothing else."""
    case = make_case(device, lengths=(48, 40), page_size=16)
    whole = run(case)
    case.block_table[0, 1] = HUGE
    case.block_table[1, 2] = -5
    assert not torch.equal(run(case), whole)
    check(case)


@over_dtypes(BF16, BF16_E4M3)
@pytest.mark.parametrize("side", ["k_sources", "v_sources"])
def test_nan_stays_in_its_sequence(device, dtypes, side):
    case = make_case(device, dtypes, lengths=(100, 70), page_size=16)
    clean = run(case)
    getattr(case, side)[1][case.block_table[1, 0].item(), 3] = float("nan")
    poisoned = run(case)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[0], clean[0])


@over_dtypes(BF16, F16_E4M3, BF16_E4M3)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("num_q", [2, 3])
def test_runs_are_bit_identical(device, dtypes, ragged, sources, num_q):
    """On CUDA with many partial results to merge: of one long sequence, and of some in a ragged batch.

    Those of 12 rows a kernel of its own merges.
    """
    if device == "cuda":
        lengths = (6000, 1, 0, 130, 9000, 64) if ragged else (40000,)
        shape = {"heads": (8, 2), "head_dim": 128, "page_size": 64, "num_q": num_q}
    else:
        lengths, shape = (300, 1) if ragged else (300,), {}
    case = make_case(device, dtypes, lengths, num_k=sources, num_v=sources, **shape)
    first = run(case)
    for _ in range(100 if device == "cuda" else 2):
        assert torch.equal(run(case), first)


@pytest.mark.cuda
@over_dtypes(BF16, BF16_E4M3)
@pytest.mark.parametrize("sources", [1, 2])
def test_large_batches_are_bit_identical(dtypes, sources):
    """Where every CTA has much to do, and long sequences leave many partial results."""
    lengths = (100_000, 1, 0, 20_000, *range(3000, 5500, 50))
    case = make_case("cuda", dtypes, lengths, page_size=64, num_k=sources, num_v=sources)
    check(case)
    schedule = ops.attention_schedule(case.seq_lens, 10**5 + 64, 1, 8, 2)
    before = schedule.clone()
    first = run(case)
    assert torch.equal(ops.fused_attention(*case.args(), schedule=schedule), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.fused_attention(*case.args(), schedule=schedule)
    for _ in range(100):
        graph.replay()
        assert torch.equal(out, first)
    assert torch.equal(schedule, before)


@pytest.mark.cuda
@over_dtypes(BF16, BF16_E4M3)
def test_memory_needs_no_initial_values(dtypes):
    """NaN in the output and in the schedule before they are written changes nothing."""
    case = make_case("cuda", dtypes, lengths=(9000, 1, 0, 130), heads=(8, 1), num_q=9)
    expected = run(case)
    torch.use_deterministic_algorithms(True)  # fills what at::empty returns
    try:
        assert torch.equal(run(case), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_empty_batch(device):
    case = make_case(device, lengths=(4,))
    case.q, case.block_table, case.seq_lens = case.q[:0], case.block_table[:0], case.seq_lens[:0]
    assert run(case).shape == (0, 1, 8, 64)


def test_zero_lengths_give_zeros(device):
    case = make_case(device, lengths=(0, 0, 0))
    assert torch.equal(run(case), torch.zeros_like(case.q))


def test_negative_and_too_long_lengths_are_clamped(device):
    case = make_case(device, lengths=(32, 32), page_size=16)
    full = run(dataclasses.replace(case, block_table=case.block_table[:, :2].contiguous()))
    case.block_table = case.block_table[:, :2].contiguous()
    case.seq_lens = torch.tensor([-3, 10**9], dtype=torch.int32, device=device)
    got = run(case)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert torch.equal(got[1], full[1])


@pytest.mark.cuda
@over_dtypes(BF16, F16_E4M3, BF16_E4M3)
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("num_q", [1, 9])
def test_graph_replay_with_changing_lengths(dtypes, sources, num_q):
    """One captured graph of schedule and attention serves other lengths and other pages."""
    shape = {"head_dim": 128, "page_size": 16, "num_q": num_q}
    case = make_case("cuda", dtypes, (2000, 700, 3), num_k=sources, num_v=sources, **shape)
    run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case)
    for lengths in ((2000, 700, 3), (1, 1, 1), (1500, 699, 0), (0, 0, 0), (64, 65, 2), (2000, 700, 3)):
        case.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.block_table[:2, :40] = case.block_table[:2, :40].flip(1)
        graph.replay()
        assert torch.equal(out, run(case))
        check(case)


@pytest.mark.cuda
@pytest.mark.parametrize("num_q", [1, 16])
def test_schedule_is_left_as_it_was(num_q):
    case = make_case("cuda", lengths=(9000, 10), num_q=num_q)
    schedule = ops.attention_schedule(case.seq_lens, 10**6, num_q, 8, 2)
    before = schedule.clone()
    ops.fused_attention(*case.args(), schedule=schedule)
    assert torch.equal(schedule, before)


@over_dtypes(F16, F16_E4M3)
def test_opcheck(device, dtypes):
    case = make_case(device, dtypes, lengths=(5, 70))
    schedule = ops.attention_schedule(case.seq_lens, 512, 1, 8, 2)
    torch.library.opcheck(
        torch.ops.fusedkv.fused_attention,
        (*case.args(), schedule, 0.125),
        test_utils=op_checks(dtypes is F16_E4M3),
    )


@over_dtypes(F16, F16_E4M3)
def test_compile(device, dtypes):
    case = make_case(device, dtypes, lengths=(5, 70))
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(lambda *a: ops.fused_attention(*a) * 2, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*case.args()), run(case) * 2)


@pytest.mark.cuda
@over_dtypes(F16, F16_E4M3)
def test_compile_reduce_overhead(dtypes):
    case = make_case("cuda", dtypes, lengths=(5, 70))
    compiled = torch.compile(lambda *a: ops.fused_attention(*a) * 2, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(compiled(*case.args()), run(case) * 2)


BAD = {
    "q: expected 1 to 16 query tokens": lambda c: setattr(c, "q", c.q.repeat(1, 17, 1, 1)),
    "q: expected query heads that are a multiple of 2": lambda c: setattr(c, "q", c.q[:, :, :7]),
    "q: expected shape": lambda c: setattr(c, "q", c.q[0]),
    "q: expected stride 1": lambda c: setattr(c, "q", c.q.transpose(2, 3).contiguous().transpose(2, 3)),
    "k_sources: expected 1 or 2 tensors, got 3": lambda c: c.k_sources.append(c.k_sources[0]),
    "v_sources: expected 1 or 2 tensors, got 0": lambda c: c.v_sources.clear(),
    r"k_sources\[1\]: expected dtype": lambda c: c.k_sources.__setitem__(1, c.k_sources[1].float()),
    r"v_sources\[0\]: expected shape": lambda c: c.v_sources.__setitem__(0, c.v_sources[0][1:]),
    "key_weights: expected dtype float32": lambda c: setattr(c, "key_weights", c.key_weights.half()),
    "value_weights: expected shape": lambda c: setattr(c, "value_weights", c.value_weights[:1]),
    "block_table: expected dtype int32": lambda c: setattr(c, "block_table", c.block_table.long()),
    "block_table: expected shape": lambda c: setattr(c, "block_table", c.block_table[:1]),
    "seq_lens: expected shape": lambda c: setattr(c, "seq_lens", c.seq_lens[:1]),
    "seq_lens: expected device": lambda c: setattr(c, "seq_lens", c.seq_lens.to("meta")),
    "window: expected 0": lambda c: setattr(c, "window", -1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(device, message):
    case = make_case(device, lengths=(5, 70))
    schedule = ops.attention_schedule(case.seq_lens, 512, 1, 8, 2)
    BAD[message](case)
    with pytest.raises(ValueError, match=r"fused_attention: " + message):
        torch.ops.fusedkv.fused_attention(*case.args(), schedule, 0.125, case.window)


def test_bad_schedule(device):
    case = make_case(device, lengths=(5, 70))
    short = ops.attention_schedule(case.seq_lens, 512, 1, 8, 2)[:-1]
    with pytest.raises(ValueError, match="schedule: expected shape"):
        ops.fused_attention(*case.args(), schedule=short)


@pytest.mark.parametrize("num_q", [1, 3])  # 3: a kernel of its own merges
def test_wrong_schedule_stays_inside(device, num_q):
    """A schedule with any contents gives wrong results and no more."""
    case = make_case(device, lengths=(300, 70, 5), num_q=num_q)
    right = run(case)
    schedule = ops.attention_schedule(case.seq_lens, 10**4, num_q, 8, 2)
    for counts in ([7, 7, 7, 7], [50, 60, 61, 62], [0, 9, 3, 12], [-4, -2, 5, 6]):
        schedule[:4] = torch.tensor(counts, dtype=torch.int32)
        if device == "cuda":  # places of ranges follow, of 8 words
            places = schedule[4 : 4 + 3 * 192 * 8].view(-1, 8)
            generator = torch.Generator().manual_seed(counts[1])
            wrong = torch.randint(-5, 70, places.shape, generator=generator)
            extreme = torch.rand(places.shape, generator=generator) < 0.2
            extreme[:, 5] = False  # blocks to take: so many would take as long
            wrong[extreme] = torch.tensor([-(2**31), 2**31 - 1])[torch.randint(2, (int(extreme.sum()),))]
            places.copy_(wrong)
        ops.fused_attention(*case.args(), schedule=schedule)
    assert torch.equal(run(case), right)


def test_early_cache(device):
    """The same bits, launch after launch; what it promises of the kernel before is the caller's to keep."""
    case = make_case(device, lengths=(300, 70, 5))
    with pytest.raises(ValueError, match="early_cache: expected False without a schedule, got True"):
        ops.fused_attention(*case.args(), early_cache=True)
    schedule = ops.attention_schedule(case.seq_lens, case.block_table.shape[1] * 16, 1, 8, 2)
    right = ops.fused_attention(*case.args(), schedule=schedule)
    for _ in range(3):
        assert torch.equal(ops.fused_attention(*case.args(), schedule=schedule, early_cache=True), right)


@pytest.mark.cuda
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("num_q", [1, 3])
def test_early_cache_waits_for_the_query_tokens(sources, num_q):
    """A kernel that lets attention start at once writes queries, keys and values, after many for nobody."""
    # Every worker begins with query tokens, so that it would read them early if it read anything early.
    lengths, others, page_size = (50,) * 200, 16_384, 64
    case = make_case("cuda", BF16, lengths, num_q, (8, 2), 128, page_size, sources, sources)
    tokens = torch.cat([torch.arange(n - num_q, n) for n in lengths]).cuda()
    rows = torch.arange(len(lengths), device="cuda").repeat_interleave(num_q)
    slots = case.block_table[rows, tokens // page_size].long() * page_size + tokens % page_size
    slot_mapping = torch.cat([torch.full((others,), -1, device="cuda"), slots])
    qkv = torch.randn(len(slot_mapping), 8 + 2 * 2, 128, dtype=torch.bfloat16, device="cuda")
    positions, cos_sin = torch.zeros_like(slot_mapping), torch.randn(1, 128, device="cuda")
    q_out, caches = qkv.new_empty(len(qkv), 8, 128), (case.k_sources[-1], case.v_sources[-1])
    case.q = q_out[others:].view(len(lengths), num_q, 8, 128)
    capacity = case.block_table.shape[1] * page_size
    schedule = ops.attention_schedule(case.seq_lens, capacity, num_q, 8, 2)

    def step(early):
        q_out.fill_(float("nan"))
        for cache in caches:
            cache.flatten(0, 1).index_fill_(0, slots, float("nan"))
        ops.rope_write_kv(qkv, q_out, *caches, positions, cos_sin, slot_mapping=slot_mapping)
        return ops.fused_attention(*case.args(), schedule=schedule, early_cache=early)

    expected = step(early=False)
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(early=True)
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("sources", [1, 2])
def test_what_the_l2_keeps_changes_no_result(device, sources, cache_dtype):
    lengths = (300, 70, 5) if device == "cpu" else (100_000, 70, 5)  # on a GPU more than is kept
    case = make_case(
        device, lengths=lengths, num_k=sources, num_v=sources, dtypes=(torch.bfloat16, cache_dtype)
    )
    right = ops.fused_attention(*case.args())
    for _ in range(2):
        assert torch.equal(ops.fused_attention(*case.args(), keep_sources=True), right)


def test_window_beyond_any_length(device):
    case = make_case(device, lengths=(1, 2, 70), num_q=4)
    expected = run(case)
    case.window = 2**31 - 1
    assert torch.equal(run(case), expected)


def test_bad_rank_without_a_schedule(device):
    case = make_case(device, lengths=(5, 70))
    case.q = case.q[0]
    with pytest.raises(ValueError, match="fused_attention: q: expected shape"):
        run(case)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_is_not_differentiable(device):
    """On either device: training mixes the sources with fuse_kv, whose gradient is exact and fast."""
    case = make_case(device, F16, lengths=(5, 70))
    case.q.requires_grad_()
    run(case).sum().backward()
    assert case.q.grad is None
