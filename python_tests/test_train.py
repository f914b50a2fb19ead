"""The trainer, with tiny models: it learns, goes on exactly, shards, and stops well."""

import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("yaml")

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM, checkpoint, cli, data, records
from fusedkv_ext.evaluate import evaluate
from fusedkv_ext.train import Trainer, learning_rate, train
from fusedkv_ext.train_config import (
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    model_config,
    read_config,
    resolved,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of saved_state
CONTEXT = 32
SPEED = ("tokens_per_s", "mfu", "peak_memory_gb")  # columns that no two runs share
MODEL = """
  hidden_size: 32
  intermediate_size: 48
  num_layers: 4
  num_attention_heads: 2
  num_kv_heads: 1
  head_dim: 64
  max_position_embeddings: 64
  plan: fusedkv
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Token files of 40 training windows or so, with a vocabulary of 260."""
    text = [(f"{i}", f"def f{i}(x):\n    return x * {i}\n") for i in range(70)]
    out = tmp_path_factory.mktemp("data") / "tokens"
    data.prepare(out, lambda: text, vocab_size=260, validation=0.2)
    return out


@pytest.fixture
def write_config(folder, tmp_path):
    files = f"train: {folder / 'train.bin'}, validation: {folder / 'validation.bin'}"

    def write(text: str = "", run: str = "run") -> str:
        path = tmp_path / f"{run}.yaml"
        path.write_text(
            f"run_dir: {tmp_path / run}\nmodel:{MODEL}"
            f"data: {{{files}, context: {CONTEXT}}}\n"
            f"steps: 6\nbatch: 8\nmicro_batch: 4\nlog_every: 2\nvalidate_every: 3\ncheckpoint_every: 100\n"
            f"device: cpu\ntensorboard: false\noptimizer: {{lr: 1e-2}}\n{text}"
        )
        return str(path)

    return write


def go(path: str, *overrides: str):
    return train(read_config(path, overrides))


def table(run: Path, name: str, without=()) -> list[dict[str, str]]:
    with (run / name).open() as file:
        return [{k: x for k, x in row.items() if k not in without} for row in csv.DictReader(file)]


def saved_state(step: Path) -> dict[str, object]:
    """The weights, and every tensor of the optimizer and the RNG."""
    names = dcp.FileSystemReader(step / "optimizer").read_metadata().state_dict_metadata
    state = {
        name: torch.empty(x.size, dtype=x.properties.dtype) if hasattr(x, "size") else None
        for name, x in names.items()
    }
    dcp.load(state, checkpoint_id=step / "optimizer", no_dist=True)
    return {**state, **load_file(step / "model/model.safetensors")}


def assert_same_state(one: Path, other: Path) -> None:
    first, second = saved_state(one), saved_state(other)
    assert first.keys() == second.keys()
    for name, x in first.items():
        same = torch.equal(x, second[name]) if isinstance(x, torch.Tensor) else x == second[name]
        assert same, name


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


def test_a_run_learns_and_writes_what_it_should(write_config, tmp_path, folder):
    outcome = go(write_config(), "steps=30", "log_every=5", "validate_every=10", "checkpoint_every=10")
    run = tmp_path / "run"
    assert (outcome.step, outcome.checkpoint, outcome.signal) == (30, run / "checkpoints/step-30", None)
    assert sorted(x.name for x in (run / "checkpoints").iterdir()) == ["step-20", "step-30"]
    assert sorted(x.name for x in run.iterdir()) == sorted(
        [
            "config.yaml",
            "metrics.csv",
            "validation.csv",
            "fusion.csv",
            "projections.csv",
            "checkpoints",
            "model",
        ]
    )

    metrics = table(run, "metrics.csv")
    norms = [f"grad_norm/layer_{i}" for i in range(4)]
    head = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "peak_memory_gb"]
    assert list(metrics[0]) == head + norms
    assert [int(row["step"]) for row in metrics] == [5, 10, 15, 20, 25, 30]
    assert [int(row["tokens"]) for row in metrics] == [int(row["step"]) * 8 * CONTEXT for row in metrics]
    assert float(metrics[-1]["loss"]) < float(metrics[0]["loss"]) - 1
    assert all(0 < float(row[name]) < float(row["grad_norm"]) for row in metrics for name in norms)

    validation = table(run, "validation.csv")
    assert [int(row["step"]) for row in validation] == [0, 10, 20, 30]
    assert float(validation[0]["loss"]) == pytest.approx(math.log(260), rel=0.02)
    assert float(validation[-1]["loss"]) < float(validation[0]["loss"]) - 1

    model = FusedKVForCausalLM.from_pretrained(run / "model")
    assert model.dtype == torch.float32
    found = evaluate(model, data.TokenFile(folder / "validation.bin"), CONTEXT)
    assert found.total.loss == pytest.approx(float(validation[-1]["loss"]), rel=1e-2)  # all but a few windows
    assert (run / "model/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    fusion = table(run, "fusion.csv")
    assert {int(row["step"]) for row in fusion} == {0, 10, 20, 30}
    weights = model.model.layers[3].attention.fusion.value[1]  # of source 1, at the last step
    (row,) = (x for x in fusion[-8:] if (x["layer"], x["side"], x["source"]) == ("3", "value", "1"))
    expected = (weights.mean(), weights.std(correction=0), weights.min(), weights.max())
    assert [float(row[x]) for x in ("mean", "std", "min", "max")] == pytest.approx(
        [x.item() for x in expected]
    )
    assert float(row["std"]) > 0

    again = read_config(run / "config.yaml", [f"run_dir={tmp_path / 'again'}"])
    assert resolved(again, model.config) == (run / "config.yaml").read_text().replace(
        str(run), f"{tmp_path}/again"
    )


@pytest.mark.parametrize("stop", [3, 4])  # between two logged steps, and at one
def test_two_halves_equal_the_whole_bit_for_bit(write_config, tmp_path, device, stop):
    """8 steps of 8 windows are more than an epoch of this data, and each of them accumulates twice."""
    options = ["steps=8", f"device={device}", f"deterministic={device == 'cuda'}", "compile=false"]
    try:
        go(write_config(), *options)
        path = write_config(run="half")
        assert go(path, *options, f"stop_at={stop}").step == stop
        torch.manual_seed(5)  # a new process draws other numbers
        assert go(path, *options, "resume=true").step == 8
    finally:
        torch.use_deterministic_algorithms(False)
    whole, half = tmp_path / "run", tmp_path / "half"
    assert_same_state(whole / "checkpoints/step-8", half / "checkpoints/step-8")
    for name in ("metrics.csv", "validation.csv", "fusion.csv", "projections.csv"):
        assert table(whole, name, SPEED) == table(half, name, SPEED)


def test_resume_drops_the_rows_of_steps_that_it_does_again(write_config, tmp_path):
    path = write_config()
    go(path, "stop_at=4")
    before = table(tmp_path / "run", "metrics.csv", SPEED)
    with (tmp_path / "run/metrics.csv").open("a") as file:
        file.write("6,1536,9.9,0,0,0,,,0,0,0,0\n7,17")  # of a process that died in the middle of a row
    go(path, "resume=true")
    rows = table(tmp_path / "run", "metrics.csv", SPEED)
    assert rows[:2] == before and [row["step"] for row in rows] == ["2", "4", "6"]
    assert rows[2]["loss"] != "9.9"


class Watch(TorchDispatchMode):
    """Notes the names of all ops, those of the backward pass included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), str(func)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("option", ["activation_checkpointing", "recompute_fusion"])
def test_what_the_backward_pass_repeats_is_arithmetic_alone(write_config, tmp_path, option):
    go(write_config())
    with Watch() as watch:
        go(write_config(run="again"), f"{option}=true")
    assert_same_state(tmp_path / "run/checkpoints/step-6", tmp_path / "again/checkpoints/step-6")
    ours = {name for name in watch.names if name.startswith("fusedkv.")}
    assert ours and all(name.startswith(("fusedkv.fuse_kv", "fusedkv.rope_norm")) for name in ours)


@pytest.mark.parametrize("option", ["activation_checkpointing", "recompute_fusion"])
def test_layers_of_a_kind_share_what_is_compiled(write_config, tmp_path, monkeypatch, option):
    counter, compile = CompileCounter(), torch.compile  # it runs what it is given as it is
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counter, **options))
    torch.compiler.reset()
    go(write_config(), "compile=true", "steps=2", f"{option}=true")
    monkeypatch.undo()
    # A storage layer, a reconstruction layer and the loss, each for training and for validation.
    assert counter.frame_count == 6
    go(write_config(run="eager"), "compile=false", "steps=2")
    columns = ("loss", "grad_norm")
    for run, other in zip(*(table(tmp_path / x, "metrics.csv") for x in ("run", "eager")), strict=True):
        assert [float(run[x]) for x in columns] == pytest.approx([float(other[x]) for x in columns], rel=1e-4)


@pytest.mark.cuda
def test_compiled(write_config, tmp_path):
    go(write_config(), "device=cuda", "compile=true", "activation_checkpointing=true")
    go(write_config(run="eager"), "device=cuda", "compile=false")
    losses = [float(table(tmp_path / x, "validation.csv")[-1]["loss"]) for x in ("run", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_two_processes_shard_and_one_goes_on(write_config, tmp_path):
    """FSDP2 over gloo: the same losses as one process, and its checkpoint serves any number of them."""
    path, options = write_config(run="sharded"), ["activation_checkpointing=true", "stop_at=3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # A thread of Gloo that wants the interpreter at the end gets it late, as it may on a busy machine.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.setswitchinterval(60)\n")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    done = subprocess.run(
        [*command, "-m", "fusedkv_ext", "train", path, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"step 3: {tmp_path / 'sharded/checkpoints/step-3'}") == 1
    go(path, "resume=true")
    go(write_config())
    for name in ("metrics.csv", "validation.csv", "projections.csv"):
        one, two = (table(tmp_path / run, name, SPEED) for run in ("run", "sharded"))
        assert len(one) == len(two) > 0
        for x, y in zip(one, two, strict=True):
            for column in x.keys() - {"weight"}:
                assert float(x[column]) == pytest.approx(float(y[column]), rel=1e-3), (name, column)


def test_validation_reaches_the_end_of_the_file(write_config, tmp_path, folder, monkeypatch):
    """Also where its windows are not a whole number of batches."""
    file, taken = data.TokenFile(folder / "validation.bin"), []
    windows = data.TokenFile.windows

    def listening(self, numbers, *args):
        if self.path == file.path:
            taken.append(list(numbers))
        return windows(self, numbers, *args)

    monkeypatch.setattr(data.TokenFile, "windows", listening)
    count = file.num_windows(CONTEXT)
    batch = 2 * count // 3  # whose multiples do not meet the count
    go(write_config(), f"batch={batch}", f"micro_batch={batch}", "stop_at=1", "validation_windows=null")
    assert taken == [data.spread(count, batch)] and count - 1 - taken[0][-1] < count / batch


def test_a_signal_saves_and_ends_well(write_config, tmp_path, monkeypatch):
    step = Trainer.train_step

    def interrupted(self, log):
        found = step(self, log)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    outcome = go(write_config())
    assert (outcome.step, outcome.signal) == (3, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    go(write_config(), "resume=true")
    go(write_config(run="whole"))
    assert_same_state(tmp_path / "run/checkpoints/step-6", tmp_path / "whole/checkpoints/step-6")


def test_what_a_killed_process_left_goes(write_config, tmp_path):
    go(write_config(), "stop_at=2")
    left = tmp_path / "run/checkpoints/.step-4.new"
    left.mkdir()
    (left / "half").write_text("of a checkpoint")
    go(write_config(), "resume=true")
    assert not left.exists()


def test_a_signal_from_outside(write_config, tmp_path):
    command = [sys.executable, "-m", "fusedkv_ext", "train", write_config(), "steps=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("step 4:"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(60) == 0
    assert "stopped by SIGTERM; go on with resume=true" in rest.splitlines()[-1]
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert f"{saved}, stopped" in rest


def limited(write, size):
    """`write` where no file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(*args, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            return write(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return run


@pytest.mark.parametrize("size", [100, 1000], ids=["tables", "config"])
def test_a_full_disk_at_a_second_start_leaves_the_run_as_it_was(write_config, tmp_path, monkeypatch, size):
    path, run = write_config(), tmp_path / "run"
    go(path, "stop_at=2")
    before = snapshot(run)
    sizes = {name: len(content) for name, content in before.items() if "/" not in name}
    assert min(sizes.values()) > 0 and sorted(sizes.values())[-2] < 1000 < sizes["config.yaml"]
    monkeypatch.setattr(Trainer, "_open_records", limited(Trainer._open_records, size))
    with pytest.raises(OSError):
        go(path, "resume=true")
    assert snapshot(run) == before


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(write_config, tmp_path, monkeypatch, part):
    """The limit on the size of a file stands in for the disk: the same calls fail."""
    path, run = write_config(), tmp_path / "run"
    go(path, "stop_at=2")
    before = snapshot(run / "checkpoints")
    owner, name = (FusedKVForCausalLM, "save_pretrained") if part == "model" else (dcp, "save")
    monkeypatch.setattr(owner, name, limited(getattr(owner, name), 20_000))
    wanted = f"checkpoint at step 4: .*; the last good one is {run / 'checkpoints/step-2'}"
    with pytest.raises(OSError, match=wanted):
        go(path, "resume=true", "stop_at=4")
    assert snapshot(run / "checkpoints") == before
    assert (run / "model").resolve() == run / "checkpoints/step-2/model"
    monkeypatch.undo()
    assert go(path, "resume=true").step == 6


def test_a_loss_that_is_not_finite_stops(write_config, tmp_path, capsys):
    path = write_config()
    options = ["optimizer.lr=1e30", "optimizer.warm_up_steps=0", "optimizer.grad_clip=null"]
    assert cli.main(["train", path, *options, "checkpoint_every=1", "steps=50", "log_every=50"]) == 1
    error = capsys.readouterr().err
    (last, *_) = reversed(checkpoint.checkpoints(tmp_path / "run"))
    step = checkpoint.step_of(last)
    assert f"train: step {step + 1}: expected a finite loss and gradient norm, got " in error
    assert f"; the last good checkpoint is {last}" in error
    assert all(x.isfinite().all() for x in load_file(last / "model/model.safetensors").values())

    assert cli.main(["train", write_config(run="other"), *options, "log_every=6"]) == 1
    assert (
        "there is no checkpoint before it" in capsys.readouterr().err
    )  # seen at a later step than it was made
    assert checkpoint.checkpoints(tmp_path / "other") == []


def test_a_directory_in_use_is_left_alone(write_config, tmp_path):
    path = write_config()
    go(path)
    before = snapshot(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"run_dir: expected a new or empty directory, or resume=true, got .*run,"
    ):
        go(path)
    with pytest.raises(
        ValueError, match=r"steps or stop_at: expected more than 6, the step of .*step-6, got 6"
    ):
        go(path, "resume=true")
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.plan=vanilla", "step-2: expected a model with plan vanilla, got fusedkv"),
        (
            "model.plan=fusedkv:3",
            "step-2: expected a model with plan fusedkv with layers .*, got fusedkv with",
        ),
        ("model.hidden_size=64", "step-2: expected a model with hidden_size 64, got 32"),
        ("seed=1", "resume: seed: expected 0, as in .*step-2, got 1"),
        ("batch=16", "resume: batch: expected 8, as in .*step-2, got 16"),
        ("data.context=16", "resume: context: expected 32, as in .*step-2, got 16"),
        ("data.train={folder}/validation.bin", "resume: data: expected {{.*}}, as in .*step-2, got {{.*}}"),
        ("run_dir={folder}/none", "resume: expected a run with a checkpoint in .*none/checkpoints, got none"),
    ],
)
def test_resume_of_another_run(write_config, tmp_path, folder, override, message):
    path = write_config()
    go(path, "stop_at=2", "log_every=1")
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match=message.format()):
        go(path, "resume=true", override.format(folder=folder))
    assert snapshot(tmp_path / "run") == before


def test_a_damaged_checkpoint(write_config, tmp_path):
    path = write_config()
    go(path, "stop_at=2")
    step = tmp_path / "run/checkpoints/step-2"
    metadata, facts = step / "optimizer/.metadata", step / "run.json"
    for file, damaged, message in (
        (metadata, b"", r"step-2/optimizer: expected the optimizer's state of this model, got EOFError"),
        (metadata, metadata.read_bytes()[:100], "step-2/optimizer: expected the optimizer's state"),
        (facts, facts.read_bytes().replace(b'"step"', b'"stop"'), "run.json: step: expected an integer"),
    ):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            go(path, "resume=true")
        file.write_bytes(whole)
    weights = step / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a safetensors file, got"):
        go(path, "resume=true")
    weights.unlink()
    with pytest.raises(
        ValueError, match=r"expected model/model.safetensors in the checkpoint, got none in .*step-2"
    ):
        go(path, "resume=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bacth=3", r"keys: expected only \[.*'batch'.*\], got unknown \['bacth'\]"),
        ("optimizer.learning_rate=1", r"keys: .*'optimizer.lr'.* unknown \['optimizer.learning_rate'\]"),
        ("model.layers=2", r"FusedKVConfig: keys: .* got unknown \['layers'\]"),
        ("batch=ten", "batch: expected an integer, got 'ten'"),
        ("batch=true", "batch: expected an integer, got True"),
        ("micro_batch=1.5", r"micro_batch: expected an integer or null, got 1.5"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.lr=.nan", "optimizer.lr: expected a positive number, got nan"),
        ("optimizer.beta2=1", r"optimizer.beta2: expected 0 to below 1, got 1.0"),
        ("optimizer.warm_up_steps=7", "optimizer.warm_up_steps: expected 0 to steps, 6, got 7"),
        ("optimizer=3", "optimizer: expected keys and values, got 3"),
        ("steps.more=3", "steps.more: expected steps to be a section, got 6"),
        ("steps=0", "steps: expected a positive number, got 0"),
        ("micro_batch=3", "batch: expected a multiple of 1 processes x micro_batch 3, got 8"),
        ("precision=fp8", "precision: expected bf16 or float32, got 'fp8'"),
        ("device=cuda:one", "device: expected cpu, cuda or cuda:N, got cuda:one"),
        ("data.context=65", "data.context: expected at most model.max_position_embeddings, 64, got 65"),
        (
            "model.vocab_size=100",
            r"train.bin: expected token ids 0 to 99, the vocabulary of the model, got 2\d\d",
        ),
        ("model.plan=magic", "plan: name: expected vanilla or cla or .*, got 'magic'"),
        ("model.preset=7b", "preset: expected 332m or 650m or 1.5b or 4b, got '7b'"),
        ("model.from=nowhere", r"model.from: expected a model directory with config.json, got nowhere"),
        ("seed", "arguments: expected key=value, got 'seed'"),
        ("data.train=none.bin", r"none.bin: expected a file that prepare wrote, got none"),
    ],
)
def test_bad_configs_write_nothing(write_config, tmp_path, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go(write_config(), override)
    assert not (tmp_path / "run").exists()


def test_bad_files(tmp_path, capsys):
    for text, message in (
        ("a: [", "expected YAML, got"),
        ("- 1", "expected keys and values, got list"),
        (
            "steps: 3",
            r"expected at least ['batch', 'data', 'model', 'run_dir', 'steps'], got none of ['batch',",
        ),
    ):
        (tmp_path / "c.yaml").write_text(text)
        assert cli.main(["train", str(tmp_path / "c.yaml")]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "c.yaml").write_bytes(b"\xff")
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 1
    assert "c.yaml: expected YAML, got 'utf-8' codec" in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_ids_beyond_the_vocabulary_that_no_header_tells_of(write_config, tmp_path, folder):
    for suffix in ("bin", "json"):
        (tmp_path / f"t.{suffix}").write_bytes((folder / f"train.{suffix}").read_bytes())
    header = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**header, "max_token": 5}))
    with pytest.raises(ValueError, match=r"t.bin, token \d+: expected an id from 0 to 99, the vocabulary"):
        go(write_config(), f"data.train={tmp_path / 't.bin'}", "model.vocab_size=100", "data.validation=null")


def test_from_another_model(write_config, tmp_path):
    go(write_config())
    source, path = tmp_path / "run/model", write_config("", "second")
    text = Path(path).read_text().replace(MODEL, f" {{from: {source}}}\n")
    Path(path).write_text(text)
    go(path, "stop_at=1")
    last, first = (
        table(tmp_path / "run", "validation.csv")[-1],
        table(tmp_path / "second", "validation.csv")[0],
    )
    assert (first["step"], first["loss"]) == ("0", last["loss"])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    go(path, "resume=true")
    shutil.move(tmp_path / "moved", tmp_path / "run")
    for override, message in (
        ("model.plan=vanilla", "expected a model with plan vanilla, got fusedkv"),
        ("model.preset=332m", "model: expected preset or from, got both"),
    ):
        with pytest.raises(ValueError, match=message):
            go(path, override, f"run_dir={tmp_path / 'third'}")
    assert not (tmp_path / "third").exists()


def test_presets_and_plans(write_config):
    config = read_config(write_config(), ["model={preset: 332m, plan: 'fusedkv:4', num_layers: 6}"])
    made = model_config(config.model, 260)
    assert (made.vocab_size, made.num_layers, made.plan.last_storage) == (128_000, 6, 3)
    assert read_config(write_config(), ["optimizer.lr=3e-4"]).optimizer.lr == 3e-4


def test_the_example_and_the_documentation_have_every_key():
    root = Path(__file__).parents[1]
    example = read_config(root / "examples/train.yaml")
    with torch.device("meta"):
        model = FusedKVForCausalLM(model_config(example.model, 16384))
    embedding = model.model.embed_tokens.weight.numel()
    parameters = sum(x.numel() for x in model.parameters())
    assert (round(parameters / 1e6), round((parameters - embedding) / 1e6)) == (67, 56)
    assert example.steps * example.batch * example.data.context // 10**6 == 131

    text = (root / "docs/training.md").read_text()
    for kind, prefix in ((TrainConfig, ""), (DataConfig, "data."), (OptimizerConfig, "optimizer.")):
        for key in fields(kind):
            if prefix or key.name not in ("data", "optimizer"):
                assert f"`{prefix}{key.name}`" in text, key.name


def test_learning_rate():
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.1, warm_up_steps=4)
    rates = [learning_rate(step, 21, optimizer) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[12] == pytest.approx(0.55) and rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    by_default = replace(optimizer, warm_up_steps=None)
    assert learning_rate(0, 200, by_default) == 0.1  # a twentieth of the steps
    assert learning_rate(0, 10**6, by_default) == 1 / 2000


def test_fusion_weights_have_a_rate_of_their_own_and_no_decay(write_config, tmp_path):
    go(write_config(), "optimizer.fusion_lr_scale=0")
    model = FusedKVForCausalLM.from_pretrained(tmp_path / "run/model")
    key, value = model.model.layers[2].attention.fusion.key, model.model.layers[2].attention.fusion.value
    assert key[0].eq(0).all() and key[1].eq(1).all() and value[0].eq(1).all() and value[1].eq(0).all()


def test_flops():
    """The products of matrices as torch counts them; the scores of attention one by one."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=4, head_dim=8)
    config = FusedKVConfig(**shape, num_attention_heads=4, num_kv_heads=2, sliding_window=5, plan="fusedkv")
    for tied in (False, True):
        tied_config = replace(config, tie_word_embeddings=tied)
        model, ids = FusedKVForCausalLM(tied_config), torch.randint(50, (2, 12))
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).backward()
        matrices = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
        visible = sum(min(t + 1, 5) * 2 + (t + 1) * 2 for t in range(12))  # two layers with a window
        expected = matrices / 24 + 3 * 4 * 4 * 8 * visible / 12
        assert records.flops_per_token(tied_config, 12) == pytest.approx(expected)


def test_norms_of_projections(write_config):
    model = FusedKVForCausalLM(model_config(read_config(write_config()).model, 260))
    ids = torch.randint(260, (2, 9))
    model(ids, ids).backward()
    norms = {(x["layer"], x["weight"]): x["grad_norm"] for x in records.projection_norms(model)}
    assert set(norms) == {(i, w) for i in (0, 1) for w in "qkv"} | {(2, "q"), (3, "q")}
    grad = model.model.layers[1].attention.qkv_proj.weight.grad
    for weight, rows in (("q", slice(0, 128)), ("k", slice(128, 192)), ("v", slice(192, 256))):
        assert norms[1, weight] == pytest.approx(grad[rows].norm().item())
    grad = model.model.layers[3].attention.q_proj.weight.grad
    assert norms[3, "q"] == pytest.approx(grad.norm().item())
    layers = records.layer_norms(model)
    squares = sum(p.grad.square().sum() for p in model.model.layers[2].parameters())
    assert layers["grad_norm/layer_2"] == pytest.approx(squares.sqrt().item())


def test_tensorboard(write_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(write_config(), "tensorboard=true", "stop_at=4")
    go(write_config(), "tensorboard=true", "resume=true")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for tag in ("train/loss", "train/tokens_per_s", "grad_norm/layer_3", "projections/layer_0_k"):
        assert [x.step for x in events.Scalars(tag)] == [2, 4, 6]
    assert [x.step for x in events.Scalars("validation/loss")] == [0, 3, 6]
    assert events.Scalars("fusion/layer_2_key_from_1/mean")[0].value == 1.0
    logged = [float(row["loss"]) for row in table(tmp_path / "run", "metrics.csv")]
    assert [x.value for x in events.Scalars("train/loss")] == pytest.approx(logged)


def test_missing_packages_are_named(write_config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match="expected the package tensorboard, which `pip install tensorboard` adds"
    ):
        go(write_config(), "tensorboard=true")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ValueError, match="expected the package PyYAML, which `pip install pyyaml` adds"):
        go(write_config())
