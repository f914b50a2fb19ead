"""What the comparison scripts share: cold-L2 sets, timing of CUDA graphs, the environment, tables, JSON.

The counterpart of bench_common.h for contenders that are called from Python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

MAX_SETS = 1024  # launches that small are bound by latency, not by memory
MIN_LAUNCHES = 16  # in one graph, so that the events around it weigh nothing
WARM_UP = 3  # replays


def parse_arguments(
    parser: argparse.ArgumentParser, ceiling: str, program: str, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Add the options of every comparison and parse; exits where there is no GPU.

    ceiling: "read" or "copy", what bench program `program` prints of it and the tables compare with.
    """
    parser.add_argument("--page-size", type=int, default=64, help="tokens a page of this package's caches")
    parser.add_argument("--repeats", type=int, default=20, help="timed graph replays a measurement")
    parser.add_argument(f"--{ceiling}-ceiling", type=float, metavar="GB/S", help=f"of build/{program}")
    parser.add_argument("--json", metavar="FILE", help="write every measurement to FILE")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    return args


class Timing(NamedTuple):
    """Microseconds of one launch over the replays of a graph: 10th percentile, median, 90th percentile."""

    p10: float
    median: float
    p90: float


def cold_sets(bytes_per_launch: int, l2_bytes: int | None = None) -> int:
    """How many sets of buffers to rotate over so that each launch finds the L2 cold: four times the L2 and
    two launches more, at most MAX_SETS. l2_bytes defaults to that of the current GPU."""
    if l2_bytes is None:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    return min(4 * l2_bytes // max(bytes_per_launch, 1) + 2, MAX_SETS)


def quantiles(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(*(ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.5, 0.9)))


def time_in_turns(contenders: Sequence[Sequence[Callable[[], object]]], repeats: int = 20) -> list[Timing]:
    """Time of one launch of each contender: a CUDA graph holds all of its launches, one after the other.

    The graphs are replayed in turn, so that all contenders find the card at the same clock and temperature.
    Each launch must use its own buffers (`cold_sets` says how many) and must be capturable. What it returns
    lives as long as the graph, so that outputs do not share memory.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in contenders], []
    with torch.cuda.stream(side):  # also leaves the stream when a launch refuses to be captured
        for graph, launches in zip(graphs, contenders, strict=True):
            for launch in launches:  # compiles, loads and plans what a capture must not
                launch()
            side.synchronize()
            rounds = math.ceil(MIN_LAUNCHES / len(launches))
            with torch.cuda.graph(graph, stream=side):
                outputs.append([launch() for _ in range(rounds) for launch in launches])

    events = [torch.cuda.Event(enable_timing=True) for _ in range((WARM_UP + repeats) * len(graphs) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for turn, event in enumerate(events[1:]):  # without a pause, so that the time to launch a graph is hidden
        graphs[turn % len(graphs)].replay()
        event.record()
    events[-1].synchronize()
    times = [a.elapsed_time(b) * 1e3 for a, b in pairwise(events)][WARM_UP * len(graphs) :]
    return [
        quantiles([time / len(output) for time in times[index :: len(graphs)]])
        for index, output in enumerate(outputs)
    ]


def time_graph(launches: Sequence[Callable[[], object]], repeats: int = 20) -> Timing:
    """`time_in_turns` of one contender."""
    return time_in_turns([launches], repeats)[0]


def environment() -> str:
    """GPU, driver, versions and date, in one line for the head of a table."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    if torch.cuda.is_available():
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        device = f"{torch.cuda.get_device_name()}, driver {driver}"
    else:
        device = "no GPU"
    return (
        f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda},"
        f" cuDNN {torch.backends.cudnn.version()}, FlashInfer {version('flashinfer-python')},"
        f" {date.today().isoformat()}"
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A GitHub table; floats get three significant digits, more left of the point, None is a dash."""

    def text(cell: object) -> str:
        if cell is None:
            return "-"
        if not isinstance(cell, float):
            return str(cell)
        digits = 3 - len(f"{abs(cell):.0f}") if abs(cell) >= 1 else 3
        return f"{cell:.{max(digits, 0)}f}"

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text(cell) for cell in line) + " |" for line in lines)


def write_json(path: str | Path, results: object) -> None:
    Path(path).write_text(json.dumps(results, indent=1) + "\n")
