"""Loads the compiled CUDA kernels, when the package was installed with them, and says where ops can run.

The shared object only fits the torch that it was compiled against, so the build leaves `_build_info.json`
beside it and `load` compares before it lets the dynamic linker try.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import torch

from fusedkv_ext.checks import expect

BUILD_INFO = Path(__file__).parent / "_build_info.json"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def check_build(built: dict[str, str]) -> None:
    """Raise ImportError unless the running torch is the one in `built` (keys "torch" and "cuda")."""
    running = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if any(built[key] != running[key] for key in running):
        raise ImportError(
            f"fusedkv_ext._C: expected torch {built['torch']} (CUDA {built['cuda']}), which it was compiled"
            f" against, got torch {running['torch']} (CUDA {running['cuda']}). Rebuild it in the clone of"
            f" fusedkv_ext with: {REBUILD}"
        )


@functools.cache
def load() -> ModuleType | None:
    """Import `fusedkv_ext._C`, which registers the CUDA implementations of the ops; None without it.

    Raises ImportError when it was compiled against another torch.
    """
    if importlib.util.find_spec("fusedkv_ext._C") is None:
        return None
    check_build(json.loads(BUILD_INFO.read_text()))
    return importlib.import_module("fusedkv_ext._C")


def why_cpu() -> str | None:
    """Why the ops run on their CPU implementations; None when the CUDA kernels can be used."""
    if load() is None:
        if torch.version.cuda is None:
            return "torch is a build without CUDA"
        if shutil.which("nvcc") is None:
            return "the kernels are not compiled: no CUDA toolkit (nvcc) on PATH"
        return f"the kernels are not compiled: {REBUILD} in the clone of fusedkv_ext"
    return None if torch.cuda.is_available() else "no GPU is visible"


def check_device(device: str, op: str, argument: str) -> None:
    """Raise ValueError unless a text is cpu, cuda or cuda:N."""
    known = re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None
    expect(known, op, argument, "cpu, cuda or cuda:N", device)


def choose_device(device: str | None, command: str) -> str:
    """The `--device` of a command, by default cuda where the kernels can run.

    Raises:
        ValueError: no device of these, or a GPU where the kernels cannot run.
    """
    reason = why_cpu()
    device = device or ("cpu" if reason else "cuda")
    check_device(device, command, "--device")
    expect(device == "cpu" or not reason, command, "--device", f"cpu ({reason})", device)
    return device
