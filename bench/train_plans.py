"""Trains every plan on the text of the installed Python packages, and tabulates the results; bench/README.md.

    python bench/train_plans.py prepare                    # token files from that text
    python bench/train_plans.py run vanilla fusedkv lite   # one after the other; all of them without names
    python bench/train_plans.py uptrain                    # convert the run "vanilla" and train on
    python bench/train_plans.py speed                      # tokens/s of each plan at the 332m preset
    python bench/train_plans.py collect RESULTS            # small files and tables, merged with earlier ones

train_plans.yaml holds what the runs share; KEY=VALUE replaces a key of it. --smoke makes everything tiny.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import shutil
import statistics
import sys
import sysconfig
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from collect_plans import RESULT, TEXT, collect
from torch.utils.cpp_extension import CUDA_HOME

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM, cli, data
from fusedkv_ext.checkpoint import checkpoints, step_of
from fusedkv_ext.checks import expect
from fusedkv_ext.plots import METRICS, VALIDATION
from fusedkv_ext.train import Trainer, processes_of, train
from fusedkv_ext.train_config import TrainConfig, model_config, read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "bench/train_plans.yaml"
SUFFIXES = (".py", ".pyi", ".pyx", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".cu", ".inl", ".c", ".cpp")
LONGEST = 1 << 20  # characters; larger files are tables and generated code
WARM_UP, TIMED = 3, 5  # steps of `speed`
SMOKE = [
    "model={hidden_size: 32, intermediate_size: 64, num_layers: 4, num_attention_heads: 4, num_kv_heads: 4,"
    " head_dim: 8, max_position_embeddings: 64, tie_word_embeddings: true}",
    *("data.context=32", "steps=20", "batch=4", "micro_batch=2", "optimizer.warm_up_steps=2", "device=cpu"),
    *("validate_every=10", "checkpoint_every=20", "validation_windows=8"),
]


@dataclass(frozen=True)
class Recipe:
    """What sets a run apart: its plan, the start of its fusion weights, its seed, a divisor of the KV heads.

    uptrain: convert the run "vanilla" with init as `convert --start` takes it, and train on.
    """

    plan: str
    init: str = "lite"
    seed: int = 0
    heads_divisor: int = 1
    uptrain: bool = False


RUNS = {
    "vanilla": Recipe("vanilla"),
    "fusedkv": Recipe("fusedkv"),
    "lite": Recipe("fusedkv_lite"),
    "gqa": Recipe("vanilla", heads_divisor=2),
    "cla2": Recipe("cla"),
    "yoco": Recipe("yoco"),
    "lite-rev": Recipe("fusedkv_lite_rev"),
    "lite-learnable": Recipe("fusedkv_lite_learnable"),
    "fusedkv-standard": Recipe("fusedkv", "standard"),
    "fusedkv-equivalent": Recipe("fusedkv", "equivalent"),
    "fusedkv-n4": Recipe("fusedkv:4"),  # keys and values in 4 of the 12 layers
    "fusedkv-n8": Recipe("fusedkv:8"),
    "dense-fusion": Recipe("dense_fusion", "uniform"),  # a probe: it must not begin with an answer
    "vanilla-seed1": Recipe("vanilla", seed=1),
    "fusedkv-seed1": Recipe("fusedkv", seed=1),
    "lite-seed1": Recipe("fusedkv_lite", seed=1),
    "cla2-seed1": Recipe("cla", seed=1),
}
UPTRAINED = {  # seed 2: another order of the data. Vanilla, trained on as long, is what to compare with.
    "uptrain-vanilla": Recipe("vanilla", "lite", 2, uptrain=True),
    "uptrain-fusedkv": Recipe("fusedkv", "least-squares", 2, uptrain=True),
    "uptrain-fusedkv-lite-start": Recipe("fusedkv", "lite", 2, uptrain=True),
    "uptrain-lite": Recipe("fusedkv_lite", "lite", 2, uptrain=True),
    "uptrain-lite-learnable": Recipe("fusedkv_lite_learnable", "least-squares", 2, uptrain=True),
}
EACH_PLAN = ("vanilla", "gqa", "cla2", "yoco", "lite", "lite-learnable", "fusedkv")
SPEED = {f"speed-{name}": RUNS[name] for name in EACH_PLAN}


def documents(folders: dict[str, Path]) -> list[data.Document]:
    """Text files below folders as (label/path, text), each content once, in an order drawn from the names."""
    found: dict[bytes, data.Document] = {}
    for label, folder in folders.items():
        for name, text in data.local_documents([folder], SUFFIXES):
            # One folder may lie in another, and this package changes from day to day.
            left_out = name.startswith(("site-packages/", "dist-packages/", "fusedkv_ext"))
            if len(text) <= LONGEST and not left_out:
                found.setdefault(hashlib.sha256(text.encode()).digest(), (f"{label}/{name}", text))
    return sorted(found.values(), key=lambda document: hashlib.sha256(document[0].encode()).digest())


def prepare(args: argparse.Namespace) -> None:
    """WORK/data, the token files, and WORK/text.json, which says what they were made of."""
    folders = {"packages": Path(sysconfig.get_path("purelib")), "python": Path(sysconfig.get_path("stdlib"))}
    if CUDA_HOME is not None and (Path(CUDA_HOME) / "include").is_dir():
        folders["cuda"] = Path(CUDA_HOME) / "include"
    if args.text or args.smoke:
        folders = {path.name: path for path in args.text or [ROOT / "docs", ROOT / "python_tests"]}
    texts = documents(folders)
    tokenizer = data.load_tokenizer(args.tokenizer) if args.tokenizer else None
    size, share = (512, 0.2) if args.smoke else (args.vocab_size, 0.01)
    options = dict(validation=share, source=f"{len(texts)} files of {', '.join(folders)}", progress=None)
    headers = data.prepare(args.work / "data", lambda: texts, tokenizer, size, **options)

    parts = Counter({"files": len(texts)})
    for name, text in texts:
        part = "/".join(name.split("/")[: 2 if name.startswith("packages/") else 1])
        parts["characters"] += len(text)
        parts[f"characters of {part}"] += len(text)
    installed = {f"{x.name} {x.version}" for x in importlib.metadata.distributions()}
    record = {Path(name).stem: asdict(header) for name, header in headers.items()}
    record |= {"text": parts, "installed": sorted(installed)}
    (args.work / TEXT).write_text(json.dumps(record, indent=1) + "\n")
    for name, header in headers.items():
        print(f"{name}: {header.num_tokens:,} tokens of {header.num_documents:,} files", flush=True)


def changes_of(name: str, recipe: Recipe, args: argparse.Namespace) -> list[str]:
    """What a run changes in the config."""
    sides = [f"data.{side}={args.work / 'data' / side}.bin" for side in ("train", "validation")]
    changes = [*(SMOKE if args.smoke else ()), *args.changes, *sides, f"run_dir={args.work / name}"]
    heads = read_config(CONFIG, changes).model["num_kv_heads"] // recipe.heads_divisor
    init = "lite" if recipe.uptrain else recipe.init
    model = [f"model.plan={recipe.plan}", f"model.fusion_init={init}", f"model.num_kv_heads={heads}"]
    return [*changes, *model, f"seed={recipe.seed}"]


def converted(name: str, recipe: Recipe, config: TrainConfig, work: Path) -> Path:
    """The model directory that an up-trained run begins with."""
    start, source = work / f"{name}-start", work / "vanilla"
    wanted = f"the finished run vanilla in {work}"
    expect((source / RESULT).is_file(), "train_plans", "uptrain", wanted, "none")
    if not start.exists():
        options = ["--plan", recipe.plan, "--start", recipe.init, "--calibration", config.data.train]
        context = config.data.context  # a batch of training calibrates
        options += ["--context", str(context), "--tokens", str(config.batch * context), "--batch", "4"]
        options += [] if config.device is None else ["--device", config.device]
        failed = cli.main(["convert", str(source / "model"), str(start), *options])
        expect(not failed, "train_plans", name, "convert to end well", f"exit code {failed}")
    return start


def facts(name: str, recipe: Recipe, config: TrainConfig, model: FusedKVConfig) -> dict[str, Any]:
    """The columns that all tables begin with."""
    with torch.device("meta"):
        made = FusedKVForCausalLM(model)
    parameters, embedding = sum(x.numel() for x in made.parameters()), made.model.embed_tokens.weight.numel()
    shared = json.dumps([config.data.context, config.steps, config.batch, asdict(config.optimizer)])
    stored = len(model.plan.storage_layers)
    learned = any(".fusion." in name for name in made.state_dict())
    return {
        "name": name,
        "plan": recipe.plan,
        "seed": config.seed,
        "init": recipe.init if learned else "",  # of the fusion weights
        "parameters": parameters,
        "non_embedding": parameters - embedding,
        "kv_bytes_per_token": 2 * 2 * stored * model.num_kv_heads * model.head_dim,  # keys, values; bf16
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "hyperparameters": hashlib.sha256(shared.encode()).hexdigest()[:8],  # equal where they are
    }


def train_one(name: str, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any] | None:
    """Train a run, or what remains of it; its row of the table, or None if a signal stopped it."""
    changes, directory = changes_of(name, recipe, args), args.work / name
    config = read_config(CONFIG, changes)
    if recipe.uptrain:
        start, steps = converted(name, recipe, config, args.work), max(2, config.steps // 10)
        changes += [f"model={{from: {start}}}", f"steps={steps}", f"validate_every={steps // 2}"]
        changes += [f"optimizer.lr={config.optimizer.lr / 2}", f"optimizer.warm_up_steps={steps // 10}"]
        config = read_config(CONFIG, changes)
    saved = checkpoints(directory)
    if not saved:  # of a run that failed before its first checkpoint
        shutil.rmtree(directory, ignore_errors=True)
    if not saved or step_of(saved[-1]) < config.steps:
        outcome = train(read_config(CONFIG, [*changes, f"resume={bool(saved)}"]))
        if outcome.signal is not None:
            return None
    if recipe.uptrain:
        shutil.copyfile(start / "conversion.csv", directory / "conversion.csv")
    metrics, validation = (list(csv.DictReader((directory / x).open())) for x in (METRICS, VALIDATION))
    tokens, rates = [int(row["tokens"]) for row in metrics], [float(row["tokens_per_s"]) for row in metrics]
    losses, file = [float(row["loss"]) for row in validation], data.TokenFile(config.data.train)
    times = [(now - before) / rate for now, before, rate in zip(tokens, [0, *tokens], rates, strict=False)]
    found = facts(name, recipe, config, model_config(config.model, file.header.vocab_size))
    found |= {
        "tokens": tokens[-1],
        "epochs": round(tokens[-1] / len(file), 3),
        "steps": config.steps,
        "seconds": round(sum(times), 1),  # compilation included, validation not
        "tokens_per_s": round(statistics.median(rates)),
        "mfu": metrics[-1]["mfu"],
        "peak_memory_gb": metrics[-1]["peak_memory_gb"],
        "validation_loss": losses[-1],
    }
    return found | ({"loss_before": losses[0], "loss_after_half": losses[1]} if recipe.uptrain else {})


def time_one(name: str, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """A few steps of a plan at the 332m preset and context 8192, after a warm-up; its row of the table."""
    changes = [*changes_of(name, recipe, args), "data.validation=null"]
    if not args.smoke:
        heads = FusedKVConfig.preset("332m").num_kv_heads // recipe.heads_divisor
        changes += [f"model={{preset: 332m, plan: {recipe.plan}, num_kv_heads: {heads}}}"]
        changes += ["data.context=8192", "batch=16", "micro_batch=4"]
    shutil.rmtree(args.work / name, ignore_errors=True)  # of one that failed
    config = read_config(CONFIG, changes)
    with processes_of(config.device) as (processes, device):
        trainer = Trainer(config, processes, device)
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                trainer.check_finite()  # which waits for the device
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                begun = time.perf_counter()
            trainer.train_step(False)
        trainer.check_finite()
        rate = TIMED * config.batch * config.data.context / (time.perf_counter() - begun)
    return {
        **facts(name, recipe, config, trainer.model_config),
        "context": config.data.context,
        "batch": config.batch,
        "micro_batch": config.micro_batch,
        "tokens_per_s": round(rate),
        "mfu": rate * trainer.flops / trainer.peak if trainer.peak and trainer.bf16 else "",
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else "",
    }


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process has what a lock file stands for, until the block or the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def do_all(
    recipes: dict[str, Recipe], do: Callable[..., dict[str, Any] | None], args: argparse.Namespace
) -> int:
    """Do those of the recipes that are named and not done, past those that fail; return the exit code.

    Several processes may share a folder, one a GPU: each takes what no other has.
    """
    unknown = [name for name in args.names if name not in recipes]
    expect(not unknown, "train_plans", "names", " or ".join(recipes), unknown)
    data.TokenFile(args.work / "data" / data.TRAIN)  # for its error, once
    begun, failed = time.monotonic(), []
    for name in args.names or recipes:
        with claim(args.work / f".{name}.lock") as mine:
            at, done = time.monotonic(), (args.work / name / RESULT).is_file()
            late = at - begun > 60 * args.minutes
            state = "done before" if done else "no time left" if late else "begins"
            print(f"{name}: {state if mine else 'another process is at it'}", flush=True)
            if done or late or not mine:
                continue
            try:
                found = do(name, recipes[name], args)
                if found is None:
                    print(f"{name}: stopped by a signal; the same command goes on with it")
                    return 1
                with claim(args.work / ".results.lock", wait=True):
                    (args.work / name / RESULT).write_text(json.dumps(found, indent=1) + "\n")
                    if args.into is not None:
                        collect(args.work, args.into)
            except Exception:
                traceback.print_exc()
                failed.append(name)
            gc.collect()  # a model and its optimizer are full of cycles
            torch.cuda.empty_cache()
            torch._dynamo.reset()  # each compiles as if it were alone, but for the caches on the disk
            print(f"{name}: {time.monotonic() - at:.0f} s with all that it took", flush=True)
    if failed:
        print(f"failed: {' '.join(failed)}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("command", choices=("prepare", "run", "uptrain", "speed", "collect"))
    add("items", nargs="*", metavar="NAME|KEY=VALUE", help="runs, keys of the config, or collect's folder")
    add("--work", type=Path, default=Path("runs/plans"), help="of data and runs (default: %(default)s)")
    add("--into", type=Path, metavar="RESULTS", help="collect there after every run")
    add("--minutes", type=float, default=float("inf"), help="begin no run later than so long after the start")
    add("--smoke", action="store_true", help="tiny models on the CPU, on the text of this repository")
    add("--text", type=Path, nargs="+", help="prepare: folders, in place of the installed packages")
    add("--tokenizer", help="prepare: take this one, as an earlier prepare made it")
    add("--vocab-size", type=int, default=16384, help="prepare: of the tokenizer (default: %(default)s)")
    args = parser.parse_intermixed_args(arguments)
    args.changes = [item for item in args.items if "=" in item]
    args.names = [item for item in args.items if "=" not in item]
    try:
        if args.command == "prepare":
            prepare(args)
        elif args.command == "collect":
            expect(len(args.names) == 1, "collect", "RESULTS", "one folder", args.names)
            collect(args.work, Path(args.names[0]))
        else:
            todo = {"run": (RUNS, train_one), "uptrain": (UPTRAINED, train_one), "speed": (SPEED, time_one)}
            return do_all(*todo[args.command], args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
