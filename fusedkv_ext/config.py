"""The shape of a model, and its config.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fusedkv_ext.checks import expect
from fusedkv_ext.plan import PLAN_NAMES, CrossLayerPlan

FUSION_INITS = ("standard", "equivalent", "lite", "uniform")
ROPE_SCALING_OPTIONS = {  # rope_type: (required options, optional options)
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow"},
    ),
}

# Shapes of our own: with the vanilla plan and 16 heads each has its name's parameter count within 2%.
PRESETS: dict[str, dict[str, int]] = {
    "332m": dict(hidden_size=1024, intermediate_size=2752, num_layers=16, head_dim=64),
    "650m": dict(hidden_size=1536, intermediate_size=3392, num_layers=16, head_dim=128),
    "1.5b": dict(hidden_size=2048, intermediate_size=5632, num_layers=24, head_dim=128),
    "4b": dict(hidden_size=3072, intermediate_size=9472, num_layers=32, head_dim=128),
}

_HF_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError that names the path when it holds something else."""
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _positive(value: object) -> bool:
    """Whether a value is a positive, finite number; True, which Python counts as 1, is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all: until it does, an earlier one stays."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@dataclass(frozen=True)
class FusedKVConfig:
    """Qwen3's architecture plus a cross-layer plan.

    Args:
        vocab_size, hidden_size, intermediate_size, num_layers: as usual; intermediate_size is SwiGLU's.
        num_attention_heads, num_kv_heads: equal for MHA, a divisor for GQA, 1 for MQA.
        head_dim: even; CUDA generation takes 64 and 128.
        max_position_embeddings: longest sequence, in tokens.
        rope_theta, rope_scaling: scaling is None or a dict with `rope_type` "linear", "llama3" or "yarn" and
            the options that Hugging Face configs give that type.
        rope_interleaved: rotate the pairs (2j, 2j+1) instead of (j, j + D/2).
        rms_norm_eps: of every RMSNorm.
        tie_word_embeddings: use the embedding matrix as the output projection too.
        qk_norm: RMSNorm over each head of q and k, as in Qwen3.
        sliding_window: tokens that a storage layer's own attention sees, its own included; None for all.
            Reconstruction layers always see all.
        plan: a CrossLayerPlan, or the name of one for its default form.
        fusion_init: how fusion weights start: "lite" (K_n and V_1), "standard" (N(0, 1)), "equivalent" (the
            unrolled iterative form) or "uniform" (the mean of the sources).

    Raises:
        ValueError: a field out of range; the message names it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleaved: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    sliding_window: int | None = None
    plan: CrossLayerPlan | str = "fusedkv"
    fusion_init: str = "lite"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_attention_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            whole = _positive(value) and isinstance(value, int)
            self._expect(whole, name, "a positive integer", repr(value))
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            self._expect(_positive(value), name, "a positive number", repr(value))
        for name in ("rope_interleaved", "tie_word_embeddings", "qk_norm"):
            self._expect(isinstance(getattr(self, name), bool), name, "a bool", repr(getattr(self, name)))
        self._expect(self.head_dim % 2 == 0, "head_dim", "an even number", self.head_dim)
        divides = self.num_attention_heads % self.num_kv_heads == 0
        multiple = f"a multiple of num_kv_heads {self.num_kv_heads}"
        self._expect(divides, "num_attention_heads", multiple, self.num_attention_heads)
        window = self.sliding_window
        fits = window is None or (_positive(window) and isinstance(window, int))
        self._expect(fits, "sliding_window", "None or a positive integer", repr(window))
        self._check_rope_scaling()
        if isinstance(self.plan, str):
            object.__setattr__(self, "plan", CrossLayerPlan.named(self.plan, self.num_layers))
        planned = isinstance(self.plan, CrossLayerPlan)
        self._expect(planned, "plan", "a CrossLayerPlan or " + " or ".join(PLAN_NAMES), repr(self.plan))
        layers = len(self.plan.layers)
        self._expect(layers == self.num_layers, "plan", f"one of {self.num_layers} layers", layers)
        self._check_fusion_init()

    def _expect(self, condition: bool, field: str, expected: str, got: object) -> None:
        expect(condition, "FusedKVConfig", field, expected, got)

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        types = " or ".join(ROPE_SCALING_OPTIONS)
        given = isinstance(self.rope_scaling, dict)
        self._expect(given, "rope_scaling", "None or a dict", repr(self.rope_scaling))
        kind = self.rope_scaling.get("rope_type")
        known = isinstance(kind, str) and kind in ROPE_SCALING_OPTIONS
        self._expect(known, "rope_scaling", f"rope_type {types}", repr(kind))
        required, optional = ROPE_SCALING_OPTIONS[kind]
        options = self.rope_scaling.keys() - {"rope_type"}
        complete = required <= options <= required | optional
        wanted = f"the options {sorted(required)} (and maybe {sorted(optional)}) for {kind}"
        self._expect(complete, "rope_scaling", wanted, sorted(options))
        numbers = all(_positive(self.rope_scaling[name]) for name in options)
        self._expect(numbers, "rope_scaling", "positive numbers", self.rope_scaling)

    def _check_fusion_init(self) -> None:
        known = self.fusion_init in FUSION_INITS
        self._expect(known, "fusion_init", " or ".join(FUSION_INITS), repr(self.fusion_init))
        if self.fusion_init != "equivalent":
            return
        first_last = (0, self.plan.last_storage)
        for i, layer in enumerate(self.plan.layers):
            weighted = layer.key_weights != "none" or layer.value_weights != "none"
            fits = not weighted or layer.key_sources == layer.value_sources == first_last
            wanted = f"another start unless layers mix layers {first_last}, as fusedkv does"
            self._expect(fits, "fusion_init", wanted, f"equivalent with layer {i} mixing {layer.sources}")
        for side in ("key", "value"):
            kinds = {getattr(layer, f"{side}_weights") for layer in self.plan.layers} - {"none"}
            wanted = f"another start unless all {side} weights are of one kind"
            self._expect(len(kinds) <= 1, "fusion_init", wanted, f"equivalent with {sorted(kinds)}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> FusedKVConfig:
        """A shape by size: "332m", "650m", "1.5b" or "4b", 16 heads, vocabulary 128000, context 8192, tied.

        The shapes are our own, chosen so that the vanilla model meets the paper's parameter counts within 2%;
        the paper gives its layer counts and widths only in part. Plans that share keys and values have fewer
        parameters: their upper layers own no key and value projection. `overrides` replaces any field.
        """
        expect(name in PRESETS, "FusedKVConfig", "preset", " or ".join(PRESETS), repr(name))
        common = dict(vocab_size=128_000, num_attention_heads=16, num_kv_heads=16, tie_word_embeddings=True)
        return cls.from_dict({**common, **PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FusedKVConfig:
        """From the fields; an unknown or a missing one is a ValueError that names it."""
        known = {field.name for field in fields(cls)}
        needed = {"vocab_size", "hidden_size", "intermediate_size", "num_layers"}
        needed |= {"num_attention_heads", "num_kv_heads", "head_dim"}
        unknown, missing = sorted(values.keys() - known), sorted(needed - values.keys())
        expect(not unknown, "FusedKVConfig", "keys", f"only {sorted(known)}", f"unknown {unknown}")
        expect(not missing, "FusedKVConfig", "keys", f"at least {sorted(needed)}", f"none of {missing}")
        values = dict(values)
        if isinstance(values.get("plan"), Mapping):
            values["plan"] = CrossLayerPlan.from_dict(values["plan"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of from_dict, ready for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, path: str | Path) -> FusedKVConfig:
        """Read a config.json."""
        return cls.from_dict(read_json(path))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> FusedKVConfig:
        """From the config.json of a Qwen3 (or Llama) model in the Hugging Face format, as the vanilla plan.

        Raises:
            ValueError: another model type, biases, another activation, or sliding windows on a part of the
                layers.
        """
        kind = hf.get("model_type")
        expect(kind in ("qwen3", "llama"), "FusedKVConfig", "model_type", "qwen3 or llama", repr(kind))
        missing = [name for name in _HF_NEEDED if name not in hf]
        expect(not missing, "FusedKVConfig", "keys", f"at least {list(_HF_NEEDED)}", f"none of {missing}")
        for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
            got = hf.get(name, wanted)
            expect(got == wanted, "FusedKVConfig", name, repr(wanted), repr(got))
        # transformers 5 writes rope_parameters; earlier versions rope_theta beside rope_scaling.
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta", 10000.0)
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        part = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
        expect(part == 1.0, "FusedKVConfig", "partial_rotary_factor", "1.0, RoPE on every channel", part)
        windowed = [kind == "sliding_attention" for kind in hf.get("layer_types") or ()]
        window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
        uniform = window is None or (windowed and all(windowed))
        expect(uniform, "FusedKVConfig", "layer_types", "a sliding window on all layers or none", windowed)
        heads = hf["num_attention_heads"]
        values = dict(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_position_embeddings=hf["max_position_embeddings"],
            rope_theta=float(theta),
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            sliding_window=window,
            plan="vanilla",
        )
        return cls.from_dict({**values, **overrides})
