"""The YAML file of `train`: its keys, their defaults and checks, and the model's configuration in it."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from fusedkv_ext.checkpoint import check_config
from fusedkv_ext.checks import expect
from fusedkv_ext.config import FusedKVConfig
from fusedkv_ext.model import CONFIG_NAME
from fusedkv_ext.plan import PLAN_NAMES, CrossLayerPlan

CONFIG_FILE = "config.yaml"
PRECISIONS = ("bf16", "float32")
MAX_WARM_UP = 2000  # steps, when the config does not say


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens are: files that `prepare` wrote, and the tokens of a sequence."""

    train: str
    context: int
    validation: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a cosine from lr to min_lr at the last step.

    warm_up_steps is a twentieth of the steps by default, at most 2000. grad_clip bounds the norm of the
    gradient; None does not. Only matrices decay. fusion_lr_scale multiplies the learning rate of the fusion
    weights.
    """

    lr: float = 3e-4
    min_lr: float = 3e-5
    warm_up_steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    fusion_lr_scale: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """A run, as its YAML file has it; docs/training.md says what each key does.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    run_dir: str
    model: dict
    data: DataConfig
    steps: int
    batch: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch: int | None = None
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    compile: bool | None = None
    activation_checkpointing: bool = False
    recompute_fusion: bool = False
    deterministic: bool = False
    log_every: int = 10
    validate_every: int = 500
    validation_windows: int | None = 256
    checkpoint_every: int = 1000
    keep_checkpoints: int | None = 2
    tensorboard: bool = True
    peak_tflops: float | None = None
    stop_at: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        optimizer = self.optimizer
        positive = {
            "data.context": self.data.context,
            "optimizer.lr": optimizer.lr,
            "optimizer.eps": optimizer.eps,
        }
        for name in ("steps", "batch", "log_every", "validate_every", "checkpoint_every"):
            positive[name] = getattr(self, name)
        for name in ("micro_batch", "validation_windows", "keep_checkpoints", "peak_tflops", "stop_at"):
            if getattr(self, name) is not None:
                positive[name] = getattr(self, name)
        if optimizer.grad_clip is not None:
            positive["optimizer.grad_clip"] = optimizer.grad_clip
        for name, value in positive.items():
            expect(0 < value < math.inf, "train", name, "a positive number", value)
        for name in ("min_lr", "weight_decay", "fusion_lr_scale"):
            value = getattr(optimizer, name)
            expect(0 <= value < math.inf, "train", f"optimizer.{name}", "0 or more", value)
        for name in ("beta1", "beta2"):
            value = getattr(optimizer, name)
            expect(0 <= value < 1, "train", f"optimizer.{name}", "0 to below 1", value)
        warm_up = optimizer.warm_up_steps
        fits = warm_up is None or 0 <= warm_up <= self.steps
        expect(fits, "train", "optimizer.warm_up_steps", f"0 to steps, {self.steps}", warm_up)
        known = self.precision in (None, *PRECISIONS)
        expect(known, "train", "precision", " or ".join(PRECISIONS), repr(self.precision))
        expect(0 <= self.seed < 2**63, "train", "seed", "0 to 2^63 - 1", self.seed)


def _value(value: Any, kind: Any, name: str) -> Any:
    """A value of a YAML file as a field's type; ValueError where it is none."""
    if is_dataclass(kind):
        return _section(value, kind, f"{name}.")
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4, without a point, as text
        except ValueError:
            pass
    wanted = {
        str: "text",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        dict: "keys and values",
    }
    fits = type(value) is kind
    expect(fits, "train", name, wanted[kind] + (" or null" if len(kinds) > 1 else ""), repr(value))
    return value


def _section(values: Any, kind: type, prefix: str = "") -> Any:
    expect(isinstance(values, dict), "train", prefix.rstrip(".") or "config", "keys and values", repr(values))
    known = {x.name for x in fields(kind)}
    needed = {x.name for x in fields(kind) if x.default is MISSING and x.default_factory is MISSING}
    unknown = sorted(f"{prefix}{key}" for key in values if key not in known)
    missing = sorted(f"{prefix}{key}" for key in needed - values.keys())
    what = [prefix + name for name in sorted(known)]
    expect(not unknown, "train", "keys", f"only {what}", f"unknown {unknown}")
    expect(
        not missing, "train", "keys", f"at least {[prefix + x for x in sorted(needed)]}", f"none of {missing}"
    )
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(value, hints[key], prefix + key) for key, value in values.items()})


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("train: expected the package PyYAML, which `pip install pyyaml` adds") from error
    return yaml


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A YAML file and "key=value" texts over it, where a key of a section is "section.key".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown or a missing key, or a value of another type or out of range.
    """
    yaml = _yaml()
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"train: {path}: expected YAML, got {error}") from error
    expect(isinstance(values, dict), "train", str(path), "keys and values", type(values).__name__)
    for override in overrides:
        key, equals, text = override.partition("=")
        expect(bool(equals and key), "train", "arguments", "key=value", repr(override))
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"train: {key}: expected a YAML value, got {text!r}") from error
        *path_to, last = key.split(".")
        section = values
        for name in path_to:
            section = section.setdefault(name, {})
            expect(isinstance(section, dict), "train", key, f"{name} to be a section", repr(section))
        section[last] = value
    return _section(values, TrainConfig)


def model_config(section: Mapping[str, Any], vocab_size: int) -> FusedKVConfig:
    """The model of a config.

    Args:
        section: fields of FusedKVConfig, where plan may also be a text as CrossLayerPlan.parse takes it; with
            `preset` the others may be left out. Or `from`, a model directory to go on from.
        vocab_size: of the tokens, for a model that gives none.

    Raises:
        ValueError: an unknown, missing or bad field, or one that differs from the model to go on from.
    """
    values = dict(section)
    preset, start = values.pop("preset", None), values.pop("from", None)
    if start is not None:
        expect(preset is None, "train", "model", "preset or from", "both")
        path = Path(str(start)) / CONFIG_NAME
        expect(path.is_file(), "train", "model.from", f"a model directory with {CONFIG_NAME}", start)
        config = FusedKVConfig.load(path)
        given = FusedKVConfig.from_dict({**config.to_dict(), **_parsed(values, config.num_layers)})
        check_config(config, given, f"model.from: {start}")
        return config
    if preset is not None:
        layers = FusedKVConfig.preset(preset, plan="vanilla").num_layers
        return FusedKVConfig.preset(preset, **_parsed(values, values.get("num_layers", layers)))
    return FusedKVConfig.from_dict({"vocab_size": vocab_size, **_parsed(values, values.get("num_layers"))})


def _parsed(values: Mapping[str, Any], num_layers: Any) -> dict[str, Any]:
    values = dict(values)
    if isinstance(values.get("plan"), str) and isinstance(num_layers, int):
        values["plan"] = CrossLayerPlan.parse(values["plan"], num_layers)
    return values


def resolved(config: TrainConfig, model: FusedKVConfig) -> str:
    """The YAML text of a run: every key with its value, so that it can be run again or gone on with."""
    values = asdict(config)
    for name in ("resume", "stop_at"):
        del values[name]
    start = {"from": config.model["from"]} if "from" in config.model else {}
    model_values = json.loads(json.dumps(model.to_dict()))  # without the tuples, which YAML lacks
    name = model.plan.name
    if name in PLAN_NAMES and model.plan == CrossLayerPlan.named(name, model.num_layers):
        model_values["plan"] = name  # which says more to a reader than the list of its layers
    values["model"] = {**start, **model_values}
    return _yaml().safe_dump(values, sort_keys=False)
