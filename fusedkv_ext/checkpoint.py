"""Checkpoints of a training run: written beside the earlier ones and renamed when whole.

    RUN/checkpoints/step-<n>/model/          config.json, model.safetensors in float32, the tokenizer if known
    RUN/checkpoints/step-<n>/optimizer/      AdamW's state and RNG states, torch.distributed.checkpoint
    RUN/checkpoints/step-<n>/run.json        the step, and what the order of the data depends on
    RUN/model                                a link to the model of the last one

The weights are read back from the safetensors, on any number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fusedkv_ext.checks import expect, integer
from fusedkv_ext.config import FusedKVConfig, read_json
from fusedkv_ext.model import CONFIG_NAME, WEIGHTS_NAME, FusedKVForCausalLM

CHECKPOINTS, MODEL, OPTIMIZER, FACTS = "checkpoints", "model", "optimizer", "run.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and its peers: torchrun's, or one alone."""

    rank: int = 0
    world: int = 1

    def first(self, work: Callable[[], T]) -> T:
        """Do work in process 0 alone; every process gets its result, or raises its error."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        if self.world > 1:
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the processes."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x


def step_of(checkpoint: Path) -> int:
    """The number in step-<n>."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, the earliest first."""
    found = (path for path in (run / CHECKPOINTS).glob("step-*") if path.name[5:].isdecimal())
    return sorted(found, key=step_of)


def remove_unfinished(run: Path) -> None:
    """Delete what a process that was killed while it saved has left."""
    for path in (run / CHECKPOINTS).glob(".step-*.new"):
        shutil.rmtree(path)


def save(
    run: Path,
    step: int,
    model: FusedKVForCausalLM,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    processes: Processes,
    keep: int | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Write checkpoints/step-<step>, then let RUN/model point to its model.

    Args:
        run: the run directory, on a file system that all processes share.
        step: steps done.
        model, optimizer: of this process; sharded or not.
        extra: tensors of this process to give back when it goes on, by name.
        facts: for run.json.
        processes: this one and its peers; all of them call.
        keep: then delete all but the last so many; None keeps all.
        tokenizer: a tokenizer.json to put beside the model.

    Raises:
        OSError: it could not be written; the directory holds the earlier checkpoints and nothing else.
    """
    final = run / CHECKPOINTS / f"step-{step}"
    new = final.with_name(f".{final.name}.new")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # empty but in process 0

    def write_model() -> None:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with torch.device("meta"):
            whole = FusedKVForCausalLM(model.config)
        whole.load_state_dict(weights, assign=True)
        try:
            whole.save_pretrained(new / MODEL)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        if tokenizer is not None:
            shutil.copyfile(tokenizer, new / MODEL / tokenizer.name)
        (new / FACTS).write_text(json.dumps({**facts, "step": step}, indent=2) + "\n")

    def write_state() -> None:
        state = _state(model, optimizer, extra, processes.rank)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it saves a single process is meant
                dcp.save(state, checkpoint_id=new / OPTIMIZER, no_dist=processes.world == 1)
        except CheckpointException as error:  # a BaseException, with an error for each process that had one
            raise OSError("; ".join(str(x) for x, _ in error.failures.values())) from error

    def publish() -> None:
        for file in (path for path in new.rglob("*") if path.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # some file systems tell only now that they are full
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
        link = run / f".{MODEL}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(CHECKPOINTS) / final.name / MODEL)
        os.replace(link, run / MODEL)
        for old in checkpoints(run)[: -keep if keep else 0]:
            shutil.rmtree(old)

    try:
        processes.first(write_model)
        write_state()
        processes.first(publish)
    except OSError as error:
        processes.first(lambda: shutil.rmtree(new, ignore_errors=True))
        kept = checkpoints(run)
        last = f"the last good one is {kept[-1]}" if kept else "there is no earlier one"
        raise OSError(f"train: checkpoint at step {step}: {error}; {last}") from error
    return final


def _state(
    model: FusedKVForCausalLM, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor], rank: int
) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return {**state, **{f"process.{rank}.{name}": x for name, x in extra.items()}}


def load_model(checkpoint: Path, config: FusedKVConfig) -> FusedKVForCausalLM:
    """The model of a checkpoint, in float32 on the CPU.

    Raises:
        FileNotFoundError, ValueError: it is not one of this config, or as FusedKVForCausalLM.from_pretrained.
    """
    check_config(FusedKVConfig.load(checkpoint / MODEL / CONFIG_NAME), config, str(checkpoint))
    return FusedKVForCausalLM.from_pretrained(checkpoint / MODEL, dtype=torch.float32)


def check_config(got: FusedKVConfig, wanted: FusedKVConfig, where: str) -> None:
    """Raise ValueError unless two configs describe one model; how the fusion weights began does not count."""
    ours, theirs = wanted.to_dict(), got.to_dict()
    for name in ours:
        if name == "fusion_init" or ours[name] == theirs[name]:
            continue
        mine, other = ours[name], theirs[name]
        if name == "plan":
            mine, other = (x.plan.name for x in (wanted, got))
            if mine == other:
                mine, other = (f"{x.plan.name} with layers {x.plan.layers}" for x in (wanted, got))
        raise ValueError(f"train: {where}: expected a model with {name} {mine}, got {other}")


def load_state(
    checkpoint: Path,
    model: FusedKVForCausalLM,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
    processes: Processes,
) -> dict[str, Tensor]:
    """Restore the optimizer in place; return the extra tensors, those that the checkpoint lacks as given.

    Raises:
        FileNotFoundError, ValueError: a state that is not there, damaged, or another model's.
    """
    path = checkpoint / OPTIMIZER
    wanted = f"train: {path}: expected the optimizer's state of this model, got"
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises any
        raise ValueError(f"{wanted} {error!r}") from error
    state = _state(model, optimizer, extra, processes.rank)
    prefix = f"process.{processes.rank}."
    # A run that goes on with more processes, or with a GPU, has states that the checkpoint does not know.
    state = {name: x for name, x in state.items() if name in saved or not name.startswith(prefix)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path, no_dist=processes.world == 1)
    except CheckpointException as error:
        problems = "; ".join(str(x) for x, _ in error.failures.values())
        raise ValueError(f"{wanted} {problems}") from error
    found = {name: state.pop(f"{prefix}{name}", x) for name, x in extra.items()}
    set_optimizer_state_dict(
        model, optimizer, state, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    return found


def last_checkpoint(run: Path) -> Path:
    """The last whole checkpoint of a run.

    Raises:
        ValueError: it has none.
    """
    found = checkpoints(run)
    expect(len(found) > 0, "train", "resume", f"a run with a checkpoint in {run / CHECKPOINTS}", "none")
    for name in (Path(MODEL) / WEIGHTS_NAME, Path(FACTS)):
        there = (found[-1] / name).is_file()
        expect(there, "train", "resume", f"{name} in the checkpoint", f"none in {found[-1]}")
    return found[-1]


def check_facts(checkpoint: Path, facts: Mapping[str, Any]) -> int:
    """The step of a checkpoint.

    Raises:
        ValueError: its run drew other batches, so that there is no place in the data to go on from.
    """
    saved = read_json(checkpoint / FACTS)
    for name, value in facts.items():
        same = saved.get(name) == value
        expect(same, "train", f"resume: {name}", f"{saved.get(name)}, as in {checkpoint}", value)
    return integer(saved.get("step"), "train", f"{checkpoint / FACTS}: step", 1)
