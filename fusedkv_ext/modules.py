"""The layers, each usable in a model of your own.

Attention, MLP and layer have two forms. `forward` takes whole sequences [B, S, hidden] and no cache: for
training, differentiable and fit for torch.compile. `cached` takes packed tokens [T, hidden] and, but for the
MLP, a *step* (cache.PrefillChunk or cache.DecodeStep) that knows where their keys and values live: for
generation, under torch.no_grad. It adds its output to the residual stream in place, that of attention and MLP
to the argument `residual` (zeros give the output alone) and that of a layer to x itself: clone an x that is
needed later.

Before the first step `bind` hands the cache what depends on the weights alone, so that no step computes it
again: the scales of source layers in e4m3, and the fusion weights. Bind the layers from the lowest up, and
again whenever their weights have changed. A step is made after the last change of weights, because on Hopper
the products of a step read them early (`early_weight` of `ops.linear_add`).

Dimensions: B sequences, S tokens, T packed tokens, Hq query heads, Hkv key/value heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedkv_ext import extension, ops, reference
from fusedkv_ext.attention import (
    KeysValues,
    capability,
    causal_attention,
    mixed_attention,
    recomputing_attention,
)
from fusedkv_ext.checks import HALF, expect
from fusedkv_ext.config import FUSION_INITS
from fusedkv_ext.plan import MAX_SOURCES, WEIGHT_KINDS, LayerPlan, WeightKind

if TYPE_CHECKING:
    from fusedkv_ext.cache import DecodeStep, PagedKVCache, PrefillChunk

HAS_HOPPER_KERNELS = "90a" in getattr(extension.load(), "architectures", "")  # None has no such attribute
E4M3_MAX = 448.0  # the largest float8_e4m3fn


class Float32Module(nn.Module):
    """Keeps its floating-point tensors in float32 (or wider) when a model is converted to half precision."""

    def _apply(self, fn, recurse=True):
        def keep(x: Tensor) -> Tensor:
            y = fn(x)
            narrowed = y.is_floating_point() and y.element_size() < 4
            return x.to(y.device, torch.float32) if narrowed else y

        return super()._apply(keep, recurse)


class RotaryTable(Float32Module):
    """The cosines and sines of rotary position embedding, computed once.

    Calling it gives cos_sin, float32 [max_positions, D]: cosines in the first D/2 columns, sines in the rest.
    It is not part of a checkpoint.
    """

    def __init__(
        self, head_dim: int, max_positions: int, theta: float = 10000.0, scaling: dict[str, Any] | None = None
    ):
        super().__init__()
        self.args = (head_dim, max_positions, theta, scaling)
        self.register_buffer("cos_sin", None, persistent=False)
        self.reset()

    def reset(self, device: torch.device | str | None = None) -> None:
        """Compute the table, on `device` when the module was made on the meta device."""
        self.cos_sin = rope_table(*self.args, device=device)

    def _apply(self, fn, recurse=True):
        meta = self.cos_sin.is_meta
        super()._apply(fn, recurse)
        if meta and not self.cos_sin.is_meta:  # to_empty leaves memory as it is, and no checkpoint fills it
            self.reset(self.cos_sin.device)
        return self

    def forward(self) -> Tensor:
        return self.cos_sin


def rope_table(
    head_dim: int,
    max_positions: int,
    theta: float = 10000.0,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build cos_sin, float32 [max_positions, D], for the angles position * theta^(-2j/D), j < D/2.

    scaling: None or FusedKVConfig.rope_scaling. "linear" divides every frequency by the factor; "llama3"
    divides the long wavelengths only, with a ramp between; "yarn" ramps between dividing and keeping and
    also multiplies cosines and sines by its attention factor.
    """
    # Angles in float64: at position 10^5 a float32 angle has lost three digits of its phase.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies, magnitude = theta**-exponents, 1.0
    scaling = scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    elif scaling["rope_type"] == "yarn":
        length, factor = scaling["original_max_position_embeddings"], scaling["factor"]

        def channel(turns: float) -> float:  # the channel pair that makes so many turns over `length`
            return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(channel(scaling.get("beta_fast", 32))), 0)
        last = min(math.ceil(channel(scaling.get("beta_slow", 1))), head_dim - 1)
        pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
        kept = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
        magnitude = scaling.get("attention_factor") or max(0.1 * math.log(factor) + 1.0, 1.0)
    positions = torch.arange(max_positions, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies
    return (torch.cat((angles.cos(), angles.sin()), -1) * magnitude).float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def is_stored(linear: nn.Linear) -> bool:
    """Whether the weight lies there, and is not computed when it is asked for (torch's parametrizations)."""
    return "weight" in linear._parameters


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up packed into one projection."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to the same shape."""
        # Not ops.swiglu, whose CUDA kernel takes half precision alone: this trains in float32 on a GPU too,
        # and torch.compile makes one kernel of this and keeps as little for the backward pass.
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    def cached(self, x: Tensor, residual: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Add the output for x [T, hidden], or for norm(x), to residual [T, hidden] in place; return that.

        The kernel launched right before must not be a change of the weights.
        """
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        gate_up, early = self.gate_up_proj.weight, is_stored(self.gate_up_proj)
        hidden = ops.swiglu_linear(x, gate_up, norm_weight, eps, early)
        ops.linear_add(residual, hidden, self.down_proj.weight, is_stored(self.down_proj))
        return residual


class FusionWeights(Float32Module):
    """The learned weights a (keys) and b (values) of one reconstruction layer.

        K_i = sum_s a_s * K_s        V_i = sum_s b_s * V_s

    Calling it gives (a, b), each float32 [num_sources, Hkv, D], or None where the kind is "none". RoPE scores
    depend on relative positions only if a is equal inside each rotated pair, so "channel" keys have D/2 free
    weights a head, expanded here. The weights stay float32 in a half-precision model.

    Args:
        num_key_sources, num_value_sources: layers mixed.
        num_kv_heads, head_dim: Hkv and D.
        key_weights, value_weights: "none", "scalar" (one weight a source) or "channel".
        interleaved: the rotated pairs are (2j, 2j+1) instead of (j, j + D/2).

    Starts at Lite: keys are the last source, values the first. See initialise_fusion for the other starts.
    """

    def __init__(
        self,
        num_key_sources: int,
        num_value_sources: int,
        num_kv_heads: int,
        head_dim: int,
        key_weights: WeightKind = "channel",
        value_weights: WeightKind = "channel",
        interleaved: bool = False,
    ):
        super().__init__()
        even = head_dim > 0 and head_dim % 2 == 0
        expect(even, "FusionWeights", "head_dim", "a positive even number", head_dim)
        expect(num_kv_heads > 0, "FusionWeights", "num_kv_heads", "1 or more", num_kv_heads)
        self.num_kv_heads, self.head_dim, self.interleaved = num_kv_heads, head_dim, interleaved
        self.key = self._parameter("key", num_key_sources, key_weights, head_dim // 2)
        self.value = self._parameter("value", num_value_sources, value_weights, head_dim)
        with torch.no_grad():
            if self.key is not None:
                self.key[-1] = 1.0
            if self.value is not None:
                self.value[0] = 1.0

    def _parameter(self, side: str, sources: int, kind: WeightKind, channels: int) -> nn.Parameter | None:
        name = "FusionWeights"
        expect(kind in WEIGHT_KINDS, name, f"{side}_weights", " or ".join(WEIGHT_KINDS), repr(kind))
        most = 1 if kind == "none" else MAX_SOURCES
        expect(1 <= sources <= most, name, f"num_{side}_sources", f"1 to {most} with {kind} weights", sources)
        if kind == "none":
            return None
        shape = (sources,) if kind == "scalar" else (sources, self.num_kv_heads, channels)
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return nn.Parameter(torch.zeros(shape, dtype=wide))

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        key = self.key
        if key is not None and key.dim() == 3:
            key = key.repeat_interleave(2, -1) if self.interleaved else torch.cat((key, key), -1)
        return self._full(key), self._full(self.value)

    def _full(self, weights: Tensor | None) -> Tensor | None:
        if weights is None or weights.dim() == 3:
            return weights
        return weights[:, None, None].expand(-1, self.num_kv_heads, self.head_dim).contiguous()


@torch.no_grad()
def initialise_fusion(layers: Sequence[FusionWeights], kind: str) -> None:
    """Set the fusion weights of all reconstruction layers, lowest first, in place.

    "lite": a_n = 1, b_1 = 1 and 0 elsewhere. "standard": every weight ~ N(0, 1). "uniform": 1 / number of
    sources, which prefers none, as a probe of them should. "equivalent": draw a' and b' ~ N(0, 1) for the
    iterative form

        K_i = a'_{i,i-1} K_{i-1} + a'_{i,n} K_n        V_i = b'_{i,i-1} V_{i-1} + b'_{i,1} V_1

    and unroll it to the sources 1 and n. K_{i-1} of the first reconstruction layer is K_n itself, so keys
    start without a share of K_1.

    Raises:
        ValueError: another kind.
    """
    expect(kind in FUSION_INITS, "initialise_fusion", "kind", " or ".join(FUSION_INITS), repr(kind))
    for side, extra in (("key", -1), ("value", 0)):
        previous = None  # the weights of layer i - 1
        for parameter in (getattr(weights, side) for weights in layers):
            if parameter is None:
                continue
            if kind == "lite":
                parameter.zero_()
                parameter[extra] = 1.0
            elif kind == "standard":
                parameter.normal_()
            elif kind == "uniform":
                parameter.fill_(1 / len(parameter))
            else:
                if previous is None:
                    previous = torch.zeros_like(parameter)
                    previous[-1] = 1.0
                parameter.copy_(torch.randn_like(parameter[0]) * previous)
                parameter[extra] += torch.randn_like(parameter[0])
                previous = parameter


def projects_in_one_launch(x: Tensor) -> bool:
    """Whether cached tokens x [T, hidden] take `rope_key_projection_write`, not matmul and `rope_write_kv`.

    The fused op saves a launch and a round trip of the heads through memory. That pays where its product
    keeps up with the library's: on Hopper, with kernels compiled for sm_90a. The kernel for all other GPUs
    takes twice the time of a library product (measured on an H200), and the CPU has no fused kernel.
    """
    if x.device.type != "cuda" or x.dtype not in HALF or x.shape[1] % 8 != 0:
        return False
    return HAS_HOPPER_KERNELS and capability(x.device) == (9, 0)


class _Attention(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        eps: float,
        interleaved: bool,
    ):
        super().__init__()
        name = type(self).__name__
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads}
        for argument, size in sizes.items():
            expect(size > 0, name, argument, "1 or more", size)
        divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
        expect(divides, name, "num_heads", f"a multiple of num_kv_heads {num_kv_heads}", num_heads)
        expect(head_dim > 0 and head_dim % 2 == 0, name, "head_dim", "a positive even number", head_dim)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.interleaved, self.eps = interleaved, eps
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def _check(self, x: Tensor, cos_sin: Tensor) -> None:
        """Raise ValueError unless x is [B, S, hidden] and the table has its positions and this head dim."""
        name, hidden = type(self).__name__, self.o_proj.out_features
        fits = x.dim() == 3 and x.shape[-1] == hidden
        expect(fits, name, "x", f"shape [*, *, {hidden}]", list(x.shape))
        table = f"at least {x.shape[1]} positions of {self.head_dim} columns"
        fits = cos_sin.shape[0] >= x.shape[1] and cos_sin.shape[1] == self.head_dim
        expect(fits, name, "cos_sin", table, list(cos_sin.shape))

    def _rotate(self, x: Tensor, norm: RMSNorm | None, cos_sin: Tensor) -> Tensor:
        """Norm and RoPE of x [B, S, H, D] in float32, rounded once, as rope_write_kv does."""
        wide = x if norm is None else reference.rms_norm(x, norm.weight, norm.eps)
        positions = torch.arange(x.shape[1], device=x.device)
        return reference.apply_rope(wide, positions, cos_sin, self.interleaved).to(x.dtype)

    def _project_and_write(
        self,
        x: Tensor,
        linear: nn.Linear,
        num_heads: int,
        cos_sin: Tensor,
        step: PrefillChunk | DecodeStep,
        norm: RMSNorm | None,
        k_norm: RMSNorm | None = None,
        layer: int | None = None,
    ) -> Tensor | None:
        """Project x [T, hidden] to num_heads (+ 2 Hkv) heads; norm, RoPE, cache write; return the queries.

        linear: its last rows make these heads. norm: what x goes through first. layer: the one whose keys and
        values are among the heads; None when they are queries only.
        """
        num_rows = (num_heads + (0 if layer is None else 2 * self.num_kv_heads)) * self.head_dim
        weight = linear.weight
        if len(weight) > num_rows:
            weight = weight[-num_rows:]
        positions, q_norm = step.positions, None if self.q_norm is None else self.q_norm.weight
        fused = projects_in_one_launch(x)
        if norm is not None and not (fused and norm.eps == self.eps):
            x, norm = norm(x), None
        q = x.new_empty(x.shape[0], num_heads, self.head_dim) if num_heads else None
        caches: dict[str, Tensor | None] = dict(k_cache=None, v_cache=None)
        if layer is not None:
            caches = dict(slot_mapping=step.slot_mapping, **step.cache.write_arguments(layer))
        arguments = dict(
            q_out=q,
            positions=positions,
            cos_sin=cos_sin,
            q_norm=q_norm,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=self.eps,
            interleaved=self.interleaved,
            **caches,
        )
        if fused:
            input_norm = None if norm is None else norm.weight
            early = is_stored(linear)
            ops.rope_key_projection_write(x, weight, input_norm=input_norm, early_weight=early, **arguments)
        else:
            ops.rope_write_kv(F.linear(x, weight).unflatten(-1, (-1, self.head_dim)), **arguments)
        return q


class StorageAttention(_Attention):
    """Causal self-attention that owns its keys and values and shares them with the layers above.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: Hq a multiple of Hkv, D even.
        layer: its number, under which a cache keeps its pages.
        qk_norm, eps: RMSNorm over each head of q and k.
        interleaved: RoPE pairs (2j, 2j+1) instead of (j, j + D/2).
        window: tokens it sees, its own included; 0 for all.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int = 0,
        qk_norm: bool = True,
        eps: float = 1e-6,
        interleaved: bool = False,
        window: int = 0,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, eps, interleaved)
        expect(window >= 0, "StorageAttention", "window", "0 (all tokens) or more", window)
        self.layer, self.window = layer, window
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def forward(
        self, x: Tensor, cos_sin: Tensor, sources: Mapping[int, KeysValues] | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Attend over x itself.

        Args:
            x: [B, S, hidden], positions 0 to S - 1.
            cos_sin: float32 [max_positions, D], see rope_table.
            sources: unused; ReconstructionAttention has the same signature.

        Returns:
            The output [B, S, hidden] and (keys, values), each [B, S, Hkv, D], keys after norm and RoPE.

        Raises:
            ValueError: x or the table of another shape.
        """
        self._check(x, cos_sin)
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        q, k = self._rotate(q, self.q_norm, cos_sin), self._rotate(k, self.k_norm, cos_sin)
        out = causal_attention(q, k, v, self.window)
        return self.o_proj(out.flatten(2)), (k, v)

    @torch.no_grad()
    def kv_scales(self, norm_weight: Tensor, cos_sin: Tensor) -> KeysValues:
        """Scales with which no key and no value is beyond e4m3's range, whatever the input.

            |v_j| <= sqrt(hidden) ||W_j * g||       for an input that is RMS-normalised with the weight g
            |k_j| <= sqrt(D) |w_j|                  after the norm of k with weight w; else as |v_j|
            |rope(k)_j| <= hypot(|k_j|, |k_pair(j)|) times the magnitude of the table (not 1 with yarn)

        and scale = bound / 448, or 1 where that is zero. A bound that is far from reached costs no precision,
        because e4m3 is a floating-point format. Rounding in half precision may pass the bound by a hundredth,
        which changes nothing: up to 464 rounds to 448.

        Args:
            norm_weight: [hidden], of the RMSNorm that makes the input x.
            cos_sin: float32 [max_positions, D].

        Returns:
            (k_scale, v_scale), float32 [Hkv, D].
        """
        wide = torch.promote_types(self.qkv_proj.weight.dtype, torch.float32)
        rows = self.qkv_proj.weight[self.num_heads * self.head_dim :].to(wide) * norm_weight.to(wide)
        bounds = rows.norm(dim=-1).unflatten(0, (2, -1, self.head_dim)) * rows.shape[-1] ** 0.5
        keys, values = bounds
        if self.k_norm is not None:
            keys = (self.k_norm.weight.to(wide).abs() * self.head_dim**0.5).expand_as(values)
        first, second = (keys[..., 0::2], keys[..., 1::2]) if self.interleaved else keys.chunk(2, -1)
        # Every position has the magnitude of the first.
        pairs = torch.hypot(first, second) * torch.hypot(*cos_sin[0].to(wide).chunk(2))
        keys = pairs.repeat_interleave(2, -1) if self.interleaved else torch.cat((pairs, pairs), -1)

        def scale(bound: Tensor) -> Tensor:
            scale = (bound / E4M3_MAX).float()
            return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)

        return scale(keys), scale(values)

    def bind(self, cache: PagedKVCache, norm_weight: Tensor, cos_sin: Tensor) -> None:
        """Set the scales of this layer in a cache that holds it in e4m3; arguments as in kv_scales."""
        if self.layer in cache.fp8_layers:
            cache.set_scales(self.layer, *self.kv_scales(norm_weight, cos_sin))

    def cached(
        self,
        x: Tensor,
        cos_sin: Tensor,
        step: PrefillChunk | DecodeStep,
        residual: Tensor,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Write the keys and values of x [T, hidden], or of norm(x), to the step's slots, then attend to the
        cache.

        The output is added to residual [T, hidden] in place, which is returned.
        """
        q = self._project_and_write(
            x, self.qkv_proj, self.num_heads, cos_sin, step, norm, self.k_norm, self.layer
        )
        out = step.attend(q, step.cache.own(self.layer), self.window)
        ops.linear_add(residual, out.flatten(1), self.o_proj.weight, is_stored(self.o_proj))
        return residual

    def write_kv(
        self, x: Tensor, cos_sin: Tensor, step: PrefillChunk | DecodeStep, norm: RMSNorm | None = None
    ) -> None:
        """Only write the keys and values: all that a prompt needs of the last such layer."""
        self._project_and_write(x, self.qkv_proj, 0, cos_sin, step, norm, self.k_norm, self.layer)


class ReconstructionAttention(_Attention):
    """Causal attention to keys and values made from those of storage layers; projects queries only.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: as in StorageAttention, and equal to the sources'.
        plan: the layers it reads and the kinds of its weights.
        qk_norm, eps: RMSNorm over each head of q.
        interleaved: as in StorageAttention.

    Attributes:
        recompute: form the fused keys and values again in the backward pass instead of keeping them for it;
            False at first, see FusedKVForCausalLM.recompute_fusion.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        plan: LayerPlan,
        qk_norm: bool = True,
        eps: float = 1e-6,
        interleaved: bool = False,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, eps, interleaved)
        self.plan = plan
        self.recompute = False
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.fusion = FusionWeights(
            len(plan.key_sources),
            len(plan.value_sources),
            num_kv_heads,
            head_dim,
            plan.key_weights,
            plan.value_weights,
            interleaved,
        )

    def forward(self, x: Tensor, cos_sin: Tensor, sources: Mapping[int, KeysValues]) -> tuple[Tensor, None]:
        """Attend to fused keys and values.

        Args:
            x: [B, S, hidden], positions 0 to S - 1.
            cos_sin: float32 [max_positions, D].
            sources: for each layer of the plan its (keys, values), each [B, S, Hkv, D], keys after RoPE.

        Returns:
            The output [B, S, hidden], and None: it shares nothing.

        Raises:
            ValueError: x, the table or a source of another shape, or a source that is not there.
        """
        self._check(x, cos_sin)
        shape = [*x.shape[:2], self.num_kv_heads, self.head_dim]
        for layer in self.plan.sources:
            name = f"sources[{layer}]"
            expect(layer in sources, "ReconstructionAttention", name, "keys and values", "none")
            for tensor in sources[layer]:
                same = list(tensor.shape) == shape
                expect(same, "ReconstructionAttention", name, f"shape {shape}", list(tensor.shape))
        q = self._rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), self.q_norm, cos_sin)
        keys = [sources[layer][0] for layer in self.plan.key_sources]
        values = [sources[layer][1] for layer in self.plan.value_sources]
        attend = recomputing_attention if self.recompute else mixed_attention
        out = attend(q, keys, values, *self.fusion())
        return self.o_proj(out.flatten(2)), None

    def bind(
        self, cache: PagedKVCache, norm_weight: Tensor | None = None, cos_sin: Tensor | None = None
    ) -> None:
        """Set the fusion weights in a cache, after its source layers were bound.

        norm_weight, cos_sin: unused; StorageAttention has the same signature.
        """
        cache.set_weights(self, self.plan, *self.fusion())

    def cached(
        self,
        x: Tensor,
        cos_sin: Tensor,
        step: PrefillChunk | DecodeStep,
        residual: Tensor,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Attend from x [T, hidden], or from norm(x), to the cache of the source layers, after `bind`.

        The output is added to residual [T, hidden] in place, which is returned.
        """
        q = self._project_and_write(x, self.q_proj, self.num_heads, cos_sin, step, norm)
        out = step.attend(q, step.cache.fused(self))
        ops.linear_add(residual, out.flatten(1), self.o_proj.weight, is_stored(self.o_proj))
        return residual


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        attention: a StorageAttention or a ReconstructionAttention.
        hidden_size, intermediate_size: of x and of the SwiGLU MLP.
        eps: of the two RMSNorms.
    """

    def __init__(
        self,
        attention: StorageAttention | ReconstructionAttention,
        hidden_size: int,
        intermediate_size: int,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(hidden_size, eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(
        self, x: Tensor, cos_sin: Tensor, sources: Mapping[int, KeysValues] | None = None
    ) -> tuple[Tensor, KeysValues | None]:
        """x [B, S, hidden] to the same shape, and the keys and values that its attention shares, if any."""
        out, own = self.attention(self.attention_norm(x), cos_sin, sources)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), own

    def bind(self, cache: PagedKVCache, cos_sin: Tensor) -> None:
        """Hand a cache the scales or fusion weights of this layer: before its first step, lower layers first.

        Raises:
            ValueError: the weights have changed since the cache's tokens were written in e4m3, or a source
                layer was not bound.
        """
        self.attention.bind(cache, self.attention_norm.weight, cos_sin)

    def cached(self, x: Tensor, cos_sin: Tensor, step: PrefillChunk | DecodeStep) -> Tensor:
        """Change x [T, hidden] in place, through a cache that `bind` has prepared, and return it."""
        self.attention.cached(x, cos_sin, step, x, self.attention_norm)
        return self.mlp.cached(x, x, self.mlp_norm)

    def write_kv(self, x: Tensor, cos_sin: Tensor, step: PrefillChunk | DecodeStep) -> None:
        """Only the cache write of a storage layer."""
        self.attention.write_kv(x, cos_sin, step, self.attention_norm)
