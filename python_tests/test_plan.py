import pytest

from fusedkv_ext.plan import PLAN_NAMES, CrossLayerPlan, LayerPlan


def sources(plan):
    return [(layer.key_sources, layer.value_sources) for layer in plan.layers]


def test_factories_read_the_layers_of_the_paper():
    own = [((i,), (i,)) for i in range(8)]
    plan = CrossLayerPlan
    assert sources(plan.vanilla(8)) == own
    assert sources(plan.cla(8, 2)) == [((i // 2 * 2,),) * 2 for i in range(8)]
    assert sources(plan.cla(5, 3)) == [((0,),) * 2] * 3 + [((3,),) * 2] * 2
    assert sources(plan.yoco(8)) == own[:4] + [((3,), (3,))] * 4
    assert sources(plan.fusedkv(8)) == own[:4] + [((0, 3), (0, 3))] * 4
    assert sources(plan.fusedkv(8, n=6)) == own[:6] + [((0, 5), (0, 5))] * 2
    assert sources(plan.fusedkv_lite(8)) == own[:4] + [((3,), (0,))] * 4
    assert sources(plan.fusedkv_lite_learnable(8)) == sources(plan.fusedkv_lite(8))
    assert sources(plan.fusedkv_lite_rev(8)) == own[:4] + [((0,), (3,))] * 4
    assert sources(plan.dense_fusion(8)) == own[:4] + [((0, 1, 2, 3),) * 2] * 4
    assert sources(plan.from_layer_types("0_1_2_2_2")) == own[:3] + [((2,), (2,))] * 2


def test_parse():
    plan = CrossLayerPlan
    assert plan.parse("fusedkv", 8) == plan.fusedkv(8) and plan.parse("fusedkv:6", 8) == plan.fusedkv(8, 6)
    assert plan.parse("cla:4", 8) == plan.cla(8, 4) and plan.parse("vanilla", 8) == plan.vanilla(8)
    assert plan.parse("layer_types:0_1_1", 8) == plan.from_layer_types("0_1_1")
    for text in ("fusedkv:", "fusedkv:-1", "fusedkv:4:4", "vanilla:8", ":4", ""):
        with pytest.raises(ValueError, match=f"plan: name: expected .*, got '{text}'"):
            plan.parse(text, 8)


def test_weights_of_the_factories():
    kinds = {name: CrossLayerPlan.named(name, 8).layers[-1] for name in PLAN_NAMES}
    learned = {name: (p.key_weights, p.value_weights) for name, p in kinds.items() if p.key_weights != "none"}
    assert learned == {
        "fusedkv": ("channel", "channel"),
        "fusedkv_lite_learnable": ("channel", "channel"),
        "dense_fusion": ("scalar", "scalar"),
    }


@pytest.mark.parametrize(
    "plan, stored, last",
    [
        (CrossLayerPlan.vanilla(4), (0, 1, 2, 3), 3),
        (CrossLayerPlan.cla(6, 2), (0, 2, 4), 4),
        (CrossLayerPlan.fusedkv(6), (0, 1, 2), 2),
        (CrossLayerPlan.fusedkv_lite(6, n=1), (0,), 0),
        (CrossLayerPlan.from_layer_types("0_0_2_0"), (0, 2), 2),
    ],
)
def test_storage_layers(plan, stored, last):
    assert plan.storage_layers == stored and plan.last_storage == last


def test_what_the_next_layer_rereads():
    layers = {"vanilla": [], "cla": [0, 1, 2, 3, 4, 5], "fusedkv": [2, 3, 4, 5], "yoco": [2, 3, 4, 5]}
    for name, expected in layers.items():
        plan = CrossLayerPlan.named(name, 6)
        assert [i for i, layer in enumerate(plan.layers) if layer.sources in plan.reread_sources] == expected


@pytest.mark.parametrize("name", PLAN_NAMES)
def test_dict_round_trip(name):
    plan = CrossLayerPlan.named(name, 6)
    assert CrossLayerPlan.from_dict(plan.to_dict()) == plan


OWN = LayerPlan((0,), (0,))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CrossLayerPlan.named("fusedv", 4), "plan: name: expected vanilla or .*got 'fusedv'"),
        (lambda: CrossLayerPlan("x", ()), "layers: expected at least one layer, got 0"),
        (
            lambda: CrossLayerPlan.from_layer_types("0_2_2"),
            "layer 1 key_sources: .*0 to 1.*got 2",
        ),
        (lambda: CrossLayerPlan.from_layer_types("0_0_1"), "layer 2 key_sources: .*stores keys.*got 1"),
        (lambda: CrossLayerPlan.from_layer_types("0_x"), "layer_types: expected layer numbers.*got '0_x'"),
        (lambda: CrossLayerPlan("x", (OWN, LayerPlan((-1,), (0,)))), "layer 1 key_sources.*got -1"),
        (lambda: CrossLayerPlan("x", (OWN, LayerPlan((0,), ()))), "layer 1 value_sources: expected 1 to 8"),
        (lambda: CrossLayerPlan("x", (OWN, LayerPlan((0, 0), (0,), "channel"))), r"different.*got \(0, 0\)"),
        (lambda: CrossLayerPlan("x", (OWN, LayerPlan((0,), (0,), "vector"))), "key_weights: .*got vector"),
        (
            lambda: CrossLayerPlan("x", (LayerPlan((0,), (0,), "scalar"),)),
            "layer 0 key_weights: .*none",
        ),
        (
            lambda: CrossLayerPlan("x", (OWN, LayerPlan((1,), (1,)), LayerPlan((0, 1), (0,)))),
            "layer 2 key_sources: expected one layer when the weights are none",
        ),
        (lambda: CrossLayerPlan.fusedkv(8, n=8), "n: expected an integer from 2 to 7, got 8"),
        (lambda: CrossLayerPlan.fusedkv(2), "num_layers: expected an integer of at least 3, got 2"),
        (lambda: CrossLayerPlan.cla(8, factor=0), "factor: expected an integer of at least 1, got 0"),
        (lambda: CrossLayerPlan.dense_fusion(32), "expected 1 to 8 different layers"),
        (lambda: CrossLayerPlan.from_dict({"name": "x"}), "expected an object with name and layers"),
        (
            lambda: CrossLayerPlan.from_dict({"name": "x", "layers": [{"key_sources": [0]}]}),
            "layer 0: expected the fields",
        ),
        (lambda: CrossLayerPlan.fusedkv(8, n=4.0), r"n: expected an integer from 2 to 7, got 4\.0"),
        (lambda: CrossLayerPlan.vanilla("4"), "num_layers: expected an integer of at least 1, got '4'"),
        (lambda: CrossLayerPlan("x", (LayerPlan([0], (0,)),)), r"layer 0 key_sources: expected .*got \[0\]"),
        (
            lambda: CrossLayerPlan("x", (LayerPlan(("0",), (0,)),)),
            r"layer 0 key_sources: expected a tuple of layer numbers, got \('0',\)",
        ),
        (
            lambda: CrossLayerPlan("x", (LayerPlan((0.0,), (0,)),)),
            r"layer 0 key_sources: expected a tuple of layer numbers, got \(0\.0,\)",
        ),
    ],
)
def test_bad_plans_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "config: expected an object with name and layers, got None"),
        ([1], "config: expected an object with name and layers"),
        ({"name": "x", "layers": 3}, "layers: expected a list, got 3"),
        ({"name": "x", "layers": ["key_sources"]}, "layer 0: expected the fields"),
        ({"name": "x", "layers": [None]}, "layer 0: expected the fields"),
        ({"name": 5}, "name: expected "),
        ({"key_sources": 0}, "layer 1 key_sources: expected a list of layers, got 0"),
        ({"value_sources": None}, "layer 1 value_sources: expected a list of layers, got None"),
        ({"value_sources": "0"}, "layer 1 value_sources: expected "),
        ({"key_sources": [0.0]}, "layer 1 key_sources: expected "),
        ({"key_sources": [None]}, "layer 1 key_sources: expected "),
        ({"key_sources": [[0]]}, "layer 1 key_sources: expected "),
        ({"key_weights": 1}, "layer 1 key_weights: expected none or scalar or channel, got 1"),
        ({"value_weights": ["scalar"]}, "layer 1 value_weights: expected none or scalar or channel"),
    ],
)
def test_dicts_of_other_types_are_refused(values, message):
    if isinstance(values, dict) and "layers" not in values:  # a change of one field of a good plan
        good = CrossLayerPlan.yoco(2).to_dict()
        if "name" in values:
            values = {**good, **values}
        else:
            values = {**good, "layers": [good["layers"][0], {**good["layers"][1], **values}]}
    with pytest.raises(ValueError, match="plan: " + message):
        CrossLayerPlan.from_dict(values)
