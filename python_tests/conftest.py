"""Shared fixtures: every test that takes `device` runs on the CPU and, where there is one, on the GPU."""

import pytest
import torch

import fusedkv_ext

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

HAS_CUDA_KERNELS = torch.cuda.is_available() and fusedkv_ext.has_cuda_kernels()


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU and the compiled kernels")


def pytest_collection_modifyitems(items):
    if HAS_CUDA_KERNELS:
        return
    skip = pytest.mark.skip(reason="needs a GPU and the compiled kernels")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
