"""bench/train_plans.py from the text to the figures, with tiny models on the CPU."""

import argparse
import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import train_plans

from fusedkv_ext import plots
from fusedkv_ext.config import read_json
from fusedkv_ext.train import Trainer
from fusedkv_ext.train_config import model_config, read_config

FAST = ("steps=10", "validate_every=5", "checkpoint_every=10")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with token files, and the runs vanilla, gqa and dense-fusion."""
    work = tmp_path_factory.mktemp("plans") / "work"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is no work for two
    assert train_plans.main(["prepare", "--smoke", "--work", str(work)]) == 0
    assert go(work, "run", "vanilla", "gqa", "dense-fusion") == 0
    yield work
    torch.set_num_threads(threads)


def go(work, command, *arguments):
    return train_plans.main([command, "--smoke", "--work", str(work), *FAST, *map(str, arguments)])


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_text_to_figures(work, tmp_path, capsys):
    text = read_json(work / "text.json")
    docs = {path.name for path in (train_plans.ROOT / "docs").glob("*.md")}
    assert text["text"]["files"] >= len(docs) and text["text"]["characters of docs"] > 1000
    assert text["train"]["num_tokens"] > text["validation"]["num_tokens"] > 0
    assert any(x.startswith("torch ") for x in text["installed"])

    out = tmp_path / "results"
    assert go(work, "uptrain", "uptrain-fusedkv", "--into", out) == 0
    assert go(work, "speed", "speed-vanilla", "speed-lite") == 0
    assert train_plans.main(["collect", str(out), "--work", str(work)]) == 0
    plans = table(out / "plans.csv")
    assert {row["name"] for row in plans} == {"vanilla", "gqa", "dense-fusion"}
    losses = [float(row["validation_loss"]) for row in plans]
    assert losses == sorted(losses)
    for row in plans:
        last = table(work / row["name"] / "validation.csv")[-1]
        assert (row["validation_loss"], row["tokens"], row["steps"]) == (last["loss"], last["tokens"], "10")
        assert int(row["tokens"]) == 10 * 4 * 32 and float(row["seconds"]) > 0
        assert float(row["epochs"]) == pytest.approx(1280 / text["train"]["num_tokens"], abs=6e-4)
    rows = {row["name"]: row for row in plans}
    # 4 layers, 4 heads of 8 channels, keys and values in 2 bytes; half of the heads; half of the layers.
    assert [rows[x]["kv_bytes_per_token"] for x in ("vanilla", "gqa", "dense-fusion")] == [
        "512",
        "256",
        "256",
    ]
    assert [rows[x]["init"] for x in ("vanilla", "gqa", "dense-fusion")] == ["", "", "uniform"]
    (row,) = table(out / "uptrain.csv")
    (first, half, end) = (x["loss"] for x in table(out / "uptrain-fusedkv/validation.csv"))
    assert (row["loss_before"], row["loss_after_half"], row["validation_loss"]) == (first, half, end)
    assert (row["init"], row["steps"]) == ("least-squares", "2")
    assert len(table(out / "uptrain-fusedkv/conversion.csv")) == 2 * 2 * 5
    assert {row["name"] for row in table(out / "speed.csv")} == {"speed-vanilla", "speed-lite"}
    assert all(int(row["tokens_per_s"]) > 0 for row in table(out / "speed.csv"))
    assert read_json(out / "text.json") == text

    pytest.importorskip("matplotlib")
    runs = [out / name for name in ("vanilla", "gqa", "dense-fusion")]
    for kind in ("loss", "gradients", "ablation"):
        plots.plot(kind, runs, tmp_path / "figures")
    figures = (plots.plot("fusion", [x / "dense-fusion"], tmp_path / x.name) for x in (out, work))
    (_, collected), (_, whole) = figures
    assert collected.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match="a plan with learned weights, got vanilla"):
        plots.plot("fusion", [out / "gqa"], tmp_path / "figures")
    assert max(path.stat().st_size for path in out.rglob("*")) < 1 << 20


def test_what_is_done_is_left_and_what_fails_keeps_no_other(work, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def broken(self, log):
        if self.directory.name == "lite" and self.step == 3:
            raise RuntimeError("out of luck")
        return step(self, log)

    monkeypatch.setattr(Trainer, "train_step", broken)
    assert go(work, "run", "vanilla", "lite", "yoco", "checkpoint_every=2") == 1
    printed = capsys.readouterr()
    assert "vanilla: done before" in printed.out and "failed: lite" in printed.out
    assert "out of luck" in printed.err and (work / "yoco/result.json").is_file()
    assert not (work / "lite/result.json").exists()

    monkeypatch.undo()
    assert go(work, "run", "lite", "yoco", "--minutes", 0) == 0
    assert "lite: no time left" in capsys.readouterr().out

    def interrupted(self, log):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, log)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert go(work, "run", "lite") == 1
    assert "lite: stopped by a signal" in capsys.readouterr().out
    monkeypatch.undo()
    assert go(work, "run", "lite", "yoco") == 0
    assert [row["step"] for row in table(work / "lite/metrics.csv")] == ["10"]
    shutil.rmtree(work / "lite")
    shutil.rmtree(work / "yoco")


def test_results_are_not_mixed(work, tmp_path, capsys):
    out, other = tmp_path / "results", tmp_path / "other"
    assert train_plans.main(["collect", str(out), "--work", str(work)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(message):
        assert train_plans.main(["collect", str(out), "--work", str(other)]) == 1
        assert message in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    for name in ("data", "vanilla"):
        shutil.copytree(work / name, other / name, symlinks=True)
    shutil.copyfile(work / "text.json", other / "text.json")
    result = read_json(other / "vanilla/result.json")
    (other / "vanilla/result.json").write_text(json.dumps({**result, "validation_loss": 1.0}))
    refused(f"{out / 'vanilla'}: expected none, or that of {other}, got another run of this name")
    (other / "vanilla").rename(other / "lite")
    (other / "lite/result.json").write_text(json.dumps({**result, "name": "lite", "hyperparameters": "0"}))
    refused("plans.csv: expected runs with the same hyperparameters, got others in ['lite', ")
    text = read_json(work / "text.json")
    (other / "text.json").write_text(json.dumps({**text, "train": {**text["train"], "sha256": "0"}}))
    refused(f"{out / 'text.json'}: expected the tokens of {other}, got others")
    shutil.rmtree(other / "lite")
    refused(f"{other}: expected at least one finished run, got none")


def test_bad_input(work, tmp_path, capsys):
    assert go(work, "run", "vanila") == 1
    assert "names: expected vanilla or fusedkv or" in capsys.readouterr().err
    assert go(tmp_path, "run", "vanilla") == 1
    assert "train.bin: expected a file that prepare wrote, got none" in capsys.readouterr().err
    assert go(work, "prepare") == 1
    assert "expected a new or empty folder" in capsys.readouterr().err
    shutil.copytree(work / "data", tmp_path / "data")
    assert go(tmp_path, "uptrain", "uptrain-lite") == 1
    assert f"expected the finished run vanilla in {tmp_path}, got none" in capsys.readouterr().err


def test_the_config_is_of_the_size_that_it_says():
    args = argparse.Namespace(work=Path("w"), smoke=False, changes=[])
    other_sizes = {
        "vanilla": (68.5, 58.0),
        "vanilla-seed1": (68.5, 58.0),
        "fusedkv-n4": (62.0, 51.5),
        "fusedkv-n8": (65.2, 54.7),
    }
    for name, recipe in train_plans.RUNS.items():
        config = read_config(train_plans.CONFIG, train_plans.changes_of(name, recipe, args))
        model = model_config(config.model, 16384)
        row = train_plans.facts(name, recipe, config, model)
        sizes = other_sizes.get(name, (63.6, 53.1))
        assert [row["parameters"] / 1e6, row["non_embedding"] / 1e6] == pytest.approx(sizes, abs=0.06), name
        assert config.steps * config.batch * config.data.context == 100_663_296


def test_processes_share_the_runs(work, capsys):
    """A run that another process has is left to it, and taken once that one has ended."""
    with train_plans.claim(work / ".lite.lock") as mine:
        assert mine
        assert go(work, "run", "vanilla", "lite") == 0
    said = capsys.readouterr().out
    assert "vanilla: done before" in said and "lite: another process is at it" in said
    assert not (work / "lite").exists()
    with train_plans.claim(work / ".lite.lock") as mine:
        assert mine
