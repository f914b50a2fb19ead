"""`train`: train a model of any plan as a YAML file describes, on one device or, under torchrun, on many.

    python -m fusedkv_ext train config.yaml optimizer.lr=1e-3 model.plan=vanilla
    python -m fusedkv_ext train runs/a/config.yaml resume=true
    torchrun --nproc-per-node 8 -m fusedkv_ext train config.yaml

Weights, gradients and AdamW's moments are float32; with precision bf16 autocast runs the matrix products in
bfloat16. Layers run without a cache, so that what activation checkpointing repeats is arithmetic alone.
Several processes shard all of it with FSDP2 (`fully_shard`).
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from fusedkv_ext import records
from fusedkv_ext.cache import upload
from fusedkv_ext.checkpoint import (
    MODEL,
    Processes,
    check_facts,
    last_checkpoint,
    load_model,
    load_state,
    remove_unfinished,
    save,
)
from fusedkv_ext.checks import expect
from fusedkv_ext.config import write_whole
from fusedkv_ext.data import TOKENIZER_NAME, Batches, TokenFile, spread
from fusedkv_ext.extension import check_device
from fusedkv_ext.model import FusedKVForCausalLM
from fusedkv_ext.train_config import (
    CONFIG_FILE,
    MAX_WARM_UP,
    OptimizerConfig,
    TrainConfig,
    model_config,
    read_config,
    resolved,
)


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Of a step, counted from 0: a line up to lr, then half a cosine down to min_lr at the last step."""
    warm_up = optimizer.warm_up_steps
    warm_up = min(MAX_WARM_UP, steps // 20) if warm_up is None else warm_up
    if step < warm_up:
        return optimizer.lr * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - 1 - warm_up)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def new_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW: matrices decay; vectors and fusion weights do not, and the latter have a rate of their own."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "fusion": []}
    for name, parameter in model.named_parameters():
        kind = "fusion" if ".fusion." in name else "matrices" if parameter.dim() == 2 else "vectors"
        groups[kind].append(parameter)
    options = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if kind == "matrices" else 0.0,
            "lr_scale": config.fusion_lr_scale if kind == "fusion" else 1.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(options, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


class Signals:
    """Catches SIGTERM and SIGINT while in use: the first sets `caught`, the next acts as it always does."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self.before: dict[int, Any] = {}

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self._catch)
            except ValueError:  # only the main thread may
                break
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()


@contextmanager
def processes_of(device: str | None) -> Iterator[tuple[Processes, torch.device]]:
    """This process among torchrun's, with its device; alone without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(kind, "train", "device")
    there = kind == "cpu" or torch.cuda.is_available()
    expect(there, "train", "device", "cpu, because no GPU is visible", kind)
    if world == 1:
        yield Processes(), torch.device(kind)
        return
    chosen = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    expect(chosen.type == kind, "train", "device", "cpu or cuda under torchrun", kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world), chosen
    finally:
        dist.destroy_process_group()


def _checkpointed(forward: Callable[..., Any], *arguments: Any) -> Any:
    """Activation checkpointing in a frame of ours: torch.compile does not enter `checkpoint` by itself."""
    # Nothing in a layer draws random numbers.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)


def _shard(model: FusedKVForCausalLM, device: torch.device, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The values that a storage layer shares are a view of its projection; nothing writes to them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@dataclass
class Outcome:
    """How a run ended: steps done, its last checkpoint, and the signal that stopped it, if one did."""

    step: int
    checkpoint: Path
    signal: str | None


class Trainer:
    """One process of a run; `run` does the steps that remain.

    Args:
        config: of the run.
        processes, device: from processes_of.

    Raises:
        ValueError: a config that does not fit its data, model or run directory; nothing is written then.
        FileNotFoundError: token files or a model that are not there.
    """

    def __init__(self, config: TrainConfig, processes: Processes, device: torch.device):
        self.config, self.processes, self.device = config, processes, device
        self.directory = Path(config.run_dir)
        self.bf16 = config.precision == "bf16" or (config.precision is None and device.type == "cuda")
        world, context = processes.world, config.data.context
        share = config.batch // world
        self.micro_batch = share if config.micro_batch is None else config.micro_batch
        wanted = f"a multiple of {world} processes x micro_batch {self.micro_batch}"
        fits = share > 0 and config.batch % (world * self.micro_batch) == 0
        expect(fits, "train", "batch", wanted, config.batch)

        train = TokenFile(config.data.train)
        self.last_checkpoint = processes.first(self._open_directory)
        section = dict(config.model)
        if self.last_checkpoint is not None and "from" in section:
            section["from"] = self.last_checkpoint / MODEL  # the model that it began with may be gone
        self.model_config = model_config(section, train.header.vocab_size)
        longest, vocab_size = self.model_config.max_position_embeddings, self.model_config.vocab_size
        wanted = f"at most model.max_position_embeddings, {longest}"
        expect(context <= longest, "train", "data.context", wanted, context)
        self.batches = Batches(
            train, context, config.batch, vocab_size, config.seed, processes.rank, processes.world
        )
        self.validation = None if config.data.validation is None else TokenFile(config.data.validation)
        if self.validation is not None:
            self.validation.check_vocabulary(vocab_size)
            count = self.validation.num_windows(context)
            wanted = f"at least {world} windows of context {context}, one a process"
            expect(count >= world, "train", str(self.validation.path), wanted, count)
        tokenizer = train.path.with_name(TOKENIZER_NAME)
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.facts = {
            "data": {"num_tokens": len(train), "sha256": train.header.sha256},
            "context": context,
            "batch": config.batch,
            "seed": config.seed,
        }

        self.step = 0 if self.last_checkpoint is None else check_facts(self.last_checkpoint, self.facts)
        self.stop = min(config.steps, config.stop_at or config.steps)
        wanted = f"more than {self.step}, the step of {self.last_checkpoint}"
        expect(self.step < self.stop, "train", "steps or stop_at", wanted, self.stop)

        torch.manual_seed(config.seed)
        if self.last_checkpoint is not None:
            model = load_model(self.last_checkpoint, self.model_config)
        elif "from" in config.model:
            model = FusedKVForCausalLM.from_pretrained(config.model["from"], dtype=torch.float32)
        else:
            model = FusedKVForCausalLM(self.model_config)
        self.model = self._set_up(model)
        self.optimizer = new_optimizer(self.model, config.optimizer, fused=device.type == "cuda")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # since the last logged step
        self.loss_steps = torch.zeros((), dtype=torch.int64)
        self.failure = torch.full((3,), -1.0, dtype=torch.float64, device=device)  # step, loss, gradient norm
        if self.last_checkpoint is not None:
            self._restore()
        self.records: records.Records | None = None
        processes.first(self._open_records)
        self.flops = records.flops_per_token(self.model_config, context)
        self.peak = records.peak_flops(device) if config.peak_tflops is None else config.peak_tflops * 1e12

    def _open_directory(self) -> Path | None:
        """The checkpoint to go on from; None for a new run, in a directory that holds nothing."""
        if self.config.resume:
            return last_checkpoint(self.directory)
        held = self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir()))
        wanted = "a new or empty directory, or resume=true"
        expect(not held, "train", "run_dir", wanted, f"{self.directory}, which holds a run or other files")
        return None

    def _set_up(self, model: FusedKVForCausalLM) -> FusedKVForCausalLM:
        """Activation checkpointing, compilation and sharding, in this order."""
        config, several = self.config, self.processes.world > 1
        compiled = self.device.type == "cuda" if config.compile is None else config.compile
        if not several:
            model.to(self.device)
        model.recompute_fusion(config.recompute_fusion)
        for layer in model.model.layers:
            if config.activation_checkpointing:
                layer.forward = functools.partial(_checkpointed, layer.forward)
            if compiled:
                # Each alone: layers of a kind share what was compiled, which takes a part of the time that
                # the whole model would, and sharding gathers and frees weights between them.
                layer.compile(dynamic=False)
        if compiled:
            # Without it the logits would pass through memory several times, in float32.
            model.loss = torch.compile(model.loss, dynamic=False)
            # Layers differ in the layers that they read, and training from validation.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 2 * self.model_config.num_layers)
        if several:
            _shard(model, self.device, self.processes.world)
        return model

    def _extra(self) -> dict[str, Tensor]:
        """What else a run needs to go on exactly: RNG states, and the losses not logged yet."""
        state = {
            "rng.cpu": torch.get_rng_state(),
            "loss_sum": self._mean_loss_sum(),
            "loss_steps": self.loss_steps,
        }
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore(self) -> None:
        state = load_state(self.last_checkpoint, self.model, self.optimizer, self._extra(), self.processes)
        torch.set_rng_state(state["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng.cuda"], self.device)
        # Process 0 brings the share of all, so that any number of them can go on.
        share = self.processes.world if self.processes.rank == 0 else 0
        self.loss_sum = state["loss_sum"].to(self.device) * share
        self.loss_steps = state["loss_steps"]

    def _mean_loss_sum(self) -> Tensor:
        """The mean of the processes' loss_sum, on the CPU; every process must call it."""
        return self.processes.total(self.loss_sum.cpu()) / self.processes.world

    def _open_records(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.directory)
        layers = self.model_config.num_layers
        self.records = records.Records(self.directory, layers, self.config.tensorboard, self.step)
        write_whole(self.directory / CONFIG_FILE, resolved(self.config, self.model_config).encode())

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.batch * self.config.data.context

    def _loss(self, windows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(windows[:, :-1], windows[:, 1:])

    def train_step(self, log: bool) -> dict[str, Any] | None:
        """One step of the optimizer; with log the learning rate and the norms of the gradients."""
        config, several = self.config, self.processes.world > 1
        rate = learning_rate(self.step, config.steps, config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        parts = upload(self.batches(self.step), self.device).split(self.micro_batch)
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            if several:
                self.model.set_requires_gradient_sync(i + 1 == len(parts))
            loss = self._loss(part) / len(parts)
            loss.backward()
            total += loss.detach()
        grads = records.gradients(self.model)
        norm = nn.utils.get_total_norm(grads)
        whole = records.full(norm)
        found = None
        if log:
            found = {"lr": rate, "layers": records.layer_norms(self.model), "grad_norm": whole}
            found["projections"] = records.projection_norms(self.model)
        if config.optimizer.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), config.optimizer.grad_clip, whole)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # On the device, so that no step waits for it; read before anything is logged or saved.
        failed = ~(total.isfinite() & whole.isfinite()) & (self.failure[0] < 0)
        now = torch.stack([torch.full_like(total, self.step), total, whole]).double()
        self.failure = torch.where(failed, now, self.failure)
        self.loss_sum += total
        self.loss_steps += 1
        return found

    def check_finite(self) -> None:
        """Raise FloatingPointError if a step since the last checkpoint had no finite loss and gradient."""
        step, loss, norm = self.failure.tolist()
        if self.processes.any(step >= 0):
            kept = f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint is None:
                kept = "there is no checkpoint before it"
            wanted = "expected a finite loss and gradient norm"
            raise FloatingPointError(f"train: step {step:.0f}: {wanted}, got {loss} and {norm}; {kept}")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over windows of the validation file at even distances, the same at every call."""
        config, processes = self.config, self.processes
        count, most = self.validation.num_windows(config.data.context), config.validation_windows
        most = count if most is None else min(max(most, processes.world), count)
        # Every process takes as many, because sharded layers wait for each other, and all batches are of one
        # size where they can be, because each size is compiled anew.
        even = processes.world * self.micro_batch
        even = even if most >= even else processes.world
        numbers = spread(count, most - most % even)
        mine, total = numbers[processes.rank :: processes.world], torch.zeros((), dtype=torch.float64)
        for start in range(0, len(mine), self.micro_batch):
            part = mine[start : start + self.micro_batch]
            windows = self.validation.windows(part, config.data.context, self.model_config.vocab_size)
            total += self._loss(upload(windows, self.device)).double().cpu() * len(part)
        return float(processes.total(total)) / len(numbers)

    def _validate(self, say: Callable[[str], None]) -> None:
        fusion = records.fusion_statistics(self.model)
        if self.records is not None:
            self.records.add_fusion(self.step, fusion)
        if self.validation is None:
            return
        loss = self.validate()
        if self.records is not None:
            self.records.add_validation(self.step, self.tokens, loss)
        say(f"step {self.step}: validation loss {loss:.4f}")

    def _save(self) -> None:
        if self.records is not None:
            self.records.flush()
        self.last_checkpoint = save(
            self.directory,
            self.step,
            self.model,
            self.optimizer,
            self._extra(),
            self.facts,
            self.processes,
            self.config.keep_checkpoints,
            self.tokenizer,
        )

    def _log(self, found: dict[str, Any], steps: int, started: float) -> dict[str, float | None]:
        """A row of metrics.csv; its loss is the mean of the steps since the row before.

        found: what train_step gave. steps: done since the time `started`.
        """
        self.check_finite()  # which waits for the device
        seconds = time.perf_counter() - started
        loss = self._mean_loss_sum() / self.loss_steps
        rate = steps * self.config.batch * self.config.data.context / seconds
        known = self.peak is not None and self.bf16
        on_cuda = self.device.type == "cuda"
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": float(loss),
            "lr": found["lr"],
            "grad_norm": float(found["grad_norm"]),
            "tokens_per_s": rate,
            "mfu": rate * self.flops / (self.peak * self.processes.world) if known else None,
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9 if on_cuda else None,
            **found["layers"],
        }
        if self.records is not None:
            self.records.add_metrics(row, found["projections"])
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        return row

    def run(self) -> Outcome:
        """Train to the last step, to stop_at or to a signal, and save.

        Raises:
            FloatingPointError: a loss or gradient that is not finite, with the step and the last checkpoint.
            OSError: a checkpoint could not be written; the earlier ones are whole.
            ValueError: an id beyond the vocabulary in a batch.
        """
        config = self.config
        if self.device.type == "cuda":  # what this process did before is no part of the run's peak
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self.processes.rank == 0
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=self.directory.name,
            unit="step",
            disable=None if first else True,
        )

        def say(text: str) -> None:
            if first:
                bar.write(text) if not bar.disable else print(text, flush=True)

        with Signals() as signals, bar:
            try:
                return self._run(signals, bar, say)
            finally:
                if self.records is not None:
                    self.records.close()

    def _run(self, signals: Signals, bar: Any, say: Callable[[str], None]) -> Outcome:
        config = self.config
        if self.step == 0:
            self._validate(say)
        steps, started = 0, time.perf_counter()
        while True:
            last = self.step + 1 == self.stop
            # Not at stop_at: a run in two parts logs what one in a single part does.
            log = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
            found = self.train_step(log)
            steps += 1
            bar.update()
            if found is not None:
                row = self._log(found, steps, started)
                steps, started = 0, time.perf_counter()
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if bar.disable:
                    rate = f"{row['tokens_per_s']:.0f} tokens/s"
                    say(f"step {self.step}: loss {row['loss']:.4f}, gradient {row['grad_norm']:.3f}, {rate}")
            stopped = self.processes.any(signals.caught is not None)
            look = self.step % config.validate_every == 0 or self.step == config.steps
            keep = self.step % config.checkpoint_every == 0 or last or stopped
            if look or keep:
                self.check_finite()  # which waits for the device: what follows is no time of training
                paused = time.perf_counter()
                if look:
                    self._validate(say)
                if keep:
                    self._save()
                started += time.perf_counter() - paused
            if last or stopped:
                name = signals.caught or ("a signal to another process" if stopped else None)
                return Outcome(self.step, self.last_checkpoint, None if last else name)


def train(config: TrainConfig) -> Outcome:
    """Do a run, or what remains of it.

    Raises:
        ValueError, FileNotFoundError, FloatingPointError, OSError: see Trainer and Trainer.run.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which no result depends on
    with processes_of(config.device) as (processes, device):
        return Trainer(config, processes, device).run()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m fusedkv_ext train`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as in examples/train.yaml")
    wanted = "over those of the file, as in steps=100 model.plan=vanilla resume=true"
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=wanted)


def run(args: argparse.Namespace) -> None:
    """`python -m fusedkv_ext train`."""
    outcome = train(read_config(args.config, args.overrides))
    if int(os.environ.get("RANK", 0)) == 0:
        why = f", stopped by {outcome.signal}; go on with resume=true" if outcome.signal else ""
        print(f"step {outcome.step}: {outcome.checkpoint}{why}", flush=True)
