"""Which layers every layer reads its keys and values from: the one place that knows the methods' names.

Layers are counted from 0. A *storage layer* reads itself: it projects keys and values and owns a cache. A
*reconstruction layer* reads storage layers below it and projects queries only. Vanilla, CLA, YOCO, FusedKV
and its variants are all plans (grouped and multi-query attention are a matter of `num_kv_heads`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from fusedkv_ext.checks import expect, integer

WeightKind = Literal["none", "scalar", "channel"]
WEIGHT_KINDS = ("none", "scalar", "channel")
MAX_SOURCES = 8  # what fuse_kv mixes


@dataclass(frozen=True)
class LayerPlan:
    """Where one layer's keys and values come from.

        K_i = sum_s a_s * K_s        V_i = sum_s b_s * V_s

    Args:
        key_sources, value_sources: layer numbers, 0-based.
        key_weights, value_weights: the kind of a and b: "none" (one source, taken as it is), "scalar" (a
            number a source) or "channel" (a number a source, head and channel; tied in RoPE pairs for keys).
    """

    key_sources: tuple[int, ...]
    value_sources: tuple[int, ...]
    key_weights: WeightKind = "none"
    value_weights: WeightKind = "none"

    @property
    def sources(self) -> tuple[int, ...]:
        return tuple(sorted({*self.key_sources, *self.value_sources}))


@dataclass(frozen=True)
class CrossLayerPlan:
    """One LayerPlan a layer; build it with a factory, or from LayerPlans of your own.

    Raises:
        ValueError: a layer that reads a layer above itself or one that stores nothing, or weights that do not
            fit the number of sources; the message names the layer.
    """

    name: str
    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        expect(isinstance(self.name, str), "plan", "name", "a string", repr(self.name))
        expect(len(self.layers) > 0, "plan", "layers", "at least one layer", 0)
        stores = [plan.key_sources == plan.value_sources == (i,) for i, plan in enumerate(self.layers)]
        for i, plan in enumerate(self.layers):
            for side in ("key", "value"):
                sources, kind = getattr(plan, f"{side}_sources"), getattr(plan, f"{side}_weights")
                where = f"layer {i} {side}_sources"
                listed = isinstance(sources, tuple) and all(isinstance(s, int) for s in sources)
                expect(listed, "plan", where, "a tuple of layer numbers", repr(sources))
                several = 1 <= len(sources) <= MAX_SOURCES and len(set(sources)) == len(sources)
                expect(several, "plan", where, f"1 to {MAX_SOURCES} different layers", sources)
                for source in sources:
                    lower = f"layers 0 to {i} (none above itself)"
                    expect(0 <= source <= i, "plan", where, lower, source)
                    expect(stores[source], "plan", where, "a layer that stores keys and values", source)
                lone = kind != "none" or len(sources) == 1
                expect(lone, "plan", where, "one layer when the weights are none", sources)
                where = f"layer {i} {side}_weights"
                expect(kind in WEIGHT_KINDS, "plan", where, " or ".join(WEIGHT_KINDS), kind)
                plain = not stores[i] or kind == "none"
                expect(plain, "plan", where, "none in a layer that reads itself", kind)

    @cached_property
    def storage_layers(self) -> tuple[int, ...]:
        """The layers that project, and cache, keys and values."""
        return tuple(i for i, plan in enumerate(self.layers) if plan.sources == (i,))

    @cached_property
    def source_layers(self) -> tuple[int, ...]:
        """The storage layers that another layer reads."""
        read = {source for i, plan in enumerate(self.layers) for source in plan.sources if source != i}
        return tuple(sorted(read))

    @property
    def last_storage(self) -> int:
        """The highest storage layer: a prompt needs its keys and values, and nothing of any layer above it.

        Prefill therefore runs the layers above it, and its own attention and MLP, for the last token only.
        """
        return self.storage_layers[-1]

    @cached_property
    def reread_sources(self) -> frozenset[tuple[int, ...]]:
        """The sources of each layer right after which a layer reads some of them again."""
        pairs = zip(self.layers, self.layers[1:], strict=False)
        return frozenset(a.sources for a, b in pairs if not set(a.sources).isdisjoint(b.sources))

    # Factories. `n` is the number of storage layers, half of all layers unless given.

    @classmethod
    def vanilla(cls, num_layers: int) -> CrossLayerPlan:
        """Every layer reads itself."""
        num_layers = integer(num_layers, "plan", "num_layers", 1)
        return cls("vanilla", tuple(LayerPlan((i,), (i,)) for i in range(num_layers)))

    @classmethod
    def cla(cls, num_layers: int, factor: int = 2) -> CrossLayerPlan:
        """Cross-layer attention: `factor` neighbouring layers share the cache of the lowest of them."""
        num_layers = integer(num_layers, "plan", "num_layers", 1)
        factor = integer(factor, "plan", "factor", 1)
        return cls("cla", tuple(LayerPlan((s,), (s,)) for s in (i - i % factor for i in range(num_layers))))

    @classmethod
    def yoco(cls, num_layers: int, n: int | None = None) -> CrossLayerPlan:
        """Every layer above layer n reads layer n (counted from 1)."""
        n = _storage_count(num_layers, n, 1)
        return cls._halves("yoco", num_layers, n, LayerPlan((n - 1,), (n - 1,)))

    @classmethod
    def fusedkv(cls, num_layers: int, n: int | None = None) -> CrossLayerPlan:
        """K_i = a_1 * K_1 + a_n * K_n and V_i = b_1 * V_1 + b_n * V_n, a weight a channel."""
        n = _storage_count(num_layers, n, 2)
        return cls._halves("fusedkv", num_layers, n, LayerPlan((0, n - 1), (0, n - 1), "channel", "channel"))

    @classmethod
    def fusedkv_lite(cls, num_layers: int, n: int | None = None) -> CrossLayerPlan:
        """K_i = K_n and V_i = V_1."""
        n = _storage_count(num_layers, n, 1)
        return cls._halves("fusedkv_lite", num_layers, n, LayerPlan((n - 1,), (0,)))

    @classmethod
    def fusedkv_lite_learnable(cls, num_layers: int, n: int | None = None) -> CrossLayerPlan:
        """K_i = a * K_n and V_i = b * V_1, a weight a channel."""
        n = _storage_count(num_layers, n, 1)
        plan = LayerPlan((n - 1,), (0,), "channel", "channel")
        return cls._halves("fusedkv_lite_learnable", num_layers, n, plan)

    @classmethod
    def fusedkv_lite_rev(cls, num_layers: int, n: int | None = None) -> CrossLayerPlan:
        """K_i = K_1 and V_i = V_n: the ablation with the sources exchanged."""
        n = _storage_count(num_layers, n, 1)
        return cls._halves("fusedkv_lite_rev", num_layers, n, LayerPlan((0,), (n - 1,)))

    @classmethod
    def dense_fusion(cls, num_layers: int, n: int | None = None) -> CrossLayerPlan:
        """The probe: every layer above n mixes the keys, and the values, of all n with learned scalars."""
        n = _storage_count(num_layers, n, 1)
        every = tuple(range(n))
        return cls._halves("dense_fusion", num_layers, n, LayerPlan(every, every, "scalar", "scalar"))

    @classmethod
    def from_layer_types(cls, layer_types: str) -> CrossLayerPlan:
        """Parse LCKV's notation: "0_1_2_2_2" names the layer that each layer reads."""
        parts = layer_types.split("_")
        digits = all(part.isdecimal() for part in parts)
        expect(digits, "plan", "layer_types", "layer numbers joined by _, as in 0_1_2_2_2", repr(layer_types))
        return cls("layer_types", tuple(LayerPlan((int(part),), (int(part),)) for part in parts))

    @classmethod
    def named(cls, name: str, num_layers: int, **options: int) -> CrossLayerPlan:
        """The factory called `name`, as in named("cla", 16, factor=4)."""
        expect(name in PLAN_NAMES, "plan", "name", " or ".join(PLAN_NAMES), repr(name))
        return getattr(cls, name)(num_layers, **options)

    @classmethod
    def parse(cls, text: str, num_layers: int) -> CrossLayerPlan:
        """A plan as a command line names it: a name, with a number where it takes one, or LCKV's notation.

        "fusedkv" and "fusedkv:4" (n = 4), "cla:3" (a factor), "layer_types:0_1_2_2_2".
        """
        name, colon, option = text.partition(":")
        if name == "layer_types":
            return cls.from_layer_types(option)
        if not colon:
            return cls.named(name, num_layers)
        takes = name in PLAN_NAMES and name != "vanilla"
        wanted = " or ".join(f"{known}:N" for known in PLAN_NAMES if known != "vanilla")
        expect(takes and option.isdecimal(), "plan", "name", wanted, repr(text))
        return cls.named(name, num_layers, **{"factor" if name == "cla" else "n": int(option)})

    @classmethod
    def _halves(cls, name: str, num_layers: int, n: int, upper: LayerPlan) -> CrossLayerPlan:
        lower = tuple(LayerPlan((i,), (i,)) for i in range(n))
        return cls(name, lower + (upper,) * (num_layers - n))

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CrossLayerPlan:
        """The inverse of to_dict."""
        fields = {"key_sources", "value_sources", "key_weights", "value_weights"}
        whole = isinstance(values, Mapping) and set(values) == {"name", "layers"}
        expect(whole, "plan", "config", "an object with name and layers", values)
        expect(isinstance(values["layers"], Sequence), "plan", "layers", "a list", values["layers"])
        for i, layer in enumerate(values["layers"]):
            complete = isinstance(layer, Mapping) and set(layer) == fields
            expect(complete, "plan", f"layer {i}", f"the fields {sorted(fields)}", layer)
            for side in ("key_sources", "value_sources"):
                listed = isinstance(layer[side], Sequence)
                expect(listed, "plan", f"layer {i} {side}", "a list of layers", repr(layer[side]))
        layers = (
            LayerPlan(
                tuple(layer["key_sources"]),
                tuple(layer["value_sources"]),
                layer["key_weights"],
                layer["value_weights"],
            )
            for layer in values["layers"]
        )
        return cls(values["name"], tuple(layers))


PLAN_NAMES = (
    "vanilla",
    "cla",
    "yoco",
    "fusedkv",
    "fusedkv_lite",
    "fusedkv_lite_learnable",
    "fusedkv_lite_rev",
    "dense_fusion",
)


def _storage_count(num_layers: int, n: int | None, least: int) -> int:
    num_layers = integer(num_layers, "plan", "num_layers", least + 1)
    return integer(num_layers // 2 if n is None else n, "plan", "n", least, num_layers - 1)
