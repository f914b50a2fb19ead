"""Perplexity over token files: every way through the model gives the same, and the buckets add up."""

import csv
import json
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from fusedkv_ext import cli
from fusedkv_ext.data import TokenFile
from fusedkv_ext.evaluate import Bucket, evaluate

CONTEXT = 100  # three buckets, and pages that end in the middle


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TokenFile:
    path = tmp_path_factory.mktemp("tokens") / "validation.bin"
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, 5 * CONTEXT + 30)
    ids.astype("<u2").tofile(path)
    header = dict(dtype="uint16", num_tokens=len(ids), num_documents=1, max_token=int(ids.max()))
    header |= dict(vocab_size=tiny.VOCAB, sha256="0", source="test")
    path.with_suffix(".json").write_text(json.dumps(header))
    return TokenFile(path)


def losses(model, tokens, windows) -> torch.Tensor:
    """Loss by window and position, straight from the model."""
    ids = torch.from_numpy(tokens.tokens.astype(np.int64))
    rows = torch.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in windows]).to(model.device)
    with torch.no_grad():
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(
        -1, CONTEXT
    )


def test_without_a_cache(tokens, device):
    model = tiny.model(device=device)
    found = evaluate(model, tokens, CONTEXT, batch=2)  # a last batch of one window
    expected = losses(model, tokens, range(5))
    assert [(x.first, x.last, x.tokens) for x in found.buckets] == [(0, 63, 320), (64, 99, 180)]
    tolerance = dict(rel=1e-2 if device == "cuda" else 1e-6)
    for bucket in (*found.buckets, found.total):
        mean = expected[:, bucket.first : bucket.last + 1].mean().item()
        assert bucket.loss == pytest.approx(mean, **tolerance)
        assert bucket.perplexity == math.exp(bucket.loss)
    assert (found.total.first, found.total.last, found.total.tokens) == (0, 99, 500)


@pytest.mark.parametrize("cache", ["prefill", "decode"])
@pytest.mark.parametrize("plan", tiny.PLANS)
def test_with_a_cache(tokens, plan, cache):
    model = tiny.model(tiny.PLANS[plan])
    expected = evaluate(model, tokens, CONTEXT, max_windows=2)
    found = evaluate(model, tokens, CONTEXT, cache, max_windows=2)
    assert (found.cache, found.fp8_sources) == (cache, "none")
    for x, y in zip((*found.buckets, found.total), (*expected.buckets, expected.total), strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-6)


@pytest.mark.parametrize("fp8_sources", ["copy", "only"])
def test_fp8_sources_count(tokens, device, fp8_sources):
    model = tiny.model(device=device)
    plain, stepwise, at_once = (
        evaluate(model, tokens, CONTEXT, cache, fp8, batch=3, max_windows=3)
        for cache, fp8 in (("none", "none"), ("decode", fp8_sources), ("prefill", fp8_sources))
    )
    tolerance = 0.05 if device == "cuda" else 1e-3
    assert stepwise.total.loss == pytest.approx(at_once.total.loss, rel=tolerance)
    assert at_once.total.loss == pytest.approx(plain.total.loss, rel=0.2)
    changes = [abs(x.loss - y.loss) for x, y in zip(at_once.buckets, plain.buckets, strict=True)]
    assert max(changes) > 1e-5  # the sources were rounded


def test_prefill_of_several_parts(tokens, monkeypatch):
    monkeypatch.setattr("fusedkv_ext.evaluate.LOSS_TOKENS", 64)
    model = tiny.model()
    whole = evaluate(model, tokens, CONTEXT, batch=2).total.loss
    assert evaluate(model, tokens, CONTEXT, "prefill", batch=2).total.loss == pytest.approx(whole, rel=1e-6)


def test_windows_at_even_distances(tokens):
    model = tiny.model()
    found = evaluate(model, tokens, CONTEXT, max_windows=2)
    assert found.total.loss == pytest.approx(losses(model, tokens, [0, 2]).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(context=129), "context: expected an integer from 1 to 128, got 129"),
        (dict(context=0), "context: expected an integer from 1 to 128, got 0"),
        (dict(batch=0), "batch: expected an integer of at least 1, got 0"),
        (dict(max_windows=0), "max_windows: expected an integer of at least 1, got 0"),
        (dict(cache="paged"), "cache: expected none or prefill or decode, got 'paged'"),
        (dict(fp8_sources="copy"), "fp8_sources: expected none without a cache, got 'copy'"),
        (dict(fp8_sources="all"), "fp8_sources: expected none or copy or only, got 'all'"),
    ],
)
def test_bad_options(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny.model(), tokens, **options)


def test_perplexity_of_any_loss():
    perplexities = [Bucket(0, 0, 1, loss).perplexity for loss in (0.0, 1.0, 5000.0, math.nan)]
    assert perplexities[:3] == [1.0, math.e, math.inf] and math.isnan(perplexities[3])


def test_a_smaller_vocabulary_and_a_plan_without_sources(tokens):
    with pytest.raises(ValueError, match=r"validation.bin: expected token ids 0 to 49"):
        evaluate(tiny.model(vocab_size=50), tokens, CONTEXT)
    with pytest.raises(ValueError, match="fp8_sources: expected none for the plan vanilla"):
        evaluate(tiny.model("vanilla"), tokens, CONTEXT, "decode", "copy")


def test_command_line(tokens, tmp_path, capsys):
    model = tiny.model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    table = tmp_path / "table.csv"
    args = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tokens.path), "--device", "cpu"]
    options = ["--context", "100", "--cache", "prefill", "--fp8-sources", "copy"]
    assert cli.main([*args, *options, "--csv", str(table)]) == 0
    printed = capsys.readouterr().out.splitlines()
    expected = evaluate(model, tokens, 100, "prefill", "copy")
    assert [line.split()[-3:] for line in printed[1:]] == [
        [f"{x.tokens:,}", f"{x.loss:.4f}", f"{x.perplexity:.3f}"] for x in (*expected.buckets, expected.total)
    ]
    rows = list(csv.DictReader(table.open()))
    assert [float(row["loss"]) for row in rows] == [x.loss for x in (*expected.buckets, expected.total)]
    assert {(row["cache"], row["fp8_sources"]) for row in rows} == {("prefill", "copy")}
    for extra, message in (
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got abacus"),
        (["--context", "1000"], "context: expected an integer from 1 to 128, got 1000"),
        (["--csv", str(tmp_path / "none/a.csv")], "--csv: expected a file in a folder that exists, got "),
        (["--data", str(tmp_path / "none.bin")], "none.bin: expected a file that prepare wrote, got none"),
    ):
        assert cli.main([*args, *extra]) == 1
        assert message in capsys.readouterr().err
