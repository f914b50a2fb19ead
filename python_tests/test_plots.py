"""The figures, of small run directories that the tests make."""

import csv

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fusedkv_ext import CrossLayerPlan, FusedKVForCausalLM, cli, plots

pytest.importorskip("matplotlib", reason="plot needs it")
yaml = pytest.importorskip("yaml", reason="plot needs it")

LAYERS = (0, 1, 2)
DATA = {"train": "train.bin", "context": 1024}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def make_run(folder, shift=0.0, steps=6, data=DATA, batch=8, plan=None):
    """A run of `steps` logged steps, a validation every second one, with losses moved by `shift`."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"data": data, "batch": batch, "seed": len(folder.name)})
    )
    metrics = [
        {
            "step": 10 * (i + 1),
            "tokens": 1000 * (i + 1),
            "loss": 4.0 / (i + 1) + shift,
            "lr": 1e-3,
            "mfu": "",  # not known on every machine
            **{f"grad_norm/layer_{layer}": (layer + 1) * (i + 1) + shift for layer in LAYERS},
        }
        for i in range(steps)
    ]
    write_csv(folder / "metrics.csv", metrics)
    rows = [{name: row[name] for name in ("step", "tokens", "loss")} for row in metrics[1::2]]
    write_csv(folder / "validation.csv", rows)
    projections = [
        {"step": row["step"], "layer": layer, "weight": weight, "grad_norm": layer + len(weights) + shift}
        for row in metrics
        for layer, weights in enumerate(("qkv", "qkv", "q"))
        for weight in weights
    ]
    write_csv(folder / "projections.csv", projections)
    if plan:
        tiny.model(plan, torch.float32).save_pretrained(folder / "model")
    return folder


def assert_image(path):
    """A picture of a useful size that is not of one colour."""
    from matplotlib import image

    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 100 and pixels.std() > 0.01


def numbers(rows, *names):
    return [tuple(float(row[name]) for name in names) for row in rows]


def test_loss(tmp_path):
    runs = [make_run(tmp_path / name, shift) for name, shift in (("a", 0.0), ("b", 0.5))]
    png, table = plots.plot("loss", runs, tmp_path / "figures")
    assert (png.name, table.name) == ("loss.png", "loss.csv")
    assert_image(png)
    rows = read_csv(table)
    assert {(row["run"], row["split"]) for row in rows} == {
        (run, split) for run in "ab" for split in ("train", "validation")
    }
    for run in runs:
        for split, name in (("train", "metrics.csv"), ("validation", "validation.csv")):
            mine = [row for row in rows if (row["run"], row["split"]) == (run.name, split)]
            columns = ("step", "tokens", "loss")
            assert numbers(mine, *columns) == numbers(read_csv(run / name), *columns)


def test_gradients(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 0.5)]
    png, table = plots.plot("gradients", runs, tmp_path)
    assert_image(png)
    names = ("run", "weight", "step", "layer")
    got = {tuple(row[name] for name in names): float(row["grad_norm"]) for row in read_csv(table)}
    expected = {}
    for run in runs:
        for row in read_csv(run / "metrics.csv"):
            for layer in LAYERS:
                norm = float(row[f"grad_norm/layer_{layer}"])
                expected[run.name, "all", row["step"], f"{layer}"] = norm
        for row in read_csv(run / "projections.csv"):
            norm = float(row["grad_norm"])
            expected[run.name, row["weight"], row["step"], row["layer"]] = norm
    assert got == expected and len(got) == 2 * 6 * (3 + 7)


def test_ablation_sorts_by_the_last_validation_loss(tmp_path, capsys):
    runs = [make_run(tmp_path / name, shift) for name, shift in (("lite", 0.2), ("best", 0.0), ("rev", 0.5))]
    assert cli.main(["plot", "ablation", *map(str, runs), "--out", str(tmp_path)]) == 0
    assert_image(tmp_path / "ablation.png")
    rows = read_csv(tmp_path / "ablation.csv")
    assert [row["run"] for row in rows] == ["best", "lite", "rev"]
    assert numbers(rows, "step", "tokens", "loss") == [(60, 6000, 4 / 6 + shift) for shift in (0.0, 0.2, 0.5)]
    assert numbers(rows, "above_best") == [pytest.approx((shift,)) for shift in (0.0, 0.2, 0.5)]
    out = capsys.readouterr().out
    assert out.index("best") < out.index("lite") < out.index("rev") and "0.6667" in out


@pytest.mark.parametrize("plan", ["dense_fusion", "fusedkv", "fusedkv_lite_learnable"])
def test_dense_fusion(tmp_path, plan):
    run = make_run(tmp_path / "run", plan=plan)
    png, table = plots.plot("dense-fusion", [run], tmp_path)
    assert_image(png)
    model = FusedKVForCausalLM.from_pretrained(run / "model")
    expected = {}
    for i in range(3, tiny.LAYERS):
        attention = model.model.layers[i].attention
        for side, weights in zip(("key", "value"), attention.fusion(), strict=True):
            for source, w in zip(getattr(attention.plan, f"{side}_sources"), weights, strict=True):
                expected[str(i), side, str(source)] = pytest.approx(w.mean().item(), abs=1e-6)
    got = {(row["layer"], row["side"], row["source"]): float(row["weight"]) for row in read_csv(table)}
    assert got == expected


@pytest.mark.parametrize("plan", ["fusedkv", "dense_fusion"])
def test_fusion_takes_a_model_directory(tmp_path, plan):
    model = tiny.model(plan, torch.float32)
    model.save_pretrained(tmp_path / "model")
    png, table = plots.plot("fusion", [tmp_path / "model"], tmp_path)
    assert_image(png)
    got = {
        tuple(row[name] for name in ("layer", "side", "source", "head", "channel")): float(row["weight"])
        for row in read_csv(table)
    }
    heads, channels = model.config.num_kv_heads, model.config.head_dim
    sources = model.config.plan.layers[-1].key_sources
    assert len(got) == 3 * 2 * len(sources) * heads * channels
    keys, values = model.model.layers[4].attention.fusion()
    for side, weights in (("key", keys), ("value", values)):
        assert got["4", side, str(sources[-1]), "1", "13"] == weights[-1, 1, 13].item()
    if plan == "fusedkv":
        assert got["4", "key", "0", "1", "13"] == got["4", "key", "0", "1", "5"], "a RoPE pair shares one"


def test_fusion_weights_alone_do_for_the_model(tmp_path):
    """As bench/train_plans.py keeps them of a run whose model is too large to keep."""
    model = tiny.model("fusedkv", torch.float32)
    model.save_pretrained(tmp_path / "model")
    _, expected = plots.plot("fusion", [tmp_path / "model"], tmp_path / "whole")
    weights = load_file(tmp_path / "model/model.safetensors")
    (tmp_path / "model/model.safetensors").unlink()
    few = {name: x for name, x in weights.items() if ".fusion." in name}
    save_file(few, tmp_path / "model/fusion.safetensors")
    _, table = plots.plot("fusion", [tmp_path / "model"], tmp_path / "few")
    assert table.read_bytes() == expected.read_bytes()

    (name, x), *_ = sorted(few.items())
    save_file({**few, name: x[:1].contiguous()}, tmp_path / "model/fusion.safetensors")
    with pytest.raises(ValueError, match=rf"fusion weights of layer 3: expected .*{name}.*, got "):
        plots.plot("fusion", [tmp_path / "model"], tmp_path / "out")
    (tmp_path / "model/fusion.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"fusion\.safetensors: expected a safetensors file, got "):
        plots.plot("fusion", [tmp_path / "model"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_keep_apart(tmp_path):
    (tmp_path / "x").mkdir()
    runs = [make_run(tmp_path / "run"), make_run(tmp_path / "x" / "run", 0.5)]
    _, table = plots.plot("ablation", runs, tmp_path)
    assert [row["run"] for row in read_csv(table)] == [str(run) for run in runs]


@pytest.mark.parametrize("kind", ["loss", "gradients", "ablation"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 8}, "b ends at step 80, a at 60; b ends at tokens 8000, a at 6000"),
        ({"data": {**DATA, "train": "x.bin"}}, "b has the data {'context': 1024, 'train': 'x.bin'}, a {"),
        ({"batch": 4}, "b has the batch 4, a 8"),
    ],
    ids=["steps", "data", "batch"],
)
def test_runs_that_differ(tmp_path, kind, options, message):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **options)]
    with pytest.raises(ValueError) as error:
        plots.plot(kind, runs, tmp_path / "out")
    assert "expected runs of the same data, steps and tokens" in str(error.value) and message in str(
        error.value
    )
    assert not (tmp_path / "out").exists()
    png, table = plots.plot(kind, runs, tmp_path / "out", allow_different=True)
    assert_image(png)
    assert {row["run"] for row in read_csv(table)} == {"a", "b"}


def test_bad_input_is_named(tmp_path, capsys):
    run, out = make_run(tmp_path / "run", plan="fusedkv_lite"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"KIND: expected dense-fusion or loss .* got 'pie'"):
        plots.plot("pie", [run], out)
    with pytest.raises(SystemExit):
        cli.main(["plot", "pie", str(run), "--out", str(out)])
    assert "invalid choice: 'pie'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one directory, got 0"):
        plots.plot("loss", [], out)
    with pytest.raises(ValueError, match="different directories"):
        plots.plot("loss", [run, run], out)
    with pytest.raises(ValueError, match="one directory for fusion, got 2"):
        plots.plot("fusion", [run, tmp_path], out)
    for kind in ("fusion", "dense-fusion"):
        with pytest.raises(ValueError, match=r"a plan with learned weights, got fusedkv_lite in .*run"):
            plots.plot(kind, [run], out)
        with pytest.raises(ValueError, match=r"with config\.json and model\.safetensors"):
            plots.plot(kind, [tmp_path], out)
    for kind in ("loss", "ablation", "gradients"):
        with pytest.raises(ValueError, match=rf"a run directory with \w+\.csv, got {tmp_path}"):
            plots.plot(kind, [tmp_path], out)
    assert cli.main(["plot", "loss", str(tmp_path / "nowhere"), "--out", str(out)]) == 1
    assert "a run directory, got " in capsys.readouterr().err

    rows = read_csv(run / "metrics.csv")
    write_csv(run / "metrics.csv", [{"step": row["step"], "tokens": row["tokens"]} for row in rows])
    with pytest.raises(ValueError, match=r"metrics\.csv: expected the columns .* none of \['loss'\]"):
        plots.plot("loss", [run], out)
    write_csv(run / "metrics.csv", [{"step": 1, "tokens": 2, "loss": 3}])
    with pytest.raises(ValueError, match=r"columns grad_norm/layer_<i>, got none"):
        plots.plot("gradients", [run], out)
    write_csv(run / "metrics.csv", [{"step": 1, "tokens": 2, "loss": "low"}])
    with pytest.raises(ValueError, match=r"metrics\.csv: expected numbers, got .*'low'"):
        plots.plot("loss", [run], out)
    (run / "validation.csv").write_text("step,tokens,loss\n")
    with pytest.raises(ValueError, match=r"validation\.csv: expected at least one logged step, got 0"):
        plots.plot("ablation", [run], out)
    other, broken = make_run(tmp_path / "other"), make_run(tmp_path / "broken")
    (broken / "config.yaml").write_text("[")
    with pytest.raises(ValueError, match=r"config\.yaml: expected YAML"):
        plots.plot("ablation", [other, broken], out)
    assert not out.exists()


def test_nothing_is_left_of_a_figure_that_could_not_be_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plots.plot("loss", [run], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_plans_of_other_sources_share_a_heat_map(tmp_path):
    """A layer that does not read a source has an empty cell, not a zero."""
    layers = list(CrossLayerPlan.fusedkv(6, 3).layers)
    layers[5] = CrossLayerPlan.fusedkv(6, 2).layers[5]
    tiny.model(CrossLayerPlan("mixed", tuple(layers)), torch.float32).save_pretrained(tmp_path / "model")
    png, table = plots.plot("dense-fusion", [tmp_path / "model"], tmp_path)
    assert_image(png)
    assert {(row["layer"], row["source"]) for row in read_csv(table)} == {
        ("3", "0"), ("3", "2"), ("4", "0"), ("4", "2"), ("5", "0"), ("5", "1")
    }  # fmt: skip
    assert_image(plots.plot("fusion", [tmp_path / "model"], tmp_path)[0])
