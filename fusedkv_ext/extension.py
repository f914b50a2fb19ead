"""Loads the compiled CUDA kernels, when the package was installed with them.

The shared object only fits the torch that it was compiled against, so the build leaves `_build_info.json`
beside it and `load` compares before it lets the dynamic linker try.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch

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
