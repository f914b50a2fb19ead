import gc
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import quantised
import tiny
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkv_ext import Sampling, generate, stream
from fusedkv_ext.generation import DONE, SAMPLE_BLOCK, Decoder, _decode, sample

every_plan = pytest.mark.parametrize("plan", tiny.PLANS.values(), ids=tiny.PLANS)
fp8_plan = pytest.mark.parametrize("plan", tiny.FP8_PLANS.values(), ids=tiny.FP8_PLANS)
fp8_mode = pytest.mark.parametrize("fp8_sources", quantised.MODES)


def greedy_without_cache(model, prompt, count, fp8_sources="none") -> list[int]:
    ids = prompt[None].to(model.device)
    with torch.no_grad():
        for _ in range(count):
            logits = quantised.forward(model, ids, fp8_sources)
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


@every_plan
def test_greedy_tokens_equal_those_without_a_cache(plan):
    model, prompts = tiny.model(plan), tiny.prompts(5, 11, 1)
    expected = [greedy_without_cache(model, prompt, 5) for prompt in prompts]
    result = generate(model, prompts, 5, page_size=4)
    assert result.tokens == expected
    assert result.cache_nbytes * tiny.LAYERS == result.vanilla_cache_nbytes * len(plan.storage_layers)
    assert result.ttft > 0 and result.tpot > 0 and not result.cuda_graph


@fp8_plan
@fp8_mode
def test_greedy_tokens_with_sources_in_fp8(plan, fp8_sources):
    model, prompts = tiny.model(plan), tiny.prompts(5, 11, 1)
    expected = [greedy_without_cache(model, prompt, 5, fp8_sources) for prompt in prompts]
    result = generate(model, prompts, 5, page_size=4, fp8_sources=fp8_sources)
    assert result.tokens == expected
    stored, sources = len(plan.storage_layers), len(plan.source_layers)
    nbytes = 8 * (stored - sources) + {"copy": 8 + 1, "only": 1}[fp8_sources] * sources
    assert result.cache_nbytes * 8 * tiny.LAYERS == result.vanilla_cache_nbytes * nbytes


@pytest.mark.parametrize("fp8_sources", ["none", *quantised.MODES])
def test_batching_chunking_and_page_size_change_nothing(fp8_sources):
    model, prompts = tiny.model("fusedkv", sliding_window=6), tiny.prompts(5, 11, 5, 2)

    def run(prompts, **options):
        return generate(model, prompts, 6, fp8_sources=fp8_sources, **options).tokens

    expected = run(prompts)
    for options in ({"prefill_chunk": 3}, {"prefill_chunk": 7, "page_size": 3}, {"page_size": 100}):
        assert run(prompts, **options) == expected
    assert [run([prompt])[0] for prompt in prompts] == expected
    assert run([prompt.tolist() for prompt in prompts]) == expected


@pytest.mark.parametrize("fp8_sources", ["none", *quantised.MODES])
def test_training_between_two_calls_changes_the_text(device, fp8_sources):
    """One cache serves them all; what it keeps of the weights must not outlive them."""
    model, prompts, texts = tiny.model("fusedkv", device=device), tiny.prompts(5, 9), []
    cache = model.new_cache(10, page_size=4, max_batch=2, fp8_sources=fp8_sources)
    ids = torch.randint(0, tiny.VOCAB, (2, 17), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(4):
        texts.append(generate(model, prompts, 6, cache=cache).tokens)
        assert texts[-1] == generate(model, prompts, 6, page_size=4, fp8_sources=fp8_sources).tokens
        if device == "cpu":
            assert texts[-1] == [greedy_without_cache(model, x, 6, fp8_sources) for x in prompts]
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    assert len({str(text) for text in texts}) == 4


@fp8_mode
def test_stream_and_a_cache_of_ones_own_take_fp8_sources(device, fp8_sources):
    model, prompts = tiny.model("fusedkv", device=device), tiny.prompts(5, 3)
    result = generate(model, prompts, 4, page_size=4, fp8_sources=fp8_sources)
    streamed = list(stream(model, prompts, 4, page_size=4, fp8_sources=fp8_sources))
    assert [[token for i, token in streamed if i == j] for j in range(2)] == result.tokens
    cache = model.new_cache(4, page_size=4, max_batch=2, fp8_sources=fp8_sources)
    tiny.poison(cache)
    for options in ({}, {"fp8_sources": fp8_sources}):
        own = generate(model, prompts, 4, cache=cache, **options)
        assert own.tokens == result.tokens and own.cache_nbytes == result.cache_nbytes == cache.nbytes
    other = "only" if fp8_sources == "copy" else "copy"
    with pytest.raises(ValueError, match=f"generate: fp8_sources: expected '{fp8_sources}', .*got '{other}'"):
        generate(model, prompts, 4, cache=cache, fp8_sources=other)
    assert cache.num_free_pages == 4


@fp8_mode
def test_inference_mode_can_come_and_go(fp8_sources):
    model, prompts = tiny.model("fusedkv"), tiny.prompts(5)
    cache = model.new_cache(4, page_size=4, fp8_sources=fp8_sources)
    for inference in (True, False, True):
        expected = generate(model, prompts, 4, fp8_sources=fp8_sources).tokens
        with torch.inference_mode(inference):
            assert generate(model, prompts, 4, cache=cache).tokens == expected
        change = torch.rand_like(model.model.layers[0].attention_norm.weight)
        with torch.no_grad():
            model.model.layers[0].attention_norm.weight.add_(change)


def count_tokens(model) -> list[int]:
    """A list that grows by the number of tokens of each pass through the layers."""
    passes = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: passes.append(args[0].numel()))
    return passes


def test_the_cache_has_exactly_the_pages_needed():
    """9, 6 and 5 tokens: the last of the 5 new ones is never fed. A third of the layers stores."""
    model, prompts = tiny.model(tiny.CrossLayerPlan.fusedkv(6, n=2)), tiny.prompts(5, 2, 1)
    for page_size, pages in ((1, 20), (4, 3 + 2 + 2), (5, 2 + 2 + 1), (64, 3)):
        result = generate(model, prompts, 5, page_size=page_size)
        nbytes = pages * page_size * 2 * 2 * 16 * 8  # of a layer: keys and values, Hkv, D, bytes of float64
        assert (result.cache_nbytes, result.vanilla_cache_nbytes) == (2 * nbytes, 6 * nbytes)


def test_prefill_chunk_bounds_the_tokens_of_a_pass():
    model, prompts = tiny.model("fusedkv"), tiny.prompts(5, 11)
    for chunk, expected in ((4, [4, 4, 4, 4]), (7, [7, 7, 2]), (16, [16]), (8192, [16])):
        passes = count_tokens(model)
        generate(model, prompts, 1, prefill_chunk=chunk)
        assert passes == expected


def test_generation_stops_with_its_last_sequence():
    model, prompts = tiny.model("fusedkv"), tiny.prompts(5, 3)
    free = generate(model, prompts, 20).tokens
    stops = [free[0][2], free[1][5]]
    expected = [tokens[: next(i for i, x in enumerate(tokens) if x in stops)] for tokens in free]
    last = max(map(len, expected))
    assert 0 < last <= 5
    passes = count_tokens(model)
    assert generate(model, prompts, 20, stop_tokens=stops).tokens == expected
    assert passes == [8] + [2] * last, "no step after the one that stops the last sequence"


def test_times_to_the_first_token_and_per_token(monkeypatch):
    model, prompts, now = tiny.model("fusedkv"), tiny.prompts(5, 3), [100.0]
    monkeypatch.setattr("fusedkv_ext.generation.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds, method):
        def run(*args, **options):
            now[0] += seconds
            return method(*args, **options)

        return run

    free = generate(model, prompts, 5).tokens
    monkeypatch.setattr(model, "prefill", taking(7.0, model.prefill))
    monkeypatch.setattr(model, "decode_step", taking(2.0, model.decode_step))
    for count, options, tpot in ((5, {}, 2.0), (1, {}, None), (5, {"stop_tokens": free[0] + free[1]}, None)):
        result = generate(model, prompts, count, **options)
        assert (result.ttft, result.tpot) == (7.0, tpot)


def test_autocast_changes_nothing(device):
    model, prompts = tiny.model("fusedkv", torch.float32, device), tiny.prompts(5, 11)
    for options in ({}, dict(temperature=1.0, seed=1)):
        expected = generate(model, prompts, 6, **options).tokens
        with torch.autocast(device, dtype=torch.float16):
            assert generate(model, prompts, 6, **options).tokens == expected


@pytest.mark.cuda
def test_generation_leaves_no_memory_behind():
    model, prompts, allocated = tiny.model("fusedkv", device="cuda"), tiny.prompts(5, 3), []
    for _ in range(6):
        assert generate(model, prompts, 4).cuda_graph
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[-1] == allocated[1]


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "fp8_sources"),
    [*((name, "none") for name in tiny.PLANS), *itertools.product(tiny.FP8_PLANS, quantised.MODES)],
)
def test_a_captured_step_gives_the_tokens_of_an_eager_one(name, temperature, fp8_sources):
    plan = tiny.PLANS[name]
    model, prompts = tiny.model(plan, device="cuda"), tiny.prompts(5, 63, 1, 20)
    options = dict(temperature=temperature, top_k=30, top_p=0.9, seed=3, stop_tokens=[5, 6, 7])
    options["fp8_sources"] = fp8_sources
    eager = generate(model, prompts, 20, use_cuda_graph=False, **options)
    captured = generate(model, prompts, 20, **options)
    assert captured.cuda_graph and not eager.cuda_graph
    assert captured.tokens == eager.tokens


def test_stream_yields_the_same_tokens_as_they_come(device):
    model, prompts = tiny.model("fusedkv", device=device), tiny.prompts(5, 3)
    expected = generate(model, prompts, 4).tokens
    order = list(stream(model, prompts, 4))
    assert [i for i, _ in order] == [0, 1] * 4
    assert [[token for i, token in order if i == j] for j in range(2)] == expected


def test_stop_tokens_end_their_sequence_only(device):
    model, prompts = tiny.model("fusedkv", device=device), tiny.prompts(5, 3, 8)
    free = generate(model, prompts, 12).tokens
    stops = {free[0][4], free[1][0]}
    expected = []
    for tokens in free:
        ends = [i for i, token in enumerate(tokens) if token in stops]
        expected.append(tokens[: ends[0]] if ends else tokens)
    assert expected[0] != free[0] and expected[1] == []
    assert generate(model, prompts, 12, stop_tokens=list(stops)).tokens == expected
    only = generate(model, prompts[1:2], 12, stop_tokens=list(stops))
    assert only.tokens == [[]] and only.tpot is None


def test_one_seed_gives_one_text(device):
    model, prompts = tiny.model("fusedkv", device=device), tiny.prompts(5, 3)
    options = dict(temperature=1.5, top_p=0.95)
    first = generate(model, prompts, 12, seed=1, **options).tokens
    assert generate(model, prompts, 12, seed=1, **options).tokens == first
    assert generate(model, prompts, 12, seed=2, **options).tokens != first
    unseeded = [generate(model, prompts, 12, **options).tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_generation_leaves_the_callers_random_numbers_alone():
    model, prompts = tiny.model("fusedkv"), tiny.prompts(3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    for seed in (1, None):
        torch.manual_seed(5)
        generate(model, prompts, 2, temperature=1.0, seed=seed)
        assert torch.equal(torch.rand(3), expected)


def frequencies(logits, draws=40_000, **options) -> torch.Tensor:
    rows = logits.expand(draws, -1).contiguous()
    uniform = torch.rand(draws, device=logits.device)
    chosen = sample(rows, Sampling(**options), uniform)
    return torch.bincount(chosen, minlength=logits.shape[-1]).double().cpu() / draws


def test_sampling_follows_the_distribution(device):
    probabilities = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1], dtype=torch.float64)
    logits = probabilities.log()[None].to(device, torch.float32)

    def expect(keep, exponent=1.0):
        wanted = torch.where(torch.tensor(keep), probabilities, 0.0) ** exponent
        wanted = torch.where(torch.tensor(keep), wanted, 0.0)
        return wanted / wanted.sum()

    every = [True] * 5
    cases = [
        (dict(temperature=1.0), expect(every)),
        (dict(temperature=0.5), expect(every, 2.0)),
        (dict(temperature=1.0, top_k=2), expect([False, True, True, False, False])),
        (dict(temperature=1.0, top_k=99), expect(every)),
        (dict(temperature=1.0, top_p=0.75), expect([False, True, True, True, False])),
        (dict(temperature=1.0, top_p=0.3), expect([False, True, False, False, False])),
        (dict(temperature=1.0, top_k=4, top_p=0.99), expect([False, True, True, True, True])),
        (dict(temperature=1e-30), expect([False, True, False, False, False])),
        (dict(temperature=0.0), expect([False, True, False, False, False])),
    ]
    for options, wanted in cases:
        got = frequencies(logits, **options)
        assert (got - wanted).abs().max() < 0.015, options
        assert (got[wanted == 0] == 0).all(), options


def test_top_p_takes_no_token_beyond_the_one_that_reaches_it(device):
    logits = torch.full((1, 4), 1.5, device=device)  # probabilities of exactly 1/4
    for top_p, kept in ((0.2, 1), (0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        got = frequencies(logits, draws=4000, temperature=1.0, top_p=top_p)
        assert (got > 0).sum() == kept and (got[got > 0] - 1 / kept).abs().max() < 0.05, top_p


def test_the_ends_of_the_uniform_interval_choose_possible_tokens(device):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2, device=device)
    uniform = torch.tensor([0.0, 1 - 2**-24], device=device)
    assert sample(logits, Sampling(temperature=1.0), uniform).tolist() == [1, 2]
    assert sample(logits, Sampling(temperature=1.0, top_k=2), uniform).tolist() == [2, 1]


@pytest.mark.parametrize("vocab", [7, SAMPLE_BLOCK, 3 * SAMPLE_BLOCK + 5])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.9}])
def test_sampling_inverts_the_distribution(device, vocab, options):
    """The interval of the chosen token in a running sum in float64 holds the uniform number."""
    logits = (torch.randn(200, vocab) * 3).to(device)
    uniform = torch.rand(200)
    chosen = sample(logits, Sampling(temperature=0.8, **options), uniform.to(device)).cpu()[:, None]
    probabilities, order = (logits.cpu().double() / 0.8).softmax(-1), torch.arange(vocab).expand(200, -1)
    if options:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        probabilities[:, options.get("top_k", vocab) :] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= options.get("top_p", 1.0)] = 0
    cumulative = probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True)
    place = (order == chosen).int().argmax(-1, keepdim=True)
    end = cumulative.gather(-1, place)[:, 0]
    start = end - (probabilities / probabilities.sum(-1, keepdim=True)).gather(-1, place)[:, 0]
    assert ((start - 1e-5 <= uniform) & (uniform <= end + 1e-5)).all()
    assert (probabilities.gather(-1, place) > 0).all()


@pytest.mark.parametrize("top_k, kept", [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])])
def test_of_equal_logits_top_k_keeps_the_first(device, top_k, kept):
    logits = torch.tensor([[-1.0, 2.0, -1.0, 2.0, 2.0, -torch.inf]], dtype=torch.bfloat16, device=device)
    got = frequencies(logits, draws=3000, temperature=2.0, top_k=top_k)
    assert got.nonzero()[:, 0].tolist() == kept


def test_nan_logits_choose_some_token(device):
    logits = torch.tensor([[0.0, torch.nan, 1.0], [torch.nan] * 3], device=device)
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        chosen = sample(logits, Sampling(temperature=1.0, **options), torch.tensor([0.3, 0.9], device=device))
        assert ((chosen >= 0) & (chosen < 3)).all()


class Operations(TorchDispatchMode):
    """Names of the torch ops that run, with the shape and dtype of what they give."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)]
        self.seen.append((function.__name__.partition(".")[0], [(x.numel(), x.dtype) for x in results]))
        return out


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}])
def test_only_top_p_alone_sorts_the_vocabulary(options):
    vocab = 3 * SAMPLE_BLOCK
    with Operations() as operations:
        sample(torch.randn(2, vocab), Sampling(temperature=1.0, **options), torch.rand(2))
    assert not [name for name, _ in operations.seen if name in ("sort", "argsort")]
    large = [dtype for _, results in operations.seen for size, dtype in results if size >= 2 * vocab]
    assert large and torch.float64 not in large
    with Operations() as operations:
        sample(torch.randn(2, vocab), Sampling(temperature=1.0, top_p=0.9), torch.rand(2))
    assert "sort" in [name for name, _ in operations.seen]


def prepared_decoder(model, prompts, steps, stop_tokens=(), **options) -> Decoder:
    cache = model.new_cache(len(prompts) * 4, page_size=32, max_batch=len(prompts))
    rows = cache.add([len(prompt) + steps for prompt in prompts])
    uniforms = torch.rand(steps, len(prompts))
    decoder = Decoder(model, cache, rows, Sampling(**options), uniforms, stop_tokens)
    decoder.accept(model.prefill(cache, rows, prompts))
    return decoder


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}]
)
def test_a_step_asks_nothing_of_the_host(options):
    """On a GPU each of these ops would wait for it."""
    decoder = prepared_decoder(tiny.model("fusedkv"), tiny.prompts(5, 3), 4, stop_tokens=[1], **options)
    with Operations() as operations:
        decoder.step()
    order = [name for name, _ in operations.seen]
    assert order[0] == "decode_places" and "fused_attention" in order and order[-1] == "accept_tokens"
    assert options or order[-2:] == ["largest_token", "accept_tokens"], "of greedy decoding that is all"
    names = set(order)
    assert not names & {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}


@pytest.mark.cuda
@pytest.mark.parametrize("every", [1, 30])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_the_decode_loop_never_synchronises(every, options):
    """No wait for a stream, the device or a copy: only, by an event, for tokens that are read with a lag."""
    steps = 31
    decoder = prepared_decoder(tiny.model("fusedkv", device="cuda"), tiny.prompts(5, 3), steps, **options)
    decoder.capture()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("decode loop"):
            emitted = list(_decode(decoder, steps, every))
        torch.cuda.synchronize()
    events = profiler.events()
    (loop,) = [x for x in events if x.name == "decode loop" and x.device_type.name == "CPU"]
    names = [x.name for x in events if loop.time_range.start <= x.time_range.start <= loop.time_range.end]
    reads = -(-(steps - 1) // every)
    assert len(emitted) == steps - 1 and names.count("cudaGraphLaunch") == steps - 1
    assert not {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"} & set(names)
    assert names.count("cudaEventSynchronize") <= reads
    assert sum("Memcpy DtoH" in x.name for x in events) == reads


@pytest.mark.cuda
def test_prefill_waits_for_nothing_once_it_has_begun():
    model, prompts = tiny.model("fusedkv", device="cuda"), tiny.prompts(30, 41, 41)
    cache = model.new_cache(12, page_size=16, max_batch=3)
    for _ in range(2):  # what is pinned or compiled once is there at the second
        rows = cache.add([48] * 3)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function("prefill"):
                model.prefill(cache, rows, prompts, chunk=32)
            torch.cuda.synchronize()
        cache.free(rows)
    events = profiler.events()
    (call,) = [x for x in events if x.name == "prefill" and x.device_type.name == "CPU"]
    names = {x.name for x in events if call.time_range.start <= x.time_range.start <= call.time_range.end}
    assert not {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"} & names


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_reading_several_steps_at_once_changes_nothing(device, every):
    """Nor does it return tokens after a stop."""
    model, prompts, steps = tiny.model("fusedkv", device=device), tiny.prompts(5, 3, 8), 12
    free = generate(model, prompts, steps).tokens
    stops = [max(free[0], key=free[0].index)]  # what the first sequence says last for the first time
    expected = generate(model, prompts, steps, stop_tokens=stops).tokens
    assert len(expected[0]) < steps and max(map(len, expected)) > 3
    decoder = prepared_decoder(model, prompts, steps, stops)
    rows = [*decoder.start_read(0, 1).wait(), *_decode(decoder, steps, every)]
    assert len(rows) == steps
    columns = [list(column) for column in zip(*rows, strict=True)]
    for tokens, column in zip(expected, columns, strict=True):
        assert column == tokens + [DONE] * (steps - len(tokens))


def test_a_cache_of_ones_own_is_used_and_given_back(device):
    model, prompts = tiny.model("fusedkv", device=device), tiny.prompts(5, 9)
    cache = model.new_cache(10, page_size=4, max_batch=4)
    tiny.poison(cache)
    (kept,) = cache.add([4])
    expected = generate(model, prompts, 6).tokens
    for _ in range(3):
        assert generate(model, prompts, 6, cache=cache).tokens == expected
    assert cache.num_free_pages == 9
    steps = stream(model, prompts, 6, cache=cache)
    next(steps)
    assert cache.num_free_pages < 9
    steps.close()
    assert cache.num_free_pages == 9 and cache.capacity(kept) == 4


def test_progress_bar(capsys):
    generate(tiny.model("fusedkv"), tiny.prompts(3, 4), 5, progress=True)
    assert "10/10" in capsys.readouterr().err
    generate(tiny.model("fusedkv"), tiny.prompts(3, 4), 5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "prompts, count, options, message",
    [
        ([], 4, {}, "prompts: expected at least one prompt, got 0"),
        ([[1], []], 4, {}, r"prompts\[1\]: expected at least one token, got an empty prompt"),
        ([1, 2], 4, {}, r"prompts\[0\]: expected a sequence of token ids, got 1"),
        (["text"], 4, {}, r"prompts\[0\]: expected a sequence of token ids, got 'text'"),
        ([[0.5]], 4, {}, r"prompts\[0\]: expected an integer of at least 0, got 0\.5"),
        (
            [torch.zeros(1, 2).long()],
            4,
            {},
            r"prompts\[0\]: expected integers \[S\], got torch\.int64 \[1, 2\]",
        ),
        ([[3, 97]], 4, {}, r"prompts\[0\]: expected token ids 0 to 96, got 97"),
        ([[-1, 3]], 4, {}, r"prompts\[0\]: expected an integer of at least 0, got -1"),
        ([[1] * 125], 4, {}, r"prompts\[0\]: expected at most 128 tokens .*got 125 \+ 4"),
        ([[1]], 0, {}, "max_new_tokens: expected an integer of at least 1, got 0"),
        ([[1]], 4, {"temperature": -1.0}, r"temperature: expected 0 or more, got -1\.0"),
        ([[1]], 4, {"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ([[1]], 4, {"top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        ([[1]], 4, {"top_p": 0.0}, r"top_p: expected None or above 0 and at most 1, got 0\.0"),
        ([[1]], 4, {"top_p": 1.5}, r"top_p: expected None or above 0 and at most 1, got 1\.5"),
        ([[1]], 4, {"prefill_chunk": 0}, "prefill_chunk: expected an integer of at least 1, got 0"),
        ([[1]], 4, {"page_size": 0}, "page_size: expected an integer of at least 1, got 0"),
        (None, 4, {}, "generate: prompts: expected "),
        ("text", 4, {}, "generate: prompts: expected "),
        (torch.tensor([1, 2]), 4, {}, "generate: prompts: expected "),
        ([None], 4, {}, r"prompts\[0\]: expected a sequence of token ids, got None"),
        ([[None]], 4, {}, r"prompts\[0\]: expected .*got None"),
        ([[1, "a"]], 4, {}, r"prompts\[0\]: expected .*got 'a'"),
        ([[True]], 4, {}, r"prompts\[0\]: expected .*got True"),
        ([torch.tensor([-1, 3])], 4, {}, r"prompts\[0\]: expected token ids 0 to 96, got -1"),
        ([torch.tensor([1.0])], 4, {}, r"prompts\[0\]: expected integers \[S\], got torch\.float32"),
        ([torch.tensor([True])], 4, {}, r"prompts\[0\]: expected integers \[S\], got torch\.bool"),
        ([[2**70]], 4, {}, r"prompts\[0\]: expected "),
        ([[1]], 4.0, {}, r"max_new_tokens: expected an integer of at least 1, got 4\.0"),
        ([[1]], True, {}, "max_new_tokens: expected an integer of at least 1, got True"),
        ([[1]], 4, {"page_size": 2.5}, r"page_size: expected an integer of at least 1, got 2\.5"),
        ([[1]], 4, {"prefill_chunk": 2.5}, r"prefill_chunk: expected an integer of at least 1, got 2\.5"),
        ([[1]], 4, {"prefill_chunk": None}, "prefill_chunk: expected an integer of at least 1, got None"),
        ([[1]], 4, {"stop_tokens": 5}, "stop_tokens: expected a list of token ids, got 5"),
        ([[1]], 4, {"stop_tokens": [5, 97]}, "stop_tokens: expected an integer from 0 to 96, got 97"),
        ([[1]], 4, {"stop_tokens": [-1]}, "stop_tokens: expected an integer from 0 to 96, got -1"),
        ([[1]], 4, {"stop_tokens": ["a"]}, "stop_tokens: expected an integer from 0 to 96, got 'a'"),
        ([[1]], 4, {"seed": "a"}, "seed: expected an integer .*got 'a'"),
        ([[1]], 4, {"seed": 2**65}, "seed: expected an integer .*got 36893488147419103232"),
        ([[1]], 4, {"top_k": True}, "top_k: expected an integer of at least 1, got True"),
        ([[1]], 4, {"top_k": 2.0}, r"top_k: expected an integer of at least 1, got 2\.0"),
        ([[1]], 4, {"top_p": "a"}, "top_p: expected None or above 0 and at most 1, got 'a'"),
        ([[1]], 4, {"temperature": None}, "temperature: expected 0 or more, got None"),
        ([[1]], 4, {"use_cuda_graph": True}, "use_cuda_graph: expected a model on CUDA, got cpu"),
        ([[1]], 4, {"fp8_sources": "only"}, "fp8_sources: expected 'none', that of the cache, got 'only'"),
        (
            [[1]],
            4,
            {"fp8_sources": "both", "page_size": 4},
            "fp8_sources: expected none or copy or only, got 'both'",
        ),
        (
            [[1]],
            4,
            {"fp8_sources": None, "page_size": 4},
            "fp8_sources: expected none or copy or only, got None",
        ),
    ],
)
def test_bad_input_is_refused(prompts, count, options, message):
    """By stream as well, before the first token is asked for."""
    model = tiny.model("fusedkv")
    cache = None if "page_size" in options else model.new_cache(3, page_size=4)
    for call in (generate, stream):
        with pytest.raises(ValueError, match=message):
            call(model, prompts, count, cache=cache, **options)
    assert cache is None or cache.num_free_pages == 3


@pytest.mark.parametrize("call", [generate, stream])
def test_an_unknown_option_is_named(call):
    with pytest.raises((TypeError, ValueError), match="temprature"):
        call(tiny.model("fusedkv"), [[1]], 4, temprature=1.0)


def test_numpy_integers_are_integers():
    model = tiny.model("fusedkv")
    options = dict(page_size=4, prefill_chunk=2, seed=3, top_k=30, stop_tokens=[5, 6])
    plain = generate(model, [[3, 1, 4], [1]], 6, temperature=1.0, **options).tokens
    options = {name: np.int64(x) for name, x in options.items() if name != "stop_tokens"}
    prompts = [np.array([3, 1, 4], dtype=np.int32), [np.uint8(1)]]
    stops = np.array([5, 6])
    assert (
        generate(model, prompts, np.int64(6), temperature=1.0, stop_tokens=stops, **options).tokens == plain
    )


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_written():
    model = tiny.model("fusedkv")
    cache = model.new_cache(3, page_size=4, max_batch=2)
    tiny.poison(cache)
    for prompts, message in (
        (tiny.prompts(9, 3), "cache full: expected at most 3 free pages .*got 5 pages"),
        (tiny.prompts(10), "capacity: expected 1 to 12 tokens a sequence, got 13"),
        (tiny.prompts(1, 1, 1), "rows: expected 3 free sequences, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, 4, cache=cache)
    assert cache.num_free_pages == 3
    assert all(pool.isnan().all() for pool in (*cache.keys.values(), *cache.values.values()))
    other = tiny.model("fusedkv_lite").new_cache(3)
    with pytest.raises(ValueError, match=r"cache: expected one with this model's config.*fusedkv_lite"):
        generate(model, tiny.prompts(3), 4, cache=other)
