"""fused_attention and attention_schedule against plain torch that does not use fusedkv_ext.reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_2x

from fusedkv_ext import ops

HUGE = 2**30  # what unused entries of a block table hold


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k_sources: list[torch.Tensor]
    v_sources: list[torch.Tensor]
    key_weights: torch.Tensor | None
    value_weights: torch.Tensor | None
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    window: int = 0

    def args(self, convert=lambda x: x):
        def optional(x):
            return None if x is None else convert(x)

        return (
            convert(self.q),
            [convert(s) for s in self.k_sources],
            [convert(s) for s in self.v_sources],
            optional(self.key_weights),
            optional(self.value_weights),
            self.block_table,
            self.seq_lens,
        )


def make_case(
    device,
    dtype=torch.bfloat16,
    lengths=(5, 64, 130),
    num_q=1,
    heads=(8, 2),
    head_dim=64,
    page_size=16,
    num_k=2,
    num_v=2,
    weighted=True,
    window=0,
    layout="NHD",
) -> Case:
    """Random pages in random order; slots that no token owns hold NaN, unused table entries a huge number."""
    hq, hkv = heads
    pages_of = [-(-n // page_size) for n in lengths]
    num_pages = sum(pages_of) + 2
    order = torch.randperm(num_pages)
    table = torch.full((len(lengths), max([*pages_of, 1]) + 1), HUGE, dtype=torch.int32)
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    start = 0
    for b, count in enumerate(pages_of):
        pages = order[start : start + count]
        table[b, :count] = pages.int()
        tokens = torch.arange(lengths[b])
        used[pages[tokens // page_size], tokens % page_size] = True
        start += count

    def source():
        shape = {
            "NHD": (num_pages, page_size, hkv, head_dim),
            "HND": (num_pages, hkv, page_size, head_dim),
            "packed": (num_pages, page_size, 2, hkv, head_dim),
        }[layout]
        pool = torch.randn(shape).to(dtype)

        def view(pool):
            return pool.transpose(1, 2) if layout == "HND" else pool[:, :, 1] if layout == "packed" else pool

        view(pool)[~used] = float("nan")
        return view(pool.to(device))

    weights = [torch.randn(n, hkv, head_dim, device=device) if weighted else None for n in (num_k, num_v)]
    return Case(
        torch.randn(len(lengths), num_q, hq, head_dim).to(dtype).to(device),
        [source() for _ in range(num_k)],
        [source() for _ in range(num_v)],
        *weights,
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        window,
    )


def plain_torch(case: Case) -> torch.Tensor:
    """The same maths in plain torch at the precision of the case: form K_i and V_i, then attend."""
    dtype, device = case.q.dtype, case.q.device
    out = torch.zeros_like(case.q)
    num_pages, page_size, hkv, d = case.k_sources[0].shape
    num_q, hq = case.q.shape[1:3]

    def mix(sources, weights, slots):
        if weights is None:
            return sum(s[slots] for s in sources)
        return sum(w.to(dtype) * s[slots] for w, s in zip(weights, sources, strict=True))

    for b, length in enumerate(case.seq_lens.tolist()):
        pos = torch.arange(length, device=device)
        pages = case.block_table[b, pos // page_size].long()
        known = (pages >= 0) & (pages < num_pages)
        slots = (pages.where(known, 0), pos % page_size)
        unknown = ~known[:, None, None]
        keys = mix(case.k_sources, case.key_weights, slots).masked_fill(unknown, 0)
        values = mix(case.v_sources, case.value_weights, slots).masked_fill(unknown, 0)
        keys, values = (x.repeat_interleave(hq // hkv, 1) for x in (keys, values))
        scores = torch.einsum("qhd,thd->hqt", case.q[b], keys) * d**-0.5
        distance = length - num_q + torch.arange(num_q, device=device)[:, None] - pos
        visible = known & (distance >= 0) & (distance < (case.window or length))
        scores = scores.to(torch.promote_types(dtype, torch.float32)).masked_fill(~visible, float("-inf"))
        p = scores.softmax(-1).nan_to_num(0.0).to(dtype)
        out[b] = torch.einsum("hqt,thd->qhd", p, values)
    return out


def run(case: Case) -> torch.Tensor:
    return ops.fused_attention(*case.args(), window=case.window)


def check(case: Case) -> None:
    exact = plain_torch(Case(*case.args(torch.Tensor.double), case.window))
    assert_close_2x(run(case), exact, plain_torch(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_k, num_v", [(1, 1), (2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (12, 4)])
def test_sources(device, dtype, head_dim, num_k, num_v, heads):
    check(make_case(device, dtype, (0, 1, 63, 64, 65, 300), 1, heads, head_dim, 16, num_k, num_v))


@pytest.mark.parametrize("group", [1, 2, 7, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("num_q", [1, 3, 16])
def test_rows(device, group, num_q):
    check(make_case(device, lengths=(2, 16, 200), num_q=num_q, heads=(2 * group, 2)))


@pytest.mark.parametrize("page_size", [1, 16, 64, 100])
@pytest.mark.parametrize("layout", ["NHD", "HND", "packed"])
def test_pages_and_layouts(device, page_size, layout):
    check(make_case(device, lengths=(3, 100, 257), page_size=page_size, layout=layout, head_dim=128))


@pytest.mark.parametrize("window", [1, 17, 64, 100, 1000])
@pytest.mark.parametrize("num_q", [1, 5, 16])
def test_window(device, window, num_q):
    check(make_case(device, lengths=(0, 4, 90, 400), num_q=num_q, window=window, num_k=1, num_v=1))


@pytest.mark.parametrize("weighted", [True, False])
def test_without_weights_sources_count_once(device, weighted):
    check(make_case(device, lengths=(70,), weighted=weighted))


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [(20000,), (9000, 1, 0, 130, 5000), (1,) * 300, (64,) * 133])
@pytest.mark.parametrize("heads", [(8, 1), (32, 8), (4, 4)])
@pytest.mark.parametrize("num_q", [1, 8])
def test_split_sequences(lengths, heads, num_q):
    check(make_case("cuda", lengths=lengths, heads=heads, head_dim=128, page_size=64, num_q=num_q))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    num_q=st.integers(1, 16),
    hkv=st.integers(1, 4),
    group=st.integers(1, 20),
    head_dim=st.sampled_from([64, 128]),
    page_size=st.integers(1, 130),
    sources=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    weighted=st.booleans(),
    window=st.sampled_from([0, 0, 1, 31, 200]),
    layout=st.sampled_from(["NHD", "HND", "packed"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(
    lengths, num_q, hkv, group, head_dim, page_size, sources, weighted, window, layout, dtype, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = (hkv * group, hkv)
    check(
        make_case(
            device, dtype, lengths, num_q, heads, head_dim, page_size, *sources, weighted, window, layout
        )
    )


def test_matches_torch_attention():
    """Against torch's own attention, on keys and values formed beforehand."""
    case = make_case("cpu", torch.float64, lengths=(50,), num_q=4, page_size=50)
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


def test_unit_weights_equal_lite_bit_for_bit(device):
    """FusedKV with a = (0, 1) and b = (1, 0) is FusedKV-Lite."""
    case = make_case(device, lengths=(5, 64, 300), head_dim=128)
    for source in [*case.k_sources, *case.v_sources]:
        source.nan_to_num_(0.0)  # 0 * NaN is NaN, also for a weight of zero
    case.key_weights[0], case.key_weights[1] = 0.0, 1.0
    case.value_weights[0], case.value_weights[1] = 1.0, 0.0
    lite = dataclasses.replace(
        case,
        k_sources=case.k_sources[1:],
        v_sources=case.v_sources[:1],
        key_weights=None,
        value_weights=None,
    )
    assert torch.equal(run(case), run(lite))


def test_unknown_pages_are_invisible(device):
    """A page outside the cache hides its tokens and nothing else."""
    case = make_case(device, lengths=(48, 40), page_size=16)
    whole = run(case)
    case.block_table[0, 1] = HUGE
    case.block_table[1, 2] = -5
    assert not torch.equal(run(case), whole)
    check(case)


def test_nan_stays_in_its_sequence(device):
    case = make_case(device, lengths=(100, 70), page_size=16)
    clean = run(case)
    case.k_sources[0][case.block_table[1, 0].item(), 3] = float("nan")
    poisoned = run(case)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[0], clean[0])


def test_two_runs_are_bit_identical(device):
    case = make_case(device, lengths=(3000, 1, 700) if device == "cuda" else (300, 1), num_q=2, page_size=16)
    first = run(case)
    for _ in range(100 if device == "cuda" else 2):
        assert torch.equal(run(case), first)


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


def plain_schedule(lengths, max_seq_len, num_q, hq, hkv, window) -> list[int]:
    """Cumulative counts of the 64-token blocks that some query token sees, at least one each; then zeros."""
    ends = [0]
    for length in lengths.clamp(0, max_seq_len).tolist():
        first = max(0, length - num_q - window + 1) if window else 0  # what the first query token sees
        ends.append(ends[-1] + max(1, len({token // 64 for token in range(first, length)})))
    return ends + [0] * (len(lengths) * hkv * -(-(hq // hkv) * num_q // 64))


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize("num_q", [1, 16])
def test_schedule(device, window, num_q):
    lengths = torch.tensor([0, 1, 64, 65, 70, 79, 80, 81, 135, 1000, -4, 10**8], dtype=torch.int32)
    args = (512, num_q, 24, 2, window)
    got = ops.attention_schedule(lengths.to(device), *args)
    assert got.dtype == torch.int32 and got.tolist() == plain_schedule(lengths, *args)


def test_schedule_of_many_sequences(device):
    lengths = torch.randint(0, 5000, (1500,), dtype=torch.int32)
    args = (4096, 1, 8, 8, 0)
    assert ops.attention_schedule(lengths.to(device), *args).tolist() == plain_schedule(lengths, *args)


@pytest.mark.cuda
def test_graph_replay_with_changing_lengths():
    """One captured graph of schedule and attention serves other lengths and other pages."""
    case = make_case("cuda", lengths=(2000, 700, 3), head_dim=128, page_size=16)
    run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case)
    for lengths in ((2000, 700, 3), (1, 1, 1), (1500, 699, 0), (64, 65, 2)):
        case.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, run(case))


@pytest.mark.cuda
def test_schedule_counters_are_zero_after_use():
    case = make_case("cuda", lengths=(9000, 10))
    schedule = ops.attention_schedule(case.seq_lens, 10**6, 1, 8, 2)
    before = schedule.clone()
    ops.fused_attention(*case.args(), schedule=schedule)
    assert torch.equal(schedule, before)


def test_opcheck(device):
    case = make_case(device, torch.float16, lengths=(5, 70))
    schedule = ops.attention_schedule(case.seq_lens, 512, 1, 8, 2)
    torch.library.opcheck(torch.ops.fusedkv.attention_schedule, (case.seq_lens, 512, 1, 8, 2))
    torch.library.opcheck(torch.ops.fusedkv.fused_attention, (*case.args(), schedule, 0.125))


def test_compile(device):
    case = make_case(device, torch.float16, lengths=(5, 70))
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(lambda *a: ops.fused_attention(*a) * 2, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*case.args()), run(case) * 2)


@pytest.mark.cuda
def test_compile_reduce_overhead():
    case = make_case("cuda", torch.float16, lengths=(5, 70))
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
    with pytest.raises(ValueError, match="attention_schedule: num_query_heads: expected a multiple"):
        ops.attention_schedule(case.seq_lens, 512, 1, 7, 2)
    with pytest.raises(ValueError, match="attention_schedule: num_query_tokens: expected 1 to 16, got 17"):
        ops.attention_schedule(case.seq_lens, 512, 17, 8, 2)


def test_wrong_schedule_stays_inside(device):
    """A schedule with any contents gives wrong results and no more."""
    case = make_case(device, lengths=(300, 70, 5))
    right = run(case)
    schedule = ops.attention_schedule(case.seq_lens, 10**4, 1, 8, 2)
    for counts in ([7, 7, 7, 7], [50, 60, 61, 62], [0, 9, 3, 12], [-4, -2, 5, 6]):
        schedule[:4] = torch.tensor(counts, dtype=torch.int32)
        ops.fused_attention(*case.args(), schedule=schedule)
    assert torch.equal(run(case), right)


def test_window_beyond_any_length(device):
    case = make_case(device, lengths=(1, 2, 70), num_q=4)
    expected = run(case)
    case.window = 2**31 - 1
    assert torch.equal(run(case), expected)


def test_too_many_blocks(device):
    lengths = torch.zeros(129, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"max_seq_len: expected fewer than 2\^31 blocks of 64 tokens"):
        ops.attention_schedule(lengths, 2**31 - 1, 1, 2, 2)


def test_bad_rank_without_a_schedule(device):
    case = make_case(device, lengths=(5, 70))
    case.q = case.q[0]
    with pytest.raises(ValueError, match="fused_attention: q: expected shape"):
        run(case)


def test_fp8_sources(device):
    case = make_case(device, torch.float16, lengths=(5, 70))
    case.k_sources, case.v_sources = (
        [source.nan_to_num(0.0).to(torch.float8_e4m3fn) for source in sources]
        for sources in (case.k_sources, case.v_sources)
    )
    if device == "cuda":
        with pytest.raises(ValueError, match=r"k_sources\[0\]: expected dtype float16, that of q, on CUDA"):
            run(case)
        return
    wide = dataclasses.replace(
        case,
        k_sources=[s.half() for s in case.k_sources],
        v_sources=[s.half() for s in case.v_sources],
    )
    assert torch.equal(run(case), run(wide))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_is_not_differentiable(device):
    """On either device: training mixes the sources with fuse_kv, whose gradient is exact and fast."""
    case = make_case(device, torch.float16, lengths=(5, 70))
    case.q.requires_grad_()
    run(case).sum().backward()
    assert case.q.grad is None
