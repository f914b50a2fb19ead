"""Tiny models whose every part matters: large random weights, norms off one, fusion weights off Lite."""

import torch

from fusedkv_ext import CrossLayerPlan, FusedKVConfig, FusedKVForCausalLM
from fusedkv_ext.plan import PLAN_NAMES

VOCAB, LAYERS = 97, 6


def config(plan="fusedkv", **overrides) -> FusedKVConfig:
    values = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=LAYERS,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=0.1,  # an epsilon that is not passed on shows
        fusion_init="standard",
    )
    return FusedKVConfig.from_dict({**values, "plan": plan, **overrides})


def model(plan="fusedkv", dtype=torch.float64, device="cpu", **overrides) -> FusedKVForCausalLM:
    if device == "cuda":
        overrides = {"head_dim": 64, **overrides}
        dtype = torch.bfloat16
    made = FusedKVForCausalLM(config(plan, **overrides))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif "fusion" in name:
                parameter.normal_()
            else:
                parameter.mul_(6)
    return made.to(device=device, dtype=dtype)


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, VOCAB, (n,)) for n in lengths]


def poison(cache) -> None:
    """NaN in every slot: what reads one that was never written shows it."""
    for pools in (cache.keys, cache.values, cache.key_copies, cache.value_copies):
        for pool in pools.values():
            pool.fill_(float("nan"))


PLANS = {name: CrossLayerPlan.named(name, LAYERS) for name in PLAN_NAMES}
PLANS["fusedkv_lite_1"] = CrossLayerPlan.fusedkv_lite(LAYERS, n=1)  # the others store half of the layers
PLANS["layer_types"] = CrossLayerPlan.from_layer_types("0_1_0_3_1_3")
FP8_PLANS = {name: plan for name, plan in PLANS.items() if name != "vanilla"}  # in which layers are shared
