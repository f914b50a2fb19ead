"""Compiles the CUDA kernels with CMake where there are a CUDA toolkit and a CUDA build of torch.

Elsewhere there is nothing to compile, and the ops run on their CPU implementations. FUSEDKV_FORCE_CUDA=1
makes that an error; MAX_JOBS sets the number of parallel compilations.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.partition(".")[0]) < 77:  # whose own message is about the licence
    sys.exit(f"setuptools 77 or later is needed, this is {setuptools.__version__}: pip install -U setuptools")

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "fusedkv_ext"
BYTES_PER_JOB = 2.5e9  # memory that one compiler process is given

# cmake and ninja may be packages of this interpreter, whose scripts need not be on PATH.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")


def find_nvcc() -> Path | None:
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    return nvcc if nvcc.is_file() else None


def why_no_kernels() -> str | None:
    """What keeps the kernels from being compiled here; None when nothing does."""
    try:
        import torch
    except ImportError:
        return "torch is not installed (or pip hides it: pass --no-build-isolation)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no CUDA toolkit was found: put nvcc on PATH or set CUDA_HOME"
    version = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    toolkit = tuple(map(int, version.groups()))
    if toolkit < (12, 8):
        return f"the CUDA toolkit is {version[0]}, 12.8 or later is needed"
    if toolkit[0] != int(torch.version.cuda.split(".")[0]):
        return f"the CUDA toolkit is {version[0]}, but torch was built with CUDA {torch.version.cuda}"
    chosen = "TORCH_CUDA_ARCH_LIST" in os.environ
    if not chosen and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if shutil.which("cmake") is None:
        return "cmake was not found: pip install cmake ninja"
    return None


def parallel_jobs() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    jobs = min(len(os.sched_getaffinity(0)), int(memory / BYTES_PER_JOB))
    return int(os.environ.get("MAX_JOBS", max(jobs, 1)))


def cmake_options(version: str) -> dict[str, str]:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [*include_paths(), sysconfig.get_path("include")]
    try:
        import pybind11

        includes.insert(0, pybind11.get_include())
    except ImportError:
        pass  # torch carries a copy beside its own headers
    return {
        "CMAKE_CUDA_COMPILER": str(find_nvcc()),
        "FUSEDKV_BUILD_TORCH_EXTENSION": "ON",
        "FUSEDKV_VERSION": version,
        "FUSEDKV_EXTENSION_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "FUSEDKV_INCLUDE_DIRS": ";".join(includes),
        "FUSEDKV_TORCH_LIBRARY_DIRS": ";".join(library_paths()),
        "FUSEDKV_TORCH_VERSION": torch.__version__,
        "FUSEDKV_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
    }


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch

        # One folder an interpreter, torch and generator, so that CMake's cache never mixes two of them.
        ninja = shutil.which("ninja") is not None
        name = f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{'ninja' if ninja else 'make'}"
        folder = ROOT / "build" / name
        options = [f"-D{k}={v}" for k, v in cmake_options(self.distribution.get_version()).items()]
        generator = ["-G", "Ninja"] if ninja else []
        subprocess.check_call(["cmake", "--log-level=NOTICE", "-S", ROOT, "-B", folder, *generator, *options])
        jobs = str(parallel_jobs())
        subprocess.check_call(["cmake", "--build", folder, "--target", "_C", "--parallel", jobs])

        module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        built_for = json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda})
        # Python started in the clone imports the sources before any installed copy: they get the module too.
        for target in {Path(self.get_ext_fullpath(ext.name)).parent, PACKAGE}:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(module, target)
            (target / "_build_info.json").write_text(built_for)


reason = why_no_kernels()
if reason:
    if os.environ.get("FUSEDKV_FORCE_CUDA") == "1":
        sys.exit(f"FUSEDKV_FORCE_CUDA=1, but the CUDA kernels cannot be compiled: {reason}")
    print(f"fusedkv_ext: the ops will run on their CPU implementations: {reason}", file=sys.stderr)
    if "--inplace" in sys.argv:  # else the torch of this run may be that of an isolated build only
        for stale in PACKAGE.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
            stale.unlink()  # compiled for a torch that has been replaced by this one

setup(
    ext_modules=[] if reason else [Extension("fusedkv_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
