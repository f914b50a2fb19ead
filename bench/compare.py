"""What the comparison scripts share: cold-L2 sets, timing of CUDA graphs, the environment, tables, JSON.

The counterpart of bench_common.h for contenders that are called from Python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
import threading
import time
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
    sm_mhz: float | None = None  # mean clock of the SMs meanwhile


class SmClock:
    """Reads the SMs' clock all the time while it is entered; without nvidia-smi it knows nothing."""

    def __enter__(self) -> SmClock:
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--loop-ms=10"]
        command.append(f"--id=GPU-{torch.cuda.get_device_properties().uuid}")
        self._samples: list[tuple[float, float]] = []  # when, MHz
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            self._process = None
        else:
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            try:
                self._samples.append((time.monotonic(), float(line)))
            except ValueError:  # an error message, or N/A
                continue

    def between(self, start: float, end: float) -> float | None:
        """Mean clock in MHz between two values of time.monotonic(), or None if none was read."""
        read = [mhz for when, mhz in self._samples if start <= when <= end]
        return sum(read) / len(read) if read else None


def cold_sets(bytes_per_launch: int, l2_bytes: int | None = None) -> int:
    """How many sets of buffers to rotate over so that each launch finds the L2 cold: four times the L2 and
    two launches more, at most MAX_SETS. l2_bytes defaults to that of the current GPU."""
    if l2_bytes is None:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    return min(4 * l2_bytes // max(bytes_per_launch, 1) + 2, MAX_SETS)


def quantiles(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(*(ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.5, 0.9)))


def time_graph_quantiles(
    launches: Sequence[Callable[[], object]], repeats: int = 20, clock: SmClock | None = None
) -> Timing:
    """Time of one launch: a CUDA graph holds all of them, one after the other, and is replayed.

    Each launch must use its own buffers (`cold_sets` says how many) and must be capturable. What it returns
    lives as long as the graph, so that outputs do not share memory.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    rounds = math.ceil(MIN_LAUNCHES / len(launches))
    with torch.cuda.stream(side):  # also leaves the stream when a launch refuses to be captured
        for launch in launches:  # compiles, loads and plans what a capture must not
            launch()
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            outputs = [launch() for _ in range(rounds) for launch in launches]

    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + repeats + 1)]
    torch.cuda.synchronize()
    begun = time.monotonic()
    events[0].record()
    for event in events[1:]:  # without a pause, so that the time to launch a graph is hidden
        graph.replay()
        event.record()
    events[-1].synchronize()
    times = [a.elapsed_time(b) * 1e3 / len(outputs) for a, b in pairwise(events[WARM_UP:])]
    return quantiles(times)._replace(sm_mhz=clock and clock.between(begun, time.monotonic()))


def time_graph(launches: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """The median of `time_graph_quantiles`, in microseconds of one launch."""
    return time_graph_quantiles(launches, repeats).median


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
