import json

import pytest
import tiny
import torch

from fusedkv_ext import CrossLayerPlan, FusedKVConfig, FusedKVForCausalLM, LayerPlan
from fusedkv_ext.config import PRESETS

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "name, parameters", [("332m", 332e6), ("650m", 650e6), ("1.5b", 1.5e9), ("4b", 4.0e9)]
)
def test_presets_meet_their_names(name, parameters):
    config = FusedKVConfig.preset(name, plan="vanilla")
    with torch.device("meta"):
        model = FusedKVForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / parameters - 1) < 0.02
    assert config.num_attention_heads == 16 and config.vocab_size == 128_000
    assert config.max_position_embeddings == 8192 and config.head_dim in (64, 128)
    assert set(PRESETS) == {"332m", "650m", "1.5b", "4b"}


def test_preset_overrides():
    config = FusedKVConfig.preset("650m", num_kv_heads=4, plan="cla")
    assert config.num_kv_heads == 4 and config.plan == CrossLayerPlan.cla(16)


@pytest.mark.parametrize("plan", tiny.PLANS.values(), ids=tiny.PLANS)
def test_json_round_trip(plan, tmp_path):
    config = tiny.config(plan, rope_scaling=YARN, sliding_window=5, rope_interleaved=True)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert FusedKVConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, got 0"),
        ({"hidden_size": 2.5}, "hidden_size: expected a positive integer, got 2.5"),
        ({"num_layers": True}, "num_layers: expected a positive integer, got True"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a multiple of num_kv_heads 2, got 5"),
        ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number"),
        ({"qk_norm": "yes"}, "qk_norm: expected a bool, got 'yes'"),
        ({"rope_theta": True}, "rope_theta: expected a positive number, got True"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a positive number, got inf"),
        ({"sliding_window": 0}, "sliding_window: expected None or a positive integer, got 0"),
        ({"sliding_window": True}, "sliding_window: expected None or a positive integer, got True"),
        ({"rope_scaling": 2.0}, "rope_scaling: expected None or a dict"),
        ({"rope_scaling": {"rope_type": "magic"}}, "rope_type linear or llama3 or yarn, got 'magic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling: expected the options \['factor'\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling: expected positive numbers"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "rope_scaling: expected the options .* for yarn"),
        ({"plan": "fusekv"}, "plan: name: expected vanilla or .*got 'fusekv'"),
        ({"plan": 3}, "plan: expected a CrossLayerPlan or vanilla"),
        ({"plan": CrossLayerPlan.vanilla(5)}, "plan: expected one of 6 layers, got 5"),
        (
            {"fusion_init": "zeros"},
            "fusion_init: expected standard or equivalent or lite or uniform, got 'zeros'",
        ),
        ({"plan": "dense_fusion", "fusion_init": "equivalent"}, r"fusion_init: .*layers \(0, 2\).*layer 3"),
        (
            {
                "plan": CrossLayerPlan(
                    "mixed",
                    (
                        *CrossLayerPlan.vanilla(2).layers,
                        *(
                            LayerPlan((0, 1), (0, 1), kind, "channel")
                            for kind in ("scalar", *["channel"] * 3)
                        ),
                    ),
                ),
                "fusion_init": "equivalent",
            },
            "fusion_init: .*one kind.*'channel', 'scalar'",
        ),
        ({"colour": 1, "size": 2}, r"keys: expected only .*unknown \['colour', 'size'\]"),
    ],
)
def test_bad_values_name_the_field(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**overrides)


def test_bad_files_and_presets(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="expected JSON, got Expecting"):
        FusedKVConfig.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got 'utf-8' codec"):
        FusedKVConfig.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, got list"):
        FusedKVConfig.load(path)
    path.write_text('{"vocab_size": 5}')
    with pytest.raises(ValueError, match=r"none of \['head_dim', 'hidden_size'"):
        FusedKVConfig.load(path)
    with pytest.raises(ValueError, match=r"preset: expected 332m or .*, got '2b'"):
        FusedKVConfig.preset("2b")


QWEN3 = dict(
    model_type="qwen3",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def test_from_hf_reads_both_ways_to_write_rope():
    old = FusedKVConfig.from_hf({**QWEN3, "rope_theta": 1e6, "rope_scaling": YARN})
    new = FusedKVConfig.from_hf({**QWEN3, "rope_parameters": {"rope_theta": 1e6, **YARN}})
    assert old == new and old.rope_theta == 1e6 and old.rope_scaling == YARN
    assert old.plan == CrossLayerPlan.vanilla(4) and old.qk_norm and old.tie_word_embeddings
    plain = FusedKVConfig.from_hf({**QWEN3, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert plain.rope_scaling is None and plain.rope_theta == 5e5
    assert not FusedKVConfig.from_hf({**QWEN3, "model_type": "llama"}).qk_norm


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model_type": "mamba"}, "model_type: expected qwen3 or llama, got 'mamba'"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
            },
            "layer_types: expected a sliding window on all layers or none",
        ),
    ],
)
def test_from_hf_refuses_other_architectures(overrides, message):
    with pytest.raises(ValueError, match=message):
        FusedKVConfig.from_hf({**QWEN3, **overrides})


def test_from_hf_names_missing_keys():
    with pytest.raises(ValueError, match=r"none of \['hidden_size'\]"):
        FusedKVConfig.from_hf({k: v for k, v in QWEN3.items() if k != "hidden_size"})
