"""Plots of GB/s and microseconds against bytes from the JSON of compare_attention.py.

    python bench/plot.py attention.json --output-dir bench/results

One picture a head shape, one curve a contender. Where two shapes read the same number of bytes, the curve
shows the faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

# Ours solid, peers dashed; the colours can be told apart in the common kinds of colour blindness.
STYLES = {
    "fusedkv, 1 bf16 source": ("#0072b2", "o-"),
    "fusedkv, 2 bf16 sources": ("#d55e00", "s-"),
    "fusedkv, 1 e4m3 source": ("#56b4e9", "^-"),
    "fusedkv, 2 e4m3 sources": ("#e69f00", "v-"),
    "SDPA cuDNN": ("#009e73", "D--"),
    "SDPA flash": ("#cc79a7", "x--"),
    "FlashInfer": ("#000000", "+--"),
}


def curves(rows: Sequence[dict], heads: str) -> dict[str, list[tuple[int, float]]]:
    """(bytes, microseconds) of each contender that ran, by rising bytes; of equal bytes the fastest."""
    fastest: dict[str, dict[int, float]] = {name: {} for name in STYLES}
    for row in rows:
        if row["heads"] == heads and row["us"] is not None:
            points = fastest[row["contender"]]
            points[row["bytes"]] = min(row["us"], points.get(row["bytes"], row["us"]))
    return {name: sorted(points.items()) for name, points in fastest.items() if points}


def plot(results: dict, heads: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bandwidth, time) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for name, points in curves(results["attention"], heads).items():
        color, style = STYLES[name]
        megabytes, us = [n / 1e6 for n, _ in points], [t for _, t in points]
        look = {"color": color, "label": name, "markersize": 5, "linewidth": 1.4}
        bandwidth.plot(megabytes, [n / t / 1e3 for n, t in points], style, **look)
        time.plot(megabytes, us, style, **look)
    if results["read_ceiling_gb_s"]:
        bandwidth.axhline(results["read_ceiling_gb_s"], color="gray", linewidth=1, label="read ceiling")
    for axes, label in ((bandwidth, "GB/s"), (time, "µs")):
        axes.set_xscale("log")
        axes.set_xlabel("MB of keys and values")
        axes.set_ylabel(label)
        axes.grid(True, which="both", alpha=0.25)
    bandwidth.set_ylim(bottom=0)
    time.set_yscale("log")
    bandwidth.legend(fontsize="small", loc="lower right")
    figure.suptitle(f"Decode attention, Hq/Hkv/D {heads}\n{results['environment']}", fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what compare_attention.py --json wrote")
    parser.add_argument("--output-dir", type=Path, default=Path("."))
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    args = parser.parse_args(arguments)
    results = json.loads(args.results.read_text())
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for heads in dict.fromkeys(row["heads"] for row in results["attention"]):
        path = args.output_dir / f"attention_{heads.replace('/', '_')}.{args.format}"
        plot(results, heads, path)
        print(path)


if __name__ == "__main__":
    main()
