"""What a run writes down: CSV tables, TensorBoard, norms of gradients, statistics of fusion weights, MFU."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedkv_ext.checks import expect
from fusedkv_ext.config import FusedKVConfig, write_whole
from fusedkv_ext.model import FusedKVForCausalLM
from fusedkv_ext.modules import ReconstructionAttention, StorageAttention

METRICS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "peak_memory_gb")
VALIDATION = ("step", "tokens", "loss")
FUSION = ("step", "layer", "side", "source", "mean", "std", "min", "max")
PROJECTIONS = ("step", "layer", "weight", "grad_norm")
# Dense bfloat16 TFLOP/s of the vendor's data sheets, by a part of the device's name; the first match counts.
PEAK_TFLOPS = {
    "H200 NVL": 835.5,
    "H200": 989.5,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "A100": 312.0,
}


class Table:
    """A CSV file that grows row by row and is read by others meanwhile.

    Args:
        path: the file; an earlier one is gone on with.
        columns: of the header.
        last_step: drop the rows of later steps, which a run that goes on from there writes again.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int = -1):
        self.path, self.columns = path, list(columns)
        rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                same = reader.fieldnames == self.columns
                expect(same, "train", str(path), f"the columns {self.columns}", reader.fieldnames)
                # A process that was killed may have left half a row, which has no number for a step.
                rows = [row for row in reader if row["step"].isdigit() and int(row["step"]) <= last_step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue().encode())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; None becomes an empty field."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerows(rows)


class Records:
    """The tables and the TensorBoard files of a run.

    Args:
        directory: of the run.
        num_layers: of the model.
        tensorboard: write its files too.
        step: that the run goes on from; 0 for a new one.

    Raises:
        ValueError: the package tensorboard is missing, or a table of the directory has other columns.
    """

    def __init__(self, directory: Path, num_layers: int, tensorboard: bool, step: int):
        norms = [f"grad_norm/layer_{i}" for i in range(num_layers)]
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                wanted = "expected the package tensorboard, which `pip install tensorboard` adds, or false"
                raise ValueError(f"train: tensorboard: {wanted}") from error
            self.writer = SummaryWriter(directory / "tensorboard", purge_step=step + 1 if step else None)
        self.metrics = Table(directory / "metrics.csv", [*METRICS, *norms], step)
        self.validation = Table(directory / "validation.csv", VALIDATION, step)
        self.fusion = Table(directory / "fusion.csv", FUSION, step)
        self.projections = Table(directory / "projections.csv", PROJECTIONS, step)

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        if self.writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def add_metrics(self, row: Mapping[str, float | None], projections: Sequence[Mapping[str, Any]]) -> None:
        """A logged step: the columns of METRICS and the norms by layer, and by projection."""
        step = int(row["step"])
        self.metrics.append([row])
        self.projections.append([{"step": step, **x} for x in projections])
        named = {name if "/" in name else f"train/{name}": x for name, x in row.items() if name != "step"}
        named |= {f"projections/layer_{x['layer']}_{x['weight']}": x["grad_norm"] for x in projections}
        self._scalars(step, named)

    def add_validation(self, step: int, tokens: int, loss: float) -> None:
        """A row of validation.csv."""
        self.validation.append([{"step": step, "tokens": tokens, "loss": loss}])
        self._scalars(step, {"validation/loss": loss})

    def add_fusion(self, step: int, fusion: Sequence[Mapping[str, Any]]) -> None:
        """What fusion_statistics gave at a step."""
        self.fusion.append([{"step": step, **x} for x in fusion])
        for x in fusion:
            name = f"fusion/layer_{x['layer']}_{x['side']}_from_{x['source']}"
            self._scalars(step, {f"{name}/{part}": x[part] for part in FUSION[4:]})

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def full(x: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of several tensors as one, a scalar."""
    return full(nn.utils.get_total_norm(tensors))


def gradients(module: nn.Module) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    return [p.grad for p in module.parameters() if p.grad is not None]


def layer_norms(model: FusedKVForCausalLM) -> dict[str, float]:
    """The norm of the gradients of each layer, by its column of metrics.csv."""
    norms = torch.stack([norm(gradients(layer)) for layer in model.model.layers]).tolist()
    return {f"grad_norm/layer_{i}": x for i, x in enumerate(norms)}


def projection_norms(model: FusedKVForCausalLM) -> list[dict[str, Any]]:
    """The norms of the gradients of W_Q, W_K and W_V in each layer that has them."""
    names, norms = [], []
    for i, layer in enumerate(model.model.layers):
        attention = layer.attention
        if isinstance(attention, StorageAttention):
            heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
            parts = full(attention.qkv_proj.weight.grad).split([n * attention.head_dim for n in heads])
        else:
            parts = (full(attention.q_proj.weight.grad),)
        names += [(i, weight) for weight, _ in zip("qkv", parts, strict=False)]
        norms += [part.norm() for part in parts]
    values = torch.stack(norms).tolist()
    return [{"layer": i, "weight": w, "grad_norm": x} for (i, w), x in zip(names, values, strict=True)]


@torch.no_grad()
def fusion_statistics(model: FusedKVForCausalLM) -> list[dict[str, Any]]:
    """Mean, standard deviation, least and greatest of the learned weights of each layer, side and source.

    Of a tied pair of key weights, which is one parameter, one counts.
    """

    def weights() -> Iterator[tuple[int, str, int, Tensor]]:
        for i, layer in enumerate(model.model.layers):
            attention = layer.attention
            if isinstance(attention, ReconstructionAttention):
                for side in ("key", "value"):
                    parameter = getattr(attention.fusion, side)
                    if parameter is not None:
                        sources = getattr(attention.plan, f"{side}_sources")
                        yield from ((i, side, s, w) for s, w in zip(sources, full(parameter), strict=True))

    rows = []
    for i, side, source, w in weights():
        values = torch.stack((w.mean(), w.std(correction=0), w.min(), w.max())).tolist()
        row = {"layer": i, "side": side, "source": source}
        rows.append({**row, **dict(zip(FUSION[4:], values, strict=True))})
    return rows


def flops_per_token(config: FusedKVConfig, context: int) -> float:
    """Floating-point operations of a training step by token, as MFU counts them: forward plus twice that.

        forward = 2 (weights of all matrices, the output projection included) + 4 Hq D visible  a layer

    where visible is the mean number of tokens that a query attends to. What is computed again for activation
    checkpointing, norms, RoPE and the fusion of sources (a few numbers a channel) do not count.
    """
    with torch.device("meta"):
        model = FusedKVForCausalLM(config)
    matrices = sum(x.weight.numel() for x in model.modules() if isinstance(x, nn.Linear))
    if model.lm_head is None:
        matrices += model.model.embed_tokens.weight.numel()
    scores = 0
    for layer in range(config.num_layers):
        window = config.sliding_window if layer in config.plan.storage_layers else None
        window = min(window or context, context)
        visible = window * (window + 1) // 2 + (context - window) * window
        scores += 4 * config.num_attention_heads * config.head_dim * visible
    return 3 * (2 * matrices + scores / context)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU whose data sheet is known here, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)
