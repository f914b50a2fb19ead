"""`python -m fusedkv_ext demo | generate | env | prepare | train | evaluate | convert | plot`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import fusedkv_ext
from fusedkv_ext import convert, data, evaluate, extension, plots, train
from fusedkv_ext.cache import FP8_SOURCES, PagedKVCache
from fusedkv_ext.checks import expect
from fusedkv_ext.data import TOKENIZER_NAME
from fusedkv_ext.extension import choose_device, why_cpu
from fusedkv_ext.generation import stream
from fusedkv_ext.model import CONFIG_NAME, WEIGHTS_NAME, FusedKVForCausalLM

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_PROMPT = "def fibonacci("
PAGE_SIZE = 16  # small pages: the demo's texts are short, and a half-empty page counts in the bytes shown
COMMANDS = {  # modules with add_arguments and run
    "prepare": data,
    "train": train,
    "evaluate": evaluate,
    "convert": convert,
    "plot": plots,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def styled(text: str, code: str) -> str:
    """Text with an ANSI style where a person reads it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{code}m{text}\033[0m"


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{styled(name.ljust(width), '2')}  {value}")


def environment() -> dict[str, str]:
    """What `env` prints."""
    module, reason = extension.load(), why_cpu()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus]
    return {
        "fusedkv_ext": fusedkv_ext.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "GPU": ", ".join(names) or "none",
        "kernels": "none" if module is None else f"{module.architectures}, for torch {module.torch_version}",
        "ops run on": "CUDA kernels" if reason is None else f"CPU implementations, because {reason}",
    }


class Text:
    """One completion as it streams: the pieces of text, and the figures of the run."""

    def __init__(self, args: argparse.Namespace):
        from tokenizers import Tokenizer

        directory = Path(args.model)
        for name in (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME):
            expect(
                (directory / name).is_file(), args.command, "--model", f"a directory with {name}", directory
            )
        device = choose_device(args.device, args.command)
        on_cuda = device != "cpu"
        dtype = args.dtype or ("bfloat16" if on_cuda else "float32")

        self.args = args
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_NAME))
        except Exception as error:  # the library raises nothing narrower
            name = str(directory / TOKENIZER_NAME)
            raise ValueError(f"{args.command}: {name}: expected a tokenizer, got {error}") from error
        readable = args.prompt.encode(errors="ignore").decode() == args.prompt  # no stray bytes
        expect(readable, args.command, "--prompt", "text in the encoding of the terminal", repr(args.prompt))
        self.prompt = self.tokenizer.encode(args.prompt).ids
        self.model = FusedKVForCausalLM.from_pretrained(directory, device, DTYPES[dtype])
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.cache = self._new_cache()
        name = torch.cuda.get_device_name(device) if on_cuda else f"CPU, threads: {torch.get_num_threads()}"
        self.ran_on = f"{name}, {'CUDA kernels' if on_cuda else 'CPU implementations'}, {dtype}"

    def _new_cache(self) -> PagedKVCache:
        wanted = len(self.prompt) + self.args.max_new_tokens
        tokens = max(1, min(wanted, self.model.config.max_position_embeddings))
        return self.model.new_cache(-(-tokens // PAGE_SIZE), PAGE_SIZE, fp8_sources=self.args.fp8_sources)

    def pieces(self) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        added = self.tokenizer.get_added_tokens_decoder()
        options = {
            "temperature": self.args.temperature,
            "top_k": self.args.top_k,
            "top_p": self.args.top_p,
            "seed": self.args.seed,
            "stop_tokens": [i for i, token in added.items() if token.special],
            "cache": self.cache,
        }
        decoder = DecodeStream()  # holds back the bytes of a character that is not complete yet
        for token in self.prompt:  # without it some tokenizers drop the space before the first new word
            decoder.step(self.tokenizer, token)
        for _, token in stream(self.model, [self.prompt], self.args.max_new_tokens, **options):
            self.tokens.append(token)
            self.times.append(time.perf_counter())
            yield decoder.step(self.tokenizer, token) or ""

    def figures(self) -> dict[str, str]:
        """What `demo` prints below the text."""
        rows = {"tokens": f"{len(self.prompt)} in the prompt, {len(self.tokens)} generated"}
        if len(self.times) > 2:  # on CUDA the second token waits for the capture of the decode step
            rate = (len(self.times) - 2) / (self.times[-1] - self.times[1])
            rows["speed"] = f"{rate:.1f} tokens/s after the second token"
        share = self.cache.nbytes / self.cache.vanilla_nbytes
        vanilla = f"{self.cache.vanilla_nbytes:,} for a cache in every layer"
        rows["KV cache"] = f"{self.cache.nbytes:,} bytes, {share:.0%} of {vanilla}"
        rows["ran on"] = self.ran_on
        return rows


def complete(args: argparse.Namespace) -> None:
    text = Text(args)
    pieces = text.pieces()
    first = next(pieces, "")  # before the prompt is echoed, so that an error stands alone
    print(styled(args.prompt, "1") + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if args.command == "demo":
        print()
        print_table(text.figures())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fusedkv_ext",
        description="Language models whose upper layers share two layers' KV cache.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions, GPU, and where the ops run")
    demo = commands.add_parser("demo", help="complete a prompt, then print speed and cache size")
    demo.add_argument("--prompt", default=DEMO_PROMPT, help=f"text, by default {DEMO_PROMPT!r}")
    generate = commands.add_parser("generate", help="complete a prompt and print nothing else")
    generate.add_argument("--prompt", required=True, help="text")
    for command in (demo, generate):
        add = command.add_argument
        add("--model", metavar="DIR", default=DEMO_MODEL, help="by default the model of the repository")
        add("--max-new-tokens", metavar="N", type=int, default=128, help="128 by default")
        add(
            "--temperature",
            metavar="T",
            type=float,
            default=0.0,
            help="0 takes the most probable token (default: %(default)s)",
        )
        add("--top-k", metavar="K", type=int, help="sample from the K most probable tokens only")
        add(
            "--top-p",
            metavar="P",
            type=float,
            help="sample from the fewest tokens that reach probability P",
        )
        add("--seed", metavar="S", type=int, help="same seed, same text")
        add("--device", help="cpu or cuda; by default cuda where the kernels can run")
        add("--dtype", choices=DTYPES, help="by default bfloat16 on cuda, float32 on cpu")
        add(
            "--fp8-sources",
            choices=FP8_SOURCES,
            default="none",
            help="cache the layers that others read in fp8: as a copy, or only so (default: %(default)s)",
        )
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n")[0].partition(": ")[2]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    # So small a model repeats itself when the most probable token always wins.
    demo.set_defaults(temperature=0.6, top_p=0.9, seed=2)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 for bad input, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        if args.command == "env":
            print_table(environment())
        elif args.command in COMMANDS:
            COMMANDS[args.command].run(args)
        else:
            complete(args)
        sys.stdout.flush()  # here, where a reader that has gone away is expected
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0
