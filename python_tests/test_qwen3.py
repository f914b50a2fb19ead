"""A vanilla model with a Hugging Face model's weights gives the logits of transformers."""

import pytest
import torch
from oracle import assert_close_2x
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM, generate

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with every option": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
        "beta_fast": 4.0,  # of other channels than the defaults 32 and 1
        "beta_slow": 0.5,
    },
}


def peer(kind="qwen3", scaling="default", tied=False, device="cpu", **options):
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64 if device == "cuda" else 16,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 5000.0, **SCALINGS[scaling]},
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
    return model


def logits_of(theirs, ids):
    with torch.no_grad():
        return theirs(ids).logits


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind, tied", [("qwen3", False), ("qwen3", True), ("llama", False)])
def test_float32_logits(tmp_path, kind, tied, scaling):
    theirs = peer(kind, scaling, tied)
    theirs.save_pretrained(tmp_path)
    ours = FusedKVForCausalLM.from_hf(tmp_path)
    assert ours.config.plan.name == "vanilla" and ours.dtype == torch.float32
    ids = torch.randint(0, 97, (2, 100))
    same, exact = logits_of(theirs, ids), logits_of(theirs.double(), ids)
    with torch.no_grad():
        assert_close_2x(ours(ids), exact, same)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("qwen3", {"rms_norm_eps": 1e-2}),
        ("llama", {"rms_norm_eps": 1e-2}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention"] * 3,
            },
        ),
    ],
    ids=["qwen3-eps", "llama-eps", "window"],
)
def test_options(tmp_path, kind, options):
    ids = torch.randint(0, 97, (2, 40))
    theirs = peer(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = FusedKVForCausalLM.from_hf(tmp_path)
    same, exact = logits_of(theirs, ids), logits_of(theirs.double(), ids)
    plain = peer(kind).double()
    plain.load_state_dict(theirs.state_dict())
    assert (logits_of(plain, ids) - exact).abs().max() > 1e-3, "the option makes no difference here"
    with torch.no_grad():
        assert_close_2x(ours(ids), exact, same)
        cache = ours.new_cache(20, max_batch=2)
        rows = cache.add([40, 40])
        assert_close_2x(torch.stack(ours.prefill(cache, rows, list(ids), 9, all_logits=True)), exact, same)


def test_a_tied_matrix_may_be_there_twice(tmp_path):
    theirs = peer(tied=True)
    theirs.save_pretrained(tmp_path)
    once = FusedKVForCausalLM.from_hf(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    twice = FusedKVForCausalLM.from_hf(tmp_path).state_dict()
    assert once.keys() == twice.keys() and all(torch.equal(once[name], x) for name, x in twice.items())


def test_bfloat16_logits(device, tmp_path):
    theirs = peer(device=device).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = FusedKVForCausalLM.from_hf(tmp_path, device=device)
    assert ours.dtype == torch.bfloat16
    ids = torch.randint(0, 97, (2, 60))
    same = logits_of(theirs.to(device), ids.to(device))
    exact = logits_of(theirs.cpu().double(), ids)
    with torch.no_grad():
        actual = ours(ids.to(device))
        cache = ours.new_cache(20, max_batch=2)
        rows = cache.add([60, 60])
        cached = torch.stack(ours.prefill(cache, rows, list(ids), all_logits=True))
    assert_close_2x(actual, exact, same)
    assert_close_2x(cached, exact, same)


def test_greedy_generation():
    theirs = peer()
    config = FusedKVConfig.from_hf(theirs.config.to_dict())
    ours = FusedKVForCausalLM.from_hf_state_dict(config, theirs.state_dict())
    prompt = torch.randint(0, 97, (9,))
    expected = theirs.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert generate(ours, [prompt], 8).tokens == [expected[0, 9:].tolist()]


def test_shards_are_read(tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    whole = FusedKVForCausalLM.from_hf(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    sharded = FusedKVForCausalLM.from_hf(tmp_path).state_dict()
    assert all(torch.equal(sharded[name], x) for name, x in whole.items())


def test_bad_state_dicts_name_every_tensor(tmp_path):
    theirs = peer()
    config = FusedKVConfig.from_hf(theirs.config.to_dict())
    tensors = dict(theirs.state_dict())
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    with pytest.raises(ValueError) as error:
        FusedKVForCausalLM.from_hf_state_dict(config, tensors)
    assert "missing ['model.layers.1.self_attn.k_proj.weight']" in str(error.value)
    assert "model.layers.0.self_attn.q_proj.bias" in str(error.value)

    tensors = dict(theirs.state_dict())
    tensors["model.norm.weight"] = torch.zeros(31)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected shape \[32\], got \[31\]"):
        FusedKVForCausalLM.from_hf_state_dict(config, tensors)

    fused = FusedKVConfig.from_hf(theirs.config.to_dict(), plan="fusedkv_lite")
    with pytest.raises(ValueError, match=r"config\.plan: expected vanilla, got fusedkv_lite"):
        FusedKVForCausalLM.from_hf_state_dict(fused, dict(theirs.state_dict()))
    (tmp_path / "config.json").write_text(theirs.config.to_json_string())
    with pytest.raises(FileNotFoundError, match=r"at least one \.safetensors file"):
        FusedKVForCausalLM.from_hf(tmp_path)


def test_bad_files_are_named(tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.bfloat16):
        save_file({**good, name: good[name].to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.(gate_)?up_proj\.weight"):
            FusedKVForCausalLM.from_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file, got ") as error:
        FusedKVForCausalLM.from_hf(tmp_path)
    assert str(tmp_path) in str(error.value)
    for text, message in (("{", "expected JSON, got "), ("[]", "expected a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            FusedKVForCausalLM.from_hf(tmp_path)
        assert str(tmp_path / "config.json") in str(error.value)
