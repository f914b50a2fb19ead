"""FusedKV: decoder LLMs whose upper layers reconstruct keys and values from two lower layers.

Importing the package registers `torch.ops.fusedkv`, with CUDA kernels where they were compiled.
"""

from __future__ import annotations

from fusedkv_ext import extension
from fusedkv_ext import library as library  # registers the ops
from fusedkv_ext.cache import PagedKVCache
from fusedkv_ext.config import FusedKVConfig
from fusedkv_ext.generation import Generation, Sampling, generate, stream
from fusedkv_ext.model import FusedKVForCausalLM, FusedKVModel
from fusedkv_ext.modules import DecoderLayer, FusionWeights, ReconstructionAttention, StorageAttention
from fusedkv_ext.plan import CrossLayerPlan, LayerPlan

__all__ = [
    "CrossLayerPlan",
    "DecoderLayer",
    "FusedKVConfig",
    "FusedKVForCausalLM",
    "FusedKVModel",
    "FusionWeights",
    "Generation",
    "LayerPlan",
    "PagedKVCache",
    "ReconstructionAttention",
    "Sampling",
    "StorageAttention",
    "generate",
    "has_cuda_kernels",
    "stream",
]

__version__ = "0.1.0"

extension.load()


def has_cuda_kernels() -> bool:
    """Whether the compiled CUDA extension is installed and loaded."""
    return extension.load() is not None
