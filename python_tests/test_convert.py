"""From a vanilla model to every plan: what is copied, what is fitted, and what is refused."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from oracle import assert_close_2x
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fusedkv_ext import CrossLayerPlan, FusedKVConfig, FusedKVForCausalLM, cli, data, reference
from fusedkv_ext.convert import NormalEquations, convert, least_squares, windows_of

WINDOWS = torch.arange(12 * 40).mul(31).remainder(tiny.VOCAB).view(12, 40)
WORDS = " ".join(f"w{i}" for i in WINDOWS.flatten().tolist())


def vanilla(dtype=torch.float64, device="cpu", **overrides):
    return tiny.model("vanilla", dtype, device, **overrides)


def keys_and_values(model, ids):
    """What every layer of a vanilla model projects: [(keys, values)]."""
    x, cos_sin, found = model.model.embed_tokens(ids), model.model.rotary(), []
    with torch.no_grad():
        for layer in model.model.layers:
            x, own = layer(x, cos_sin)
            found.append(own)
    return found


class Planted:
    """A vanilla model of 6 layers in which the keys and values of layers 3 to 5 mix those of 0 and 2.

    The residual stream does not change below the last layer, so that keys, which have no norm here, are
    linear in one input everywhere. Only the last layer has an output projection, which shows its attention
    in the logits.
    """

    def __init__(self, interleaved=False, heads=(4, 2), noise=0.0, scalar=False, dtype=torch.float64):
        overrides = dict(
            qk_norm=False, rope_interleaved=interleaved, num_attention_heads=heads[0], num_kv_heads=heads[1]
        )
        self.model = vanilla(dtype, **overrides)
        config, layers = self.model.config, self.model.model.layers
        first, last, upper = layers[0], layers[2], layers[3:]
        hkv, d = config.num_kv_heads, config.head_dim
        q_rows = config.num_attention_heads * d
        shape = (3, 2, 1, 1) if scalar else (3, 2, hkv, d)
        self.a, self.b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        if not scalar:  # one weight a RoPE pair
            self.a[..., 1::2] = self.a[..., 0::2]
            if not interleaved:
                self.a = torch.cat((self.a[..., 0::2], self.a[..., 1::2]), -1)
        with torch.no_grad():
            for layer in layers:
                layer.attention_norm.weight.copy_(first.attention_norm.weight)
                layer.mlp.down_proj.weight.zero_()
                if layer is not layers[-1]:
                    layer.attention.o_proj.weight.zero_()
            for i, layer in enumerate(upper):
                sources = [
                    x.attention.qkv_proj.weight[q_rows:].unflatten(0, (2, hkv, d)) for x in (first, last)
                ]
                mixes = torch.stack((self.a[i], self.b[i]), 1).expand(2, 2, hkv, d)  # [source, side, H, D]
                mixed = sum(m[..., None] * s for m, s in zip(mixes, sources, strict=True))
                mixed = mixed + noise * torch.randn_like(mixed)
                layer.attention.qkv_proj.weight[q_rows:] = mixed.flatten(0, 2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_planted_weights_are_recovered(interleaved, heads):
    planted = Planted(interleaved, heads)
    model, fits = convert(planted.model, CrossLayerPlan.fusedkv(6, 3), WINDOWS, batch=5)
    for i in range(3):
        keys, values = model.model.layers[3 + i].attention.fusion()
        torch.testing.assert_close(keys, planted.a[i], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(values, planted.b[i], atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        logits = planted.model(WINDOWS)
        torch.testing.assert_close(model(WINDOWS), logits, atol=1e-5, rtol=1e-5)
        lite, _ = convert(planted.model, CrossLayerPlan.fusedkv(6, 3), start="lite")
        assert (lite(WINDOWS) - logits).abs().max() > 0.1, "the weights do not matter here"
    assert len(fits) == 3 * 2 * (1 + heads[1])
    assert all(fit.explained == pytest.approx(1, abs=1e-9) and fit.lite < 0.9 for fit in fits)


def test_planted_float32_and_scalars():
    planted = Planted(dtype=torch.float32)
    model, fits = convert(planted.model, CrossLayerPlan.fusedkv(6, 3), WINDOWS)
    fusion = model.model.layers[4].attention.fusion
    assert fusion.key.dtype == model.dtype == torch.float32
    torch.testing.assert_close(fusion()[0], planted.a[1], atol=1e-3, rtol=1e-3)
    assert all(fit.explained == pytest.approx(1, abs=1e-5) for fit in fits)

    planted = Planted(scalar=True)
    plan = CrossLayerPlan.dense_fusion(6, 3)
    model, fits = convert(planted.model, plan, WINDOWS)
    for i in range(3):
        fusion = model.model.layers[3 + i].attention.fusion
        for got, want in ((fusion.key, planted.a[i]), (fusion.value, planted.b[i])):
            assert got.shape == (3,) and got[1].abs() < 1e-6  # layer 1 is not in the mix
            torch.testing.assert_close(got[[0, 2]], want.flatten(), atol=1e-6, rtol=1e-6)
    assert all(fit.explained == pytest.approx(1, abs=1e-9) for fit in fits)


def oracle(sources, target, tied):
    """lstsq, a problem a head and group of channels: the weights [S, H, D] and the sum of squares left."""
    weights, left = torch.empty(len(sources), *target.shape[-2:], dtype=torch.float64), 0.0
    for head in range(target.shape[-2]):
        for group in tied:
            x = torch.stack([s[..., head, group].flatten() for s in sources], 1)
            y = target[..., head, group].flatten()
            solution = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
            weights[:, head, group] = solution[:, None].expand(-1, len(group))
            left += (y - x @ solution).square().sum().item()
    return weights, left


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["fusedkv", "fusedkv_lite_learnable"])
def test_weights_are_those_of_least_squares(name, interleaved):
    """In a random model, where nothing fits well; one batch at a time or all at once."""
    source, plan = vanilla(rope_interleaved=interleaved), CrossLayerPlan.named(name, 6)
    model, fits = convert(source, plan, WINDOWS, batch=5)
    again, _ = convert(source, plan, WINDOWS, batch=12)
    kv, pairs = keys_and_values(source, WINDOWS), range(8)
    tied = {
        0: [[2 * j, 2 * j + 1] for j in pairs] if interleaved else [[j, j + 8] for j in pairs],
        1: [[j] for j in range(16)],
    }
    shares = {(fit.layer, fit.side): fit for fit in fits if fit.head is None}
    for i in (3, 4, 5):
        attention = model.model.layers[i].attention
        for side, name in enumerate(("key", "value")):
            chosen = getattr(plan.layers[i], f"{name}_sources")
            weights, left = oracle([kv[s][side] for s in chosen], kv[i][side], tied[side])
            torch.testing.assert_close(attention.fusion()[side], weights, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(
                again.model.layers[i].attention.fusion()[side], attention.fusion()[side]
            )
            power = kv[i][side].square().sum().item()
            fit = shares[i, name]
            assert fit.sources == chosen and fit.explained == pytest.approx(1 - left / power, abs=1e-9)
            assert 0 < fit.explained < 0.5
            start = chosen[-1] if name == "key" else chosen[0]
            lost = (kv[i][side] - kv[start][side]).square().sum().item()
            assert fit.lite == pytest.approx(1 - lost / power, abs=1e-9)


def test_noise_is_not_explained():
    """Per head: the heads' parts add up to the whole."""
    planted = Planted(noise=0.3)
    _, fits = convert(planted.model, CrossLayerPlan.fusedkv(6, 3), WINDOWS)
    kv = keys_and_values(planted.model, WINDOWS)
    for whole in (fit for fit in fits if fit.head is None):
        heads = [f for f in fits if (f.layer, f.side) == (whole.layer, whole.side) and f.head is not None]
        power = kv[whole.layer][whole.side == "value"].square().sum((0, 1, 3))
        share = sum(f.explained * p.item() for f, p in zip(heads, power, strict=True)) / power.sum().item()
        assert [f.head for f in heads] == [0, 1] and whole.explained == pytest.approx(share)
        assert 0.2 < whole.explained < 0.999 and whole.lite < whole.explained


def test_scores_of_a_fitted_model_depend_on_relative_positions():
    """What tied pairs keep: shifted by any number of positions, queries and keys score the same."""
    model, _ = convert(vanilla(), CrossLayerPlan.fusedkv(6, 3), WINDOWS)
    weights = model.model.layers[4].attention.fusion()[0]
    q, k_1, k_n = (torch.randn(1, 2, 16, dtype=torch.float64) for _ in range(3))
    cos_sin = model.model.rotary().double()

    def score(shift, weights):
        q_rotated = reference.apply_rope(q, torch.tensor([shift + 9]), cos_sin, False)
        k_1_rotated, k_n_rotated = (
            reference.apply_rope(k, torch.tensor([shift + 4]), cos_sin, False) for k in (k_1, k_n)
        )
        return (q_rotated * (weights[0] * k_1_rotated + weights[1] * k_n_rotated)).sum()

    torch.testing.assert_close(score(0, weights), score(50, weights), atol=1e-5, rtol=1e-5)
    untied = weights + torch.randn_like(weights)
    assert (score(0, untied) - score(50, untied)).abs() > 1e-3


def test_sources_that_cannot_be_told_apart():
    sums = NormalEquations(3, 1, 2, torch.device("cpu"))
    x = torch.randn(4, 9, 1, 2)
    sums.add([x, x, torch.zeros_like(x)], 3 * x)
    weights = least_squares(sums.gram, sums.cross)
    torch.testing.assert_close(
        weights, torch.tensor([1.5, 1.5, 0.0]).double().expand(1, 2, 3), atol=1e-6, rtol=0
    )
    assert sums.explained(weights.movedim(-1, 0)) == pytest.approx([1, 1])
    silent = NormalEquations(1, 1, 2, torch.device("cpu"))
    silent.add([0 * x], 0 * x)
    assert silent.explained(torch.zeros(1, 1, 2)) == [1, 1]


@pytest.mark.parametrize("name", tiny.PLANS)
def test_every_plan(name):
    """Everything but keys and values is copied, and the source stays as it was."""
    source, plan = vanilla(torch.float32), tiny.PLANS[name]
    before = {key: x.clone() for key, x in source.state_dict().items()}
    model, fits = convert(source, plan, WINDOWS)
    assert model.config == dataclasses.replace(source.config, plan=plan, fusion_init="lite")
    assert {fit.layer for fit in fits} == set(range(6)) - set(plan.storage_layers)
    rows = source.config.num_attention_heads * source.config.head_dim
    for key, x in model.state_dict().items():
        if key.endswith("attention.q_proj.weight"):
            expected = before[key.replace("q_proj", "qkv_proj")][:rows]
        elif ".fusion." in key:
            continue
        else:
            expected = before[key]
        assert torch.equal(x, expected), key
    assert all(torch.equal(x, before[key]) for key, x in source.state_dict().items())
    pointers = {x.data_ptr() for x in source.state_dict().values()}
    assert not pointers & {x.data_ptr() for x in model.state_dict().values()}
    assert model(WINDOWS, WINDOWS).isfinite()
    if name == "vanilla":
        assert fits == [] and torch.equal(model(WINDOWS), source(WINDOWS))
    lite, measured = convert(source, plan, WINDOWS, start="lite")
    fresh = FusedKVForCausalLM(lite.config).state_dict()
    assert all(torch.equal(x, fresh[key]) for key, x in lite.state_dict().items() if ".fusion." in key)
    assert [fit.explained for fit in measured] == [fit.lite for fit in fits]


def test_on_a_device(device):
    """On a GPU in bfloat16, with the fusion weights in float32."""
    source = vanilla(torch.float32, device)
    model, fits = convert(source, CrossLayerPlan.fusedkv(6, 3), WINDOWS)
    assert model.device.type == device and model.dtype == source.dtype
    assert model.model.layers[3].attention.fusion.key.dtype == torch.float32
    with torch.no_grad():
        assert model(WINDOWS.to(device)).isfinite().all()
    assert all(fit.lite < fit.explained < 1 for fit in fits)


def test_bad_arguments():
    source, plan = vanilla(torch.float32), CrossLayerPlan.fusedkv(6, 3)
    with pytest.raises(ValueError, match=r"source: expected a vanilla model, .* 6 layers, got cla, .* in 3"):
        convert(tiny.model("cla", torch.float32), plan, WINDOWS)
    with pytest.raises(ValueError, match="plan: expected one of 6 layers, got 4 layers"):
        convert(source, CrossLayerPlan.fusedkv(4), WINDOWS)
    with pytest.raises(ValueError, match="start: expected least-squares or lite, got 'best'"):
        convert(source, plan, WINDOWS, start="best")
    with pytest.raises(ValueError, match=r"calibration text to estimate the weights of fusedkv .* got none"):
        convert(source, plan)
    with pytest.raises(ValueError, match=r"windows: expected \[N, T\], N, T > 0, got \[40\]"):
        convert(source, plan, WINDOWS[0])
    with pytest.raises(ValueError, match="windows: expected token ids 0 to 96, got 97"):
        convert(source, plan, WINDOWS + 1)
    with pytest.raises(ValueError, match=r"sliding_window: expected a source without one, .* got 7"):
        convert(vanilla(torch.float32, sliding_window=7), plan, WINDOWS)
    with torch.no_grad():
        source.model.layers[4].attention.qkv_proj.weight[-1] = float("inf")
    with pytest.raises(
        ValueError, match=r"finite values in layer 4 .* got an infinity or NaN in torch.float32"
    ):
        convert(source, plan, WINDOWS)


def test_windows_are_spread_over_the_tokens():
    tokens = np.arange(1050, dtype=np.uint16)
    windows = windows_of(tokens, 480, 100, 2)
    assert windows.shape == (4, 100) and windows.dtype == torch.int64
    assert windows[:, 0].tolist() == [0, 200, 500, 700] and windows[-1, -1] == 799
    assert windows_of(tokens, 10**9, 100, 2).shape == (10, 100)
    assert windows_of(tokens, 1, 100, 2).shape == (2, 100)
    with pytest.raises(ValueError, match=r"at least one batch of 3 x 400 tokens, got 1050"):
        windows_of(tokens, 100, 400, 3)


def word_tokenizer(size=tiny.VOCAB):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(7)  # as some published tokenizers have it
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """A vanilla model with its tokenizer, and calibration text."""
    vanilla(torch.float32).save_pretrained(tmp_path / "model")
    word_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(WORDS)
    return tmp_path


def command(folder, *args, source="model", plan="fusedkv:3", text="text.txt"):
    calibration = ["--calibration", str(folder / text)] if text else []
    options = ["--context", "40", "--batch", "4", "--device", "cpu"]
    paths = [str(folder / source), str(folder / "out")]
    return cli.main(["convert", *paths, "--plan", plan, *calibration, *options, *args])


def test_command(folder, capsys):
    assert command(folder) == 0
    out = capsys.readouterr().out
    model = FusedKVForCausalLM.from_pretrained(folder / "out")
    source = FusedKVForCausalLM.from_pretrained(folder / "model")
    expected, fits = convert(source, CrossLayerPlan.fusedkv(6, 3), WINDOWS, batch=4)
    assert model.config == expected.config
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in model.state_dict().items())
    copied = (folder / "out" / "tokenizer.json").read_text()
    assert copied == (folder / "model" / "tokenizer.json").read_text()
    with (folder / "out" / "conversion.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["layer"], r["side"], r["head"]) for r in rows[:4]] == [
        ("3", "key", "all"),
        ("3", "key", "0"),
        ("3", "key", "1"),
        ("3", "value", "all"),
    ]
    assert {r["sources"] for r in rows} == {"0 2"}
    assert [float(r["explained_variance"]) for r in rows] == [fit.explained for fit in fits]
    assert [float(r["explained_variance_lite_start"]) for r in rows] == [fit.lite for fit in fits]
    assert f"{fits[0].explained:.4f}" in out and "fusedkv, 3 of 6 layers with a cache" in out
    assert {path.name for path in folder.iterdir()} == {"model", "out", "text.txt"}
    model.model.layers[3].attention.fusion.key.sum().backward()  # it can be trained on


def test_token_file(folder, capsys):
    """What `prepare` makes of the text gives the same model as the text."""
    documents = [("a text", WORDS)]
    data.prepare(folder / "tokens", lambda: documents, word_tokenizer(), end="w0", validation=0)
    assert command(folder) == 0
    from_text = FusedKVForCausalLM.from_pretrained(folder / "out").state_dict()
    shutil.rmtree(folder / "out")
    assert command(folder, text="tokens/train.bin") == 0
    from_tokens = FusedKVForCausalLM.from_pretrained(folder / "out").state_dict()
    assert all(torch.equal(x, from_text[name]) for name, x in from_tokens.items())
    shutil.rmtree(folder / "out")

    word_tokenizer(50).save(str(folder / "tokens" / "tokenizer.json"))
    assert command(folder, text="tokens/train.bin") == 1
    assert "--calibration: expected tokens of " in capsys.readouterr().err
    small = tiny.model("vanilla", torch.float32, vocab_size=50)
    small.save_pretrained(folder / "small")
    assert command(folder, source="small", text="tokens/train.bin") == 1
    assert "expected token ids 0 to 49, the vocabulary of the model, got 96" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("plan", ["yoco", "cla:3", "layer_types:0_1_1_0_4_4", "vanilla"])
def test_command_without_calibration(folder, plan):
    assert command(folder, plan=plan, text=None) == 0
    model = FusedKVForCausalLM.from_pretrained(folder / "out")
    assert model.config.plan == CrossLayerPlan.parse(plan, 6)
    assert not (folder / "out" / "conversion.csv").exists()


def test_command_converts_dtypes(folder):
    (folder / "out").mkdir()
    assert command(folder, "--dtype", "bfloat16", "--start", "lite") == 0
    model = FusedKVForCausalLM.from_pretrained(folder / "out")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[3].attention.fusion()[1].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            dict(text=None),
            "calibration text to estimate the weights of fusedkv from, or start lite, got none",
        ),
        (dict(plan="fusedkv:6"), "n: expected an integer from 2 to 5, got 6"),
        (dict(plan="fusedkv:"), "plan: name: expected cla:N or "),
        (dict(plan="vanilla:2"), "plan: name: expected cla:N or "),
        (dict(plan="mla"), "plan: name: expected vanilla or "),
        (dict(plan="layer_types:0_1"), "plan: expected one of 6 layers, got 2 layers"),
        (dict(source="nowhere"), "SOURCE: expected a directory with config.json, got "),
        (dict(text="nothing.txt"), "--calibration: expected a file, got "),
        (dict(text="model/model.safetensors"), "--calibration: expected text in UTF-8, got "),
        (dict(text="short.txt"), "expected at least one batch of 4 x 40 tokens, got 3"),
        (
            ["--tokenizer", "nowhere"],
            "--tokenizer: expected a tokenizer.json, to read text with, got nowhere",
        ),
        (["--tokenizer", "LARGER"], "the tokenizer of the model, with ids 0 to 96, got ids up to 97 in "),
        (["--tokenizer", "TEXT"], "expected a tokenizer, got "),
        (["--context", "129"], "--context: expected an integer from 1 to 128, got 129"),
        (
            ["--device", "abacus"],
            "--device: expected cpu, or cuda or cuda:N where there is a GPU, got abacus",
        ),
        (["--batch", "0"], "--batch: expected an integer of at least 1, got 0"),
        (["--tokens", "0"], "--tokens: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, args, message):
    word_tokenizer(tiny.VOCAB + 1).save(str(folder / "larger.json"))
    (folder / "short.txt").write_text("w1 w2 w3")
    options, extra = (args, []) if isinstance(args, dict) else ({}, args)
    paths = {"LARGER": str(folder / "larger.json"), "TEXT": str(folder / "text.txt")}
    before = {path.name for path in folder.iterdir()}
    assert command(folder, *[paths.get(x, x) for x in extra], **options) == 1
    err = capsys.readouterr().err
    assert "error: " in err and message in err
    assert {path.name for path in folder.iterdir()} == before


def test_bad_models_are_refused(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "file").touch()
    assert command(folder) == 1
    assert "OUT: expected a directory that is new or empty, got " in capsys.readouterr().err
    shutil.rmtree(folder / "out")

    tiny.model("fusedkv_lite", torch.float32).save_pretrained(folder / "fused")
    assert command(folder, "--tokenizer", str(folder / "model" / "tokenizer.json"), source="fused") == 1
    assert "source: expected a vanilla model" in capsys.readouterr().err
    shutil.copy(folder / "model" / "config.json", folder / "fused")
    assert command(folder, source="fused") == 1
    assert "missing [" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.fixture
def hf(tmp_path):
    """Makes directories of tiny Hugging Face models with transformers."""
    transformers = pytest.importorskip("transformers", reason="makes the models")
    classes = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }

    def make(kind, **options):
        config_class, model_class = classes[kind]
        config = config_class(
            vocab_size=tiny.VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            attn_implementation="eager",
            **options,
        )
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.mul_(6)
        model.save_pretrained(tmp_path / "hf", max_shard_size="20kB")  # in shards
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
        return model

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", ["default", "linear", "llama3"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_hugging_face_models(hf, folder, kind, scaling, tied):
    rope = {
        "default": {},
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }[scaling]
    rope = {"rope_type": scaling, "rope_theta": 5000.0, **rope}
    theirs = hf(kind, rope_parameters=rope, tie_word_embeddings=tied)
    tokenizer = ["--tokenizer", str(folder / "model" / "tokenizer.json")]
    assert command(folder, *tokenizer, source="hf", plan="vanilla", text=None) == 0
    with torch.no_grad():
        ours = FusedKVForCausalLM.from_pretrained(folder / "out")(WINDOWS)
        assert_close_2x(ours, theirs.double()(WINDOWS).logits, theirs.float()(WINDOWS).logits)
    shutil.rmtree(folder / "out")
    assert command(folder, *tokenizer, source="hf", plan="fusedkv") == 0
    assert FusedKVConfig.load(folder / "out" / "config.json").qk_norm == (kind == "qwen3")
    assert (folder / "out" / "tokenizer.json").is_file()


def test_frequencies_in_old_checkpoints_are_left_out(hf, folder):
    tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    theirs = hf("llama")
    save_file(tensors, folder / "hf" / "old.safetensors")
    assert command(folder, source="hf", plan="vanilla", text=None) == 0
    with torch.no_grad():
        ours = FusedKVForCausalLM.from_pretrained(folder / "out")(WINDOWS)
        torch.testing.assert_close(ours, theirs(WINDOWS).logits, atol=1e-3, rtol=1e-3)


def test_hugging_face_models_beyond_ours(hf, folder, capsys):
    hf("llama")
    path = folder / "hf" / "config.json"
    good = json.loads(path.read_text())

    def refused(**values):
        path.write_text(json.dumps({**good, **values}))
        assert command(folder, source="hf", text=None, plan="cla") == 1
        return capsys.readouterr().err

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "expected rope_type linear or llama3 or yarn, got 'dynamic'" in refused(rope_parameters=dynamic)
    assert "model_type: expected qwen3 or llama, got 'gemma3'" in refused(model_type="gemma3")
    assert "attention_bias: expected False, got True" in refused(attention_bias=True)
    assert "partial_rotary_factor: expected 1.0" in refused(partial_rotary_factor=0.5)
    assert "missing ['model.layers.4." in refused(num_hidden_layers=5)
    next((folder / "hf").glob("*.safetensors")).unlink()
    assert "missing ['model." in refused()
    assert not (folder / "out").exists()
