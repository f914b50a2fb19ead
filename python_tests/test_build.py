"""What the build promises: see setup.py, CMakeLists.txt and fusedkv_ext/extension.py."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedkv_ext import extension

ROOT = Path(__file__).parents[1]
CMAKE = (ROOT / "CMakeLists.txt").read_text()


def sources(folder: str, pattern: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob(pattern))
    assert found, f"no {pattern} in {folder}"
    return found


def test_another_torch_is_refused(tmp_path, monkeypatch):
    """The check comes before the import, which would fail with an undefined symbol or worse."""
    info = tmp_path / "_build_info.json"
    info.write_text(json.dumps({"torch": "2.0.1+cu999", "cuda": "99.9"}))
    monkeypatch.setattr(extension, "BUILD_INFO", info)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ImportError) as error:
        extension.load.__wrapped__()
    for part in ("2.0.1+cu999", "99.9", torch.__version__, str(torch.version.cuda), extension.REBUILD):
        assert part in str(error.value)


@pytest.mark.cuda
def test_module_shares_the_cpp_library_with_torch():
    """A compiler with a static libstdc++ only would put a second one inside, which breaks every message."""
    assert b"\0libstdc++.so.6\0" in Path(extension.load().__file__).read_bytes()


def test_another_cuda_is_refused():
    with pytest.raises(ImportError, match=r"CUDA 99\.9"):
        extension.check_build({"torch": torch.__version__, "cuda": "99.9"})


def test_the_same_torch_is_accepted():
    extension.check_build({"torch": torch.__version__, "cuda": str(torch.version.cuda)})


def test_no_extension_is_no_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert extension.load.__wrapped__() is None


def test_forced_cuda_says_what_is_missing(tmp_path):
    env = {**os.environ, "FUSEDKV_FORCE_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--name"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    missing = "is a build without CUDA" if torch.version.cuda is None else "no CUDA toolkit was found"
    assert "FUSEDKV_FORCE_CUDA=1" in run.stderr and missing in run.stderr


def test_an_old_setuptools_says_so(tmp_path):
    """Without build isolation pip takes the one that is there, and asks for no version."""
    (tmp_path / "setuptools/command").mkdir(parents=True)
    (tmp_path / "setuptools/__init__.py").write_text('__version__ = "65.5.0"; Extension = setup = None')
    (tmp_path / "setuptools/command/build_ext.py").write_text("build_ext = object")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr.strip().endswith("77 or later is needed, this is 65.5.0: pip install -U setuptools")


def test_kernels_and_bench_programs_include_no_torch():
    files = [*sources("csrc/kernels", "*.*"), *sources("bench", "*.cu"), *sources("bench", "*.h")]
    pattern = re.compile(r'#include *[<"](torch|ATen|c10|pybind11)')
    assert [str(file) for file in files if pattern.search(file.read_text())] == []


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [("csrc/kernels/instantiations", "*.cu"), ("csrc/ops", "*.cpp"), ("csrc", "bindings.cpp")],
)
def test_cmake_lists_exactly_the_sources(folder, pattern):
    present = {str(file.relative_to(ROOT)) for file in sources(folder, pattern)}
    named = re.findall(r"[\w/]+\.(?:cu|cpp)\b", CMAKE)
    listed = {name for name in named if Path(name).match(f"{folder}/{pattern}")}
    assert listed == present


def test_cmake_builds_every_bench_program():
    programs = re.search(r"foreach\(program IN ITEMS\s+([\w\s]+)\)", CMAKE)[1].split()
    assert sorted(programs) == [file.stem.removeprefix("bench_") for file in sources("bench", "bench_*.cu")]


def test_every_op_is_registered_for_cuda():
    from fusedkv_ext.library import SCHEMAS

    registered = re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc/ops/registration.cpp").read_text())
    assert sorted(registered) == sorted(schema.partition("(")[0] for schema in SCHEMAS)
