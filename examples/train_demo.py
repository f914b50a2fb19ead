"""Trains the demo model on the source code of Python's standard library, and its rivals at the same size.

    python examples/train_demo.py --plan fusedkv --out fusedkv_ext/demo_model
    python examples/train_demo.py --plan vanilla --plan fusedkv_lite --plan fusedkv   # compare, keep nothing

Files are split into training and validation by a hash of their path; the tokenizer (byte-level BPE) sees
the training files only. Every plan gets the same data in the same order, the same steps and the same seed.
It wants a GPU; on a CPU, try `--steps 20 --batch 4`.
"""

import argparse
import hashlib
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from fusedkv_ext import FusedKVConfig, FusedKVForCausalLM

VOCAB_SIZE = 4096
END = "<|end|>"  # between files
SHAPE = dict(
    hidden_size=256,
    intermediate_size=768,
    num_layers=10,
    num_attention_heads=4,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def read_sources(folder: Path) -> tuple[list[str], list[str]]:
    """The .py files below a folder, but not what is installed there, as (training, validation) texts."""
    split: tuple[list[str], list[str]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            split[hashlib.sha256(name.encode()).digest()[0] % 20 == 0].append(text)
    return split


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id(END)
    files = ([*encoding.ids, end] for encoding in tokenizer.encode_batch(texts))
    return torch.tensor([token for file in files for token in file])


@torch.no_grad()
def validation_loss(model, tokens: torch.Tensor, context: int, batch: int) -> float:
    """Mean loss in nats a token over consecutive windows of the validation tokens."""
    context = min(context, len(tokens) - 1)
    windows = tokens[: (len(tokens) - 1) // context * context + 1].unfold(0, context + 1, context)
    losses = [
        model(part[:, :-1], part[:, 1:]).item() * len(part) for part in windows.to(torch.int64).split(batch)
    ]
    return sum(losses) / len(windows)


def train(plan: str, train_tokens: torch.Tensor, valid_tokens: torch.Tensor, args) -> FusedKVForCausalLM:
    device = train_tokens.device
    torch.manual_seed(args.seed)
    model = FusedKVForCausalLM(FusedKVConfig(vocab_size=VOCAB_SIZE, plan=plan, **SHAPE)).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warm_up = max(1, args.steps // 20)

    def learning_rate(step: int) -> float:
        done = max(0.0, (step - warm_up) / max(1, args.steps - warm_up))
        return min(1.0, (step + 1) / warm_up) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    run = torch.compile(model) if device.type == "cuda" else model
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(args.context + 1, device=device)
    started = time.perf_counter()
    bar = tqdm(range(args.steps), desc=plan, disable=None, mininterval=1.0)
    for step in bar:
        starts = torch.randint(len(train_tokens) - args.context, (args.batch,), generator=generator)
        windows = train_tokens[starts.to(device)[:, None] + offsets].to(torch.int64)
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step + 1 == args.steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    seconds = time.perf_counter() - started
    model = model.to(torch.bfloat16)  # as it is saved, so that the loss is that of the file
    final = validation_loss(model, valid_tokens, args.context, args.batch)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    tokens = args.steps * args.batch * args.context / 1e6
    print(
        f"{plan:14} {parameters:.2f}M parameters, {tokens:.0f}M tokens in {seconds:.0f} s,"
        f" validation loss {final:.4f}",
        flush=True,
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plan", action="append", help="plan to train; may be given again")
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--out", type=Path, help="save the (last) model and the tokenizer here")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_texts, valid_texts = read_sources(args.source)
    if not train_texts or not valid_texts:
        parser.error(f"--source: expected a folder with many .py files, got {args.source}")
    tokenizer = train_tokenizer(train_texts)
    tokens = [encode(tokenizer, texts).to(torch.int32).to(device) for texts in (train_texts, valid_texts)]
    print(
        f"{args.source}: {len(train_texts)} files, {len(tokens[0]) / 1e6:.2f}M tokens to train on;"
        f" {len(valid_texts)} files, {len(tokens[1]) / 1e6:.2f}M tokens to validate on",
        flush=True,
    )
    for plan in args.plan or ["fusedkv"]:
        model = train(plan, *tokens, args)
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save(str(args.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
