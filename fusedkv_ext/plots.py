"""`plot`: the paper's figures from run directories, each a PNG with its numbers in a CSV beside it.

A run directory is what `train` writes; of its files these are read here: config.yaml, metrics.csv (a row a
logged step), validation.csv, projections.csv and model/. The figures of fusion weights also take a model
directory as it is, where fusion.safetensors, the fusion weights alone, does for the whole model.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusedkv_ext.checks import expect
from fusedkv_ext.config import FusedKVConfig, write_whole
from fusedkv_ext.model import CONFIG_NAME, WEIGHTS_NAME
from fusedkv_ext.modules import FusionWeights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG, MODEL, FUSION = "config.yaml", "model", "fusion.safetensors"
METRICS, VALIDATION, PROJECTIONS = "metrics.csv", "validation.csv", "projections.csv"
LAYER_NORM = "grad_norm/layer_"  # the columns of metrics.csv with the gradient norm of one layer
# They can be told apart in the common kinds of colour blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
DASHES = ("-", "--", ":", "-.")  # for more runs than colours
Row = dict[str, Any]


def pyplot() -> Any:
    """matplotlib.pyplot without a window; a ValueError that says how to get it where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plot: expected matplotlib, which `pip install matplotlib` adds") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@dataclass(frozen=True)
class Run:
    """A run directory, read when a figure asks for a part of it."""

    path: Path
    label: str

    def file(self, name: str) -> Path:
        path = self.path / name
        expect(path.is_file(), "plot", "RUN", f"a run directory with {name}", self.path)
        return path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.yaml."""
        try:
            import yaml
        except ImportError as error:
            raise ValueError("plot: expected PyYAML, which `pip install pyyaml` adds") from error
        path = self.file(CONFIG)
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"plot: {path}: expected YAML, got {error}") from error
        expect(isinstance(values, Mapping), "plot", str(path), "a mapping", type(values).__name__)
        return values

    def table(self, name: str, columns: Sequence[str], texts: Sequence[str] = ()) -> list[Row]:
        """The rows of a CSV file: numbers, NaN for an empty field, but for the columns `texts`.

        Raises:
            ValueError: the file is not there, lacks one of `columns`, has no row, or a text for a number.
        """
        path = self.file(name)
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        expect(not missing, "plot", str(path), f"the columns {list(columns)}", f"none of {missing}")
        expect(len(rows) > 0, "plot", str(path), "at least one logged step", 0)
        try:
            return [{c: x if c in texts else _number(x) for c, x in row.items()} for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(f"plot: {path}: expected numbers, got {error}") from error

    @cached_property
    def fusion(self) -> tuple[FusedKVConfig, dict[str, Tensor]]:
        """The config and the fusion weights by name, of a run's last checkpoint or of a model directory.

        Raises:
            ValueError: the directory is neither, or the file of weights cannot be read.
        """
        path = self.path / MODEL if (self.path / MODEL / CONFIG_NAME).is_file() else self.path
        files = [path / name for name in (WEIGHTS_NAME, FUSION) if (path / name).is_file()]
        wanted = f"a run or model directory with {CONFIG_NAME} and {WEIGHTS_NAME}"
        expect((path / CONFIG_NAME).is_file() and len(files) > 0, "plot", "RUN", wanted, self.path)
        try:
            with safe_open(files[0], framework="pt") as file:
                names = [name for name in file.keys() if ".fusion." in name]  # noqa: SIM118
                return FusedKVConfig.load(path / CONFIG_NAME), {x: file.get_tensor(x) for x in names}
        except SafetensorError as error:
            raise ValueError(f"plot: {files[0]}: expected a safetensors file, got {error}") from error


def _number(field: str | None) -> int | float:
    return int(field) if field and field.isdecimal() else float(field or "nan")


def fusion_weights(run: Run) -> tuple[FusedKVConfig, list[tuple[int, str, int, Tensor]]]:
    """The config and (layer, side, source, weights [Hkv, D]) of every learned weight of a model.

    Raises:
        ValueError: a plan that learns none, or weights that are not those of the plan.
    """
    (config, tensors), found = run.fusion, []
    for i, plan in enumerate(config.plan.layers):
        if i in config.plan.storage_layers:
            continue
        sources = (plan.key_sources, plan.value_sources)
        module = FusionWeights(
            *map(len, sources),
            config.num_kv_heads,
            config.head_dim,
            plan.key_weights,
            plan.value_weights,
            config.rope_interleaved,
        )
        prefix = f"model.layers.{i}.attention.fusion."
        mine = {name: x for name, x in tensors.items() if name.startswith(prefix)}
        wanted = {prefix + name: list(x.shape) for name, x in module.state_dict().items()}
        got = {name: list(x.shape) for name, x in mine.items()}
        expect(got == wanted, "plot", f"{run.path}: fusion weights of layer {i}", f"{wanted}", got)
        module.load_state_dict({name.removeprefix(prefix): x for name, x in mine.items()})
        for side, numbers, weights in zip(("key", "value"), sources, module(), strict=True):
            if weights is not None:
                found += [(i, side, s, w.detach()) for s, w in zip(numbers, weights, strict=True)]
    wanted = "a plan with learned weights"
    expect(len(found) > 0, "plot", "RUN", wanted, f"{config.plan.name} in {run.path}")
    return config, found


def last(run: Run, name: str) -> dict[str, float]:
    """The last row of metrics.csv or validation.csv."""
    return run.table(name, ("step", "tokens", "loss"))[-1]


def check_comparable(runs: Sequence[Run], name: str) -> str:
    """What differs between runs in their data, their batch, and the last row of a file; "" for nothing.

    Seeds may differ: runs of several show the noise.
    """
    first, differences = runs[0], []
    for run in runs[1:]:
        for column in ("step", "tokens"):
            mine, theirs = (last(r, name)[column] for r in (run, first))
            if mine != theirs:
                differences.append(f"{run.label} ends at {column} {mine}, {first.label} at {theirs}")
        for key in ("data", "batch"):
            mine, theirs = (r.config.get(key) for r in (run, first))
            if mine != theirs:
                differences.append(f"{run.label} has the {key} {mine}, {first.label} {theirs}")
    return "; ".join(differences)


@dataclass(frozen=True)
class Plot:
    """What a figure shows, the rows of its CSV, and how to draw it. Layers count from 0, as in the code."""

    rows: list[Row]
    draw: Callable[[], Figure]


def dense_fusion(runs: Sequence[Run]) -> Plot:
    """Mean weight of every source in every layer, keys and values apart."""
    config, weights = fusion_weights(runs[0])
    rows = [
        {"layer": layer, "side": side, "source": source, "weight": w.mean().item()}
        for layer, side, source, w in weights
    ]

    def draw() -> Figure:
        sides = [side for side in ("key", "value") if any(row["side"] == side for row in rows)]
        largest = max(abs(row["weight"]) for row in rows) or 1.0
        figure, panels = pyplot().subplots(
            1, len(sides), figsize=(1 + 4.5 * len(sides), 4.5), squeeze=False, layout="constrained"
        )
        for axes, side in zip(panels[0], sides, strict=True):
            mine = [row for row in rows if row["side"] == side]
            layers, sources = (sorted({row[name] for row in mine}) for name in ("layer", "source"))
            grid = torch.full((len(layers), len(sources)), float("nan"))
            for row in mine:
                grid[layers.index(row["layer"]), sources.index(row["source"])] = row["weight"]
            image = axes.imshow(grid.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
            for (y, x), value in zip(
                ((y, x) for y in range(len(layers)) for x in range(len(sources))), grid.flatten(), strict=True
            ):
                dark = abs(value) > 0.6 * largest
                text = "" if value.isnan() else f"{value:.2f}"
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
            axes.set_xticks(range(len(sources)), sources)
            axes.set_yticks(range(len(layers)), layers)
            axes.set(title=f"{side}s", xlabel="source layer", ylabel="layer")
        figure.colorbar(image, ax=panels, label="weight")
        scalar = all("channel" not in (plan.key_weights, plan.value_weights) for plan in config.plan.layers)
        mean = "" if scalar else ", mean over heads and channels"
        figure.suptitle(f"Fusion weights of {runs[0].label} ({config.plan.name}){mean}", fontsize="medium")
        return figure

    return Plot(rows, draw)


def fusion(runs: Sequence[Run]) -> Plot:
    """Every weight, by layer, head and channel."""
    config, weights = fusion_weights(runs[0])
    rows = [
        {"layer": layer, "side": side, "source": source, "head": h, "channel": d, "weight": x}
        for layer, side, source, w in weights
        for h, head in enumerate(w.tolist())
        for d, x in enumerate(head)
    ]

    def draw() -> Figure:
        # Some channels have weights far above the others': a percentile keeps the rest visible.
        every = torch.cat([w.flatten() for *_, w in weights]).abs().float()
        largest = float(every.sort().values[int(0.995 * (len(every) - 1))]) or 1.0
        panels = sorted({(side, source) for _, side, source, _ in weights})
        columns = max(sum(side == name for name, _ in panels) for side in ("key", "value"))
        sides = sorted({side for side, _ in panels})
        figure, grid = pyplot().subplots(
            len(sides),
            columns,
            figsize=(1 + 5 * columns, 3 * len(sides)),
            squeeze=False,
            layout="constrained",
        )
        for axes in grid.flat:
            axes.set_visible(False)
        for y, side in enumerate(sides):
            for x, source in enumerate(source for name, source in panels if name == side):
                axes = grid[y][x]
                axes.set_visible(True)
                mine = [(layer, w) for layer, name, s, w in weights if (name, s) == (side, source)]
                pixels = torch.stack([w.flatten() for _, w in mine]).float()
                image = axes.imshow(pixels.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
                middle = [(h + 0.5) * config.head_dim - 0.5 for h in range(config.num_kv_heads)]
                for h in range(1, config.num_kv_heads):
                    axes.axvline(h * config.head_dim - 0.5, color="black", linewidth=0.6)
                axes.set_xticks(middle, range(config.num_kv_heads), fontsize=7)
                axes.set_yticks(range(len(mine)), [layer for layer, _ in mine], fontsize=7)
                axes.set(title=f"{side}s, source {source}", xlabel="head (channels within)", ylabel="layer")
        figure.colorbar(image, ax=grid, label="weight", extend="both")
        figure.suptitle(f"Fusion weights of {runs[0].label} ({config.plan.name})", fontsize="medium")
        return figure

    return Plot(rows, draw)


def loss(runs: Sequence[Run]) -> Plot:
    """Training and validation loss of each run by tokens."""
    rows = [
        {"run": run.label, "split": split, **{c: row[c] for c in ("step", "tokens", "loss")}}
        for run in runs
        for split, name in (("train", METRICS), ("validation", VALIDATION))
        for row in run.table(name, ("step", "tokens", "loss"))
    ]

    def draw() -> Figure:
        figure, panels = pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained")
        for axes, split in zip(panels, ("train", "validation"), strict=True):
            late = []
            for i, run in enumerate(runs):
                mine = [row for row in rows if (row["run"], row["split"]) == (run.label, split)]
                x, y = [row["tokens"] / 1e6 for row in mine], [row["loss"] for row in mine]
                look = _look(i)
                if split == "validation" or len(mine) == 1:
                    look.update(marker="o", markersize=3)
                axes.plot(x, y, label=run.label, linewidth=1.2, **look)
                late += [b for a, b in zip(x, y, strict=True) if a >= 0.05 * x[-1]]
            # The first steps fall from ln(vocabulary): the figure begins where the curves have come apart.
            low, high = min(late), max(late)
            margin = 0.05 * (high - low) or 0.1
            axes.set_ylim(low - margin, high + margin)
            axes.set(title=f"{split} loss", xlabel="million tokens", ylabel="nats a token")
            axes.grid(True, alpha=0.25)
        panels[0].legend(fontsize="small")
        return figure

    return Plot(rows, draw)


def gradients(runs: Sequence[Run]) -> Plot:
    """Gradient norm by layer, of all parameters and of W_Q, W_K, W_V: median, middle half of the steps."""
    rows: list[Row] = []
    for run in runs:
        table = run.table(METRICS, ("step",))
        layers = sorted(int(c.removeprefix(LAYER_NORM)) for c in table[0] if c.startswith(LAYER_NORM))
        expect(len(layers) > 0, "plot", str(run.path / METRICS), f"columns {LAYER_NORM}<i>", "none of them")
        for row in table:
            for i in layers:
                rows.append(_norm(run, row["step"], i, "all", row[f"{LAYER_NORM}{i}"]))
        if (run.path / PROJECTIONS).is_file():
            for row in run.table(PROJECTIONS, ("step", "layer", "weight", "grad_norm"), texts=("weight",)):
                rows.append(_norm(run, row["step"], row["layer"], row["weight"], row["grad_norm"]))
    weights = list(dict.fromkeys(row["weight"] for row in rows))

    def draw() -> Figure:
        figure, panels = pyplot().subplots(
            1,
            len(weights),
            figsize=(1 + 4 * len(weights), 4.5),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for axes, weight in zip(panels[0], weights, strict=True):
            for i, run in enumerate(runs):
                norms: dict[int, list[float]] = {}
                for row in rows:
                    if (row["run"], row["weight"]) == (run.label, weight):
                        norms.setdefault(row["layer"], []).append(row["grad_norm"])
                if not norms:
                    continue
                quartiles = np.array([np.nanquantile(x, (0.25, 0.5, 0.75)) for x in norms.values()]).T
                axes.plot(list(norms), quartiles[1], marker="o", markersize=3, label=run.label, **_look(i))
                axes.fill_between(
                    list(norms), quartiles[0], quartiles[2], color=_look(i)["color"], alpha=0.12, linewidth=0
                )
            axes.set(title=weight if weight == "all" else f"W_{weight.upper()}", xlabel="layer", yscale="log")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(True, which="both", alpha=0.25)
        panels[0][0].set_ylabel("gradient norm, median and middle half")
        panels[0][0].legend(fontsize="small")
        return figure

    return Plot(rows, draw)


def _norm(run: Run, step: int, layer: int, weight: str, norm: float) -> Row:
    return {"run": run.label, "step": step, "layer": layer, "weight": weight, "grad_norm": norm}


def ablation(runs: Sequence[Run]) -> Plot:
    """Last validation loss of each run, the lowest first."""
    ends = [(run, last(run, VALIDATION)) for run in runs]
    ends.sort(key=lambda end: end[1]["loss"])
    rows = [
        {"run": run.label, **{c: row[c] for c in ("step", "tokens", "loss")},
         "above_best": row["loss"] - ends[0][1]["loss"]}
        for run, row in ends
    ]  # fmt: skip

    def draw() -> Figure:
        figure, axes = pyplot().subplots(figsize=(8, 1 + 0.45 * len(rows)), layout="constrained")
        losses = [row["loss"] for row in rows]
        spread = max(losses) - min(losses) or 0.01
        left = min(losses) - 0.25 * spread
        bars = axes.barh([row["run"] for row in rows], [x - left for x in losses], left=left, color=COLORS[0])
        axes.bar_label(bars, [f"{x:.4f}" for x in losses], padding=3, fontsize=8)
        axes.set_xlim(left, max(losses) + 0.15 * spread)
        axes.invert_yaxis()
        axes.set_xlabel("last validation loss, nats a token (the axis does not begin at 0)")
        return figure

    return Plot(rows, draw)


KINDS: dict[str, Callable[[Sequence[Run]], Plot]] = {
    "dense-fusion": dense_fusion,
    "loss": loss,
    "gradients": gradients,
    "ablation": ablation,
    "fusion": fusion,
}
OF_ONE_RUN = ("dense-fusion", "fusion")
COMPARED_BY = {"loss": METRICS, "gradients": METRICS, "ablation": VALIDATION}


def plot(
    kind: str, runs: Iterable[str | Path], out: str | Path, allow_different: bool = False
) -> tuple[Path, Path]:
    """Draw one figure.

    Args:
        kind: one of KINDS.
        runs: run directories; one run or model directory for the kinds that show fusion weights.
        out: a directory, made where it is not there, for <kind>.png and <kind>.csv; of earlier ones they take
            the place.
        allow_different: compare runs of different data or length all the same, and say so in the figure.

    Returns:
        The paths of the PNG and the CSV.

    Raises:
        ValueError: another kind, a directory that is no run, another number of runs, a plan without learned
            weights, or runs that cannot be compared. Nothing is written then.
    """
    expect(kind in KINDS, "plot", "KIND", " or ".join(KINDS), repr(kind))
    paths = [Path(run) for run in runs]
    expect(len(paths) > 0, "plot", "RUN", "at least one directory", 0)
    expect(len(set(paths)) == len(paths), "plot", "RUN", "different directories", [str(p) for p in paths])
    for path in paths:
        expect(path.is_dir(), "plot", "RUN", "a run directory", path)
    one = kind not in OF_ONE_RUN or len(paths) == 1
    expect(one, "plot", "RUN", f"one directory for {kind}", f"{len(paths)} of them")
    names = [path.resolve().name for path in paths]
    opened = [Run(p, n if names.count(n) == 1 else str(p)) for p, n in zip(paths, names, strict=True)]
    different = check_comparable(opened, COMPARED_BY[kind]) if kind in COMPARED_BY else ""
    wanted = "runs of the same data, steps and tokens (--allow-different compares others too)"
    expect(allow_different or not different, "plot", "RUN", wanted, different)

    made = KINDS[kind](opened)
    figure = made.draw()
    if different:
        figure.text(
            0.01, -0.02, f"Different runs: {different}", fontsize=7, color="#b00000", va="top", wrap=True
        )
    image, text = io.BytesIO(), io.StringIO(newline="")
    figure.savefig(image, dpi=120, format="png", bbox_inches="tight")
    pyplot().close(figure)
    writer = csv.DictWriter(text, list(made.rows[0]))
    writer.writeheader()
    writer.writerows(made.rows)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    png, table = out / f"{kind}.png", out / f"{kind}.csv"
    write_whole(table, text.getvalue().encode())
    write_whole(png, image.getvalue())
    return png, table


def _look(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m fusedkv_ext plot`."""
    add = parser.add_argument
    add("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    add("runs", metavar="RUN", nargs="+", help="run directories; a model directory does for fusion weights")
    add("--out", metavar="DIR", required=True, help="for KIND.png and KIND.csv")
    add(
        "--allow-different", action="store_true", help="compare runs of different data or length, with a note"
    )


def run(args: argparse.Namespace) -> None:
    """`python -m fusedkv_ext plot`."""
    png, table = plot(args.kind, args.runs, args.out, args.allow_different)
    if args.kind == "ablation":
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        width = max(len(row["run"]) for row in rows)
        for row in rows:
            loss, more = float(row["loss"]), float(row["above_best"])
            print(f"{row['run'].ljust(width)}  {loss:.4f}  +{more:.4f}")
    print(png)
    print(table)
