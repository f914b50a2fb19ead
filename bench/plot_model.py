"""Plots of whole models from the JSON of bench_model.py.

    python bench/plot_model.py model.json --output-dir bench/results

One picture a model: TTFT, TPOT and peak memory of one sequence against its length, and the ratios to vanilla
as bars. What was not measured is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

# Vanilla and its kin in gray and black, ours in colours that the common kinds of colour blindness can tell
# apart; dashed with sources in fp8.
STYLES = {
    "vanilla": ("#000000", "o-"),
    "gqa": ("#7f7f7f", "s-"),
    "cla2": ("#009e73", "^-"),
    "yoco": ("#cc79a7", "v-"),
    "lite": ("#0072b2", "D-"),
    "fusedkv": ("#d55e00", "P-"),
    "fusedkv fp8 copy": ("#e69f00", "X--"),
    "fusedkv fp8 only": ("#d55e00", "P--"),
    "lite fp8 only": ("#56b4e9", "D--"),
    "transformers": ("#7f7f7f", "x:"),
}
PANELS = (
    ("ttft", "ms", "TTFT, ms, 1 sequence"),
    ("tpot", "ms", "TPOT, ms, 1 sequence"),
    ("tpot", "peak_bytes", "peak memory of decoding, GB, 1 sequence"),
)


def curves(rows: Sequence[dict], section: str, field: str) -> dict[str, list[tuple[int, float]]]:
    """(tokens, value) of each plan, for one sequence, by rising tokens."""
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in STYLES}
    for row in rows:
        if row["section"] == section and row["batch"] == 1 and row[field] is not None:
            points[row["plan"]].append((row["tokens"], row[field]))
    return {name: sorted(of_plan) for name, of_plan in points.items() if of_plan}


def ratios(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """For each measured shape the time of each plan over vanilla's."""
    vanilla = {_shape(row): row["ms"] for row in rows if row["plan"] == "vanilla"}
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        base = vanilla.get(_shape(row))
        if row["section"] != "throughput" and row["plan"] != "vanilla" and row["ms"] and base:
            found.setdefault(_shape(row), {})[row["plan"]] = row["ms"] / base
    return found


def _shape(row: dict) -> str:
    tokens = row["tokens"]
    length = f"{tokens // 1024}k" if tokens % 1024 == 0 else tokens
    return f"{row['section'].upper()} {row['batch']} x {length}"


def plot(rows: Sequence[dict], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(14, 10), layout="constrained")
    for panel, (section, field, label) in zip(axes.flat, PANELS, strict=False):
        for name, points in curves(rows, section, field).items():
            color, style = STYLES[name]
            values = [y / 1e9 if field == "peak_bytes" else y for _, y in points]
            tokens = [x for x, _ in points]
            panel.plot(tokens, values, style, color=color, label=name, markersize=5, linewidth=1.4)
            panel.legend(fontsize="small")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of context")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.25)
    bars, groups = axes[1, 1], ratios(rows)
    plans = [name for name in STYLES if any(name in group for group in groups.values())]
    for i, name in enumerate(plans):
        color, style = STYLES[name]
        offset = (i - (len(plans) - 1) / 2) * 0.8 / len(plans)
        values = [group.get(name, float("nan")) for group in groups.values()]
        hatch = {"--": "//", "x:": ".."}.get(style[-2:])
        places = [x + offset for x in range(len(groups))]
        bars.bar(places, values, 0.8 / len(plans), color=color, hatch=hatch, label=name)
    bars.axhline(1.0, color="black", linewidth=1)
    bars.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
    bars.set_ylabel("time over vanilla's")
    if plans:
        bars.legend(fontsize="x-small", ncols=2)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what bench_model.py --json wrote")
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    args = parser.parse_args(arguments)
    results = json.loads(args.results.read_text())
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for preset, heads in dict.fromkeys((row["preset"], row["heads"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["preset"], row["heads"]) == (preset, heads)]
        path = args.output_dir / f"model_{preset}_{heads.replace('/', '_')}.{args.format}"
        plot(rows, f"{preset}, {heads} heads\n{results['environment']}", path)
        print(path)


if __name__ == "__main__":
    main()
