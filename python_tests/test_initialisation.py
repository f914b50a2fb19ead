"""How the parameters of a built model start."""

import math

import pytest
import tiny
import torch

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM


def build(**overrides) -> FusedKVForCausalLM:
    """A model with thousands of entries in each parameter."""
    shape = dict(
        hidden_size=128, intermediate_size=128, num_attention_heads=16, num_kv_heads=16, head_dim=128
    )
    return FusedKVForCausalLM(tiny.config(**{**shape, **overrides}))


def fusions(model):
    """Key weights [Hkv, D/2] and value weights [Hkv, D] of the sources 1 and n, layer by layer."""
    weights = [layer.attention.fusion for layer in model.model.layers[model.config.plan.last_storage + 1 :]]
    assert len(weights) == 3
    return [fusion.key.detach() for fusion in weights], [fusion.value.detach() for fusion in weights]


@pytest.mark.parametrize("plan", ["fusedkv", "vanilla"])
@pytest.mark.parametrize("num_layers", [4, 12])
def test_weights_are_normal_and_smaller_onto_the_residual_stream(plan, num_layers):
    model = build(plan=plan, num_layers=num_layers, vocab_size=500)
    checked = set()
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if "fusion" in name:
            continue
        checked.add(kind)
        if kind.endswith("norm"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        added = kind in ("o_proj", "down_proj")
        std = 0.02 / math.sqrt(2 * num_layers) if added else 0.02
        assert abs(parameter.mean()) < 0.05 * std, name
        assert abs(parameter.std() / std - 1) < 0.05, name
        assert 2.5 * std < parameter.abs().max() < 7 * std, name  # a normal distribution, not a uniform one
    projections = {"embed_tokens", "lm_head", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert projections <= checked and ("q_proj" in checked) == (plan == "fusedkv")


def test_lite_is_the_default_and_selects_k_n_and_v_1():
    shape = dict(num_layers=6, num_attention_heads=2, num_kv_heads=2, head_dim=16)
    default = FusedKVConfig(vocab_size=50, hidden_size=32, intermediate_size=32, **shape)
    for model in (build(fusion_init="lite"), FusedKVForCausalLM(default)):
        for key, value in zip(*fusions(model), strict=True):
            assert not key[0].any() and (key[1] == 1).all()
            assert (value[0] == 1).all() and not value[1].any()


def test_standard_draws_every_weight_from_a_normal_distribution():
    for weights in fusions(build(fusion_init="standard")):
        drawn = torch.stack(weights).transpose(0, 1).flatten(1)  # [source, layers and channels]
        assert (drawn.mean(1).abs() < 0.1).all() and (drawn.std(1) - 1).abs().max() < 0.1
        assert drawn.unique().numel() > 0.99 * drawn.numel()


def test_equivalent_unrolls_the_iterative_form():
    """In layer n + j, a_n = a' a_n + a'' has variance 1 + j and b_1 = b' b_1 + b'' has j; a_1 stays 0."""
    keys, values = fusions(build(fusion_init="equivalent"))
    for j, (key, value) in enumerate(zip(keys, values, strict=True), 1):
        assert not key[0].any()
        assert abs(key[1].var() / (1 + j) - 1) < 0.3
        assert abs(value[0].var() / j - 1) < 0.3
        assert abs(value[1].var() - 1) < 0.5  # a product of j draws, with long tails


@pytest.mark.parametrize(("plan", "sources"), [("fusedkv", 2), ("dense_fusion", 3)])
def test_uniform_is_the_mean_of_the_sources(plan, sources):
    for key, value in zip(*fusions(build(plan=plan, fusion_init="uniform")), strict=True):
        assert len(key) == len(value) == sources
        assert (key == torch.tensor(1 / sources)).all() and (value == torch.tensor(1 / sources)).all()
