"""`prepare`: make token files from local text or from a Hugging Face dataset.

A token file is NAME.bin, little-endian uint16 or uint32 ids one after the other, with a header beside it,
NAME.json. `prepare` makes a folder of two, train and validation, with the tokenizer:

    python -m fusedkv_ext prepare OUT --text FOLDER
    python -m fusedkv_ext prepare OUT --dataset HuggingFaceFW/fineweb-edu --max-tokens 1000000000

`Batches`, for training, cuts a file into windows of `context` tokens and takes them in an order that the seed
decides, every window once an epoch. A window may hold the end of one document and the start of the next, with
the end token between them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusedkv_ext.checks import expect, integer
from fusedkv_ext.config import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
TRAIN, VALIDATION, TOKENIZER_NAME = "train.bin", "validation.bin", "tokenizer.json"
DATASET, SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
END = "<|end|>"  # between documents, in a tokenizer trained here
END_TOKENS = (END, "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")
VOCAB_SIZE = 32768
TOKENIZER_CHARACTERS = 200_000_000  # a tokenizer is trained on the first so many
BATCH_CHARACTERS = 1 << 24  # encoded at a time; many, so that one long document keeps no core waiting
Document = tuple[str, str]  # a name, by which it falls to one side of the split, and the text


# Token files


@dataclass(frozen=True)
class Header:
    """NAME.json: what the ids are, and a checksum by which a resumed run knows its data again."""

    dtype: str
    num_tokens: int
    num_documents: int
    max_token: int
    vocab_size: int
    sha256: str
    source: str


class TokenFile:
    """A memory-mapped token file.

    Args:
        path: of NAME.bin, with NAME.json beside it.

    Attributes:
        header: a Header.
        tokens: the ids, uint16 or uint32 [num_tokens], read from the disk as they are touched.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: a header with other fields, or a file of another length than it says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = self.path.with_suffix(".json")
        for file in (self.path, header):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: expected a file that prepare wrote, got none")
        values, fields = read_json(header), set(Header.__dataclass_fields__)
        wanted = f"a token file's header with the fields {sorted(fields)}"
        expect(set(values) == fields, "TokenFile", str(header), wanted, sorted(values))
        self.header = Header(**values)
        known = isinstance(self.header.dtype, str) and self.header.dtype in DTYPES
        expect(known, "TokenFile", f"{header}: dtype", " or ".join(DTYPES), repr(self.header.dtype))
        dtype, size = DTYPES[self.header.dtype], self.path.stat().st_size
        for name in ("num_tokens", "max_token", "vocab_size"):
            integer(values[name], "TokenFile", f"{header}: {name}", 0)
        whole = size == self.header.num_tokens * dtype.itemsize
        wanted = f"{self.header.num_tokens} tokens of {self.header.dtype}, as its header says"
        expect(whole, "TokenFile", str(self.path), wanted, f"{size} bytes")
        expect(size > 0, "TokenFile", str(self.path), "at least one token", 0)
        self.tokens = np.memmap(self.path, dtype, mode="r")

    def __len__(self) -> int:
        return self.header.num_tokens

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if the header tells of an id that a vocabulary of this size lacks."""
        fits = self.header.max_token < vocab_size
        wanted = f"token ids 0 to {vocab_size - 1}, the vocabulary of the model"
        expect(fits, "TokenFile", str(self.path), wanted, self.header.max_token)

    def num_windows(self, context: int) -> int:
        """Windows of `context` tokens, each with one more to predict; they overlap in that one.

        Raises:
            ValueError: not even one.
        """
        count = (len(self) - 1) // context
        wanted = f"at least {context + 1} tokens, a window of context {context} and its last target"
        expect(count > 0, "TokenFile", str(self.path), wanted, len(self))
        return count

    def windows(self, numbers: Sequence[int], context: int, vocab_size: int) -> Tensor:
        """Windows by number, int64 [len(numbers), context + 1] on the CPU.

        Raises:
            ValueError: an id beyond the vocabulary, which on a GPU would end the process.
        """
        rows = np.stack([self.tokens[i * context : (i + 1) * context + 1] for i in numbers])
        if rows.max() >= vocab_size:
            row, column = (int(x[0]) for x in np.nonzero(rows >= vocab_size))
            where = f"{self.path}, token {numbers[row] * context + column}"
            wanted = f"an id from 0 to {vocab_size - 1}, the vocabulary of the model"
            expect(False, "TokenFile", where, wanted, rows[row, column])
        return torch.from_numpy(rows.astype(np.int64))


def spread(count: int, most: int | None) -> list[int]:
    """`most` of the numbers below count at even distances; all of them when there are no more."""
    if most is None or most >= count:
        return list(range(count))
    return [i * count // most for i in range(most)]


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def _order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_windows)


class Batches:
    """The training data, step by step: a function of the step alone, so that a run can go on anywhere.

    Sample g of the run, counted over all steps, is window g mod n of epoch g div n, in an order drawn from
    (seed, epoch). Step s takes the samples s * batch to (s + 1) * batch - 1, of which each process takes an
    equal run: any number of processes sees the same batches.

    Args:
        file: the tokens.
        context: tokens a sequence.
        batch: sequences a step, in all processes together.
        vocab_size: of the model.
        seed: of the order.
        rank, world: this process and how many there are; batch is a multiple of world.

    Raises:
        ValueError: a file too short for one window, or with ids beyond the vocabulary.
    """

    def __init__(
        self,
        file: TokenFile,
        context: int,
        batch: int,
        vocab_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        file.check_vocabulary(vocab_size)
        self.num_windows = file.num_windows(context)
        self.file, self.context, self.batch, self.vocab_size = file, context, batch, vocab_size
        self.seed, self.rank, self.share = seed, rank, batch // world

    def numbers(self, step: int) -> list[int]:
        """The windows of this process in a step (counted from 0)."""
        first = step * self.batch + self.rank * self.share
        samples = (divmod(g, self.num_windows) for g in range(first, first + self.share))
        return [int(_order(self.num_windows, self.seed, epoch)[i]) for epoch, i in samples]

    def __call__(self, step: int) -> Tensor:
        """This process's sequences of a step, int64 [batch / world, context + 1]."""
        return self.file.windows(self.numbers(step), self.context, self.vocab_size)


# Text


def local_documents(
    paths: Sequence[str | Path], suffixes: Sequence[str] | None = None, skipped: list[Path] | None = None
) -> Iterator[Document]:
    """Files, and the files below folders in the order of their names, as (path in the folder, text).

    Args:
        paths: files or folders; hidden files and folders below them are left out.
        suffixes: take only names that end so.
        skipped: takes the files that are not UTF-8 text.

    Raises:
        FileNotFoundError: a path that is not there.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"prepare: --text: expected files or folders, got {path}")
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            name = file.name if file == path else file.relative_to(path).as_posix()
            hidden = file != path and any(part.startswith(".") for part in Path(name).parts)
            if hidden or not file.is_file() or not name.endswith(tuple(suffixes or ("",))):
                continue
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError:
                if skipped is not None:
                    skipped.append(file)
                continue
            if text.strip():
                yield name, text


def dataset_documents(
    name: str, subset: str | None = None, split: str = "train", column: str = "text"
) -> Iterator[Document]:
    """The rows of a Hugging Face dataset as they are streamed: (id, or the text where there is none, text).

    Raises:
        ValueError: the package `datasets` is missing, or the dataset has no such column of text.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        wanted = "expected the package datasets, which `pip install datasets` adds"
        raise ValueError(f"prepare: --dataset: {wanted}") from error
    for row in load_dataset(name, subset, split=split, streaming=True):
        text = row.get(column)
        got = f"the columns {sorted(row)}" if text is None else type(text).__name__
        expect(isinstance(text, str), "prepare", "--column", f"a column of text, {column!r}", got)
        if text.strip():
            yield str(row.get("id", text)), text


def is_validation(name: str, share: float) -> bool:
    """Whether a document is one to validate on: a hash of its name decides, so it always falls alike."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with the end token `<|end|>`; small texts may give fewer than vocab_size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab_size = integer(vocab_size, "prepare", "--vocab-size", len(alphabet) + 1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer:
    """From a tokenizer.json, a folder that holds one, or a repository of the Hugging Face hub.

    Raises:
        ValueError: none of them can be read as a tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(name)
    path = path / TOKENIZER_NAME if path.is_dir() else path
    try:
        return Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(str(name))
    except Exception as error:  # the library raises nothing narrower
        wanted = "expected a tokenizer.json, a folder with one, or a name on the Hugging Face hub"
        raise ValueError(f"prepare: --tokenizer: {wanted}, got {name}: {error}") from error


def end_token(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id of the token between documents: of `name`, else of the first of END_TOKENS that there is.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    for token in (name,) if name else END_TOKENS:
        number = tokenizer.token_to_id(token)
        if number is not None:
            return number
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    wanted = f"{name or ' or '.join(END_TOKENS)} in the tokenizer"
    raise ValueError(f"prepare: --end-token: expected {wanted}, got a tokenizer with {special}")


class _Writer:
    """Appends ids to a token file and writes its header at the end."""

    def __init__(self, path: Path, vocab_size: int, source: str, most: int | None = None):
        self.path, self.vocab_size, self.source, self.most = path, vocab_size, source, most
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.file: BinaryIO = path.open("wb")
        self.hash = hashlib.sha256()
        self.num_tokens = self.num_documents = self.max_token = 0

    @property
    def full(self) -> bool:
        return self.most is not None and self.num_tokens >= self.most

    def write(self, ids: Sequence[int]) -> int:
        """Append a document, or what still fits of it; return how many tokens that were."""
        ids = ids if self.most is None else ids[: self.most - self.num_tokens]
        if not ids:
            return 0
        numbers = np.asarray(ids, DTYPES[self.dtype])
        data = numbers.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.num_tokens += len(ids)
        self.num_documents += 1
        self.max_token = max(self.max_token, int(numbers.max()))
        return len(ids)

    def close(self) -> Header:
        self.file.close()
        header = Header(
            self.dtype,
            self.num_tokens,
            self.num_documents,
            self.max_token,
            self.vocab_size,
            self.hash.hexdigest(),
            self.source,
        )
        self.path.with_suffix(".json").write_text(json.dumps(asdict(header), indent=2) + "\n")
        return header


def _encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[str, list[int]]]:
    """(name, ids) of every document, encoded in parallel by the batch."""
    batch: list[Document] = []
    size = 0

    def flush() -> Iterator[tuple[str, list[int]]]:
        encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        yield from ((name, encoding.ids) for (name, _), encoding in zip(batch, encodings, strict=True))

    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield from flush()
            batch, size = [], 0
    yield from flush()


def _first_characters(texts: Iterable[str], most: int) -> Iterator[str]:
    for text in texts:
        yield text
        most -= len(text)
        if most <= 0:
            return


def prepare(
    out: str | Path,
    documents: Callable[[], Iterable[Document]],
    tokenizer: Tokenizer | None = None,
    vocab_size: int = VOCAB_SIZE,
    end: str | None = None,
    validation: float = 0.01,
    max_tokens: int | None = None,
    source: str = "",
    progress: bool | None = False,
) -> dict[str, Header]:
    """Write a folder with train.bin, validation.bin, their headers and tokenizer.json, whole or not at all.

    Args:
        out: the folder; it must not hold anything yet.
        documents: called for each pass over the documents, (name, text) each.
        tokenizer: the one to use; None trains one on the training documents first.
        vocab_size: of the one to train.
        end: the token to put after every document; by default the first of END_TOKENS in the tokenizer.
        validation: share of the documents to validate on, chosen by a hash of their names; 0 for none.
        max_tokens: stop when there are so many to train on.
        source: where the text came from, for the headers.
        progress: show a tqdm bar; None does so where a person watches.

    Returns:
        The Header of each token file by its name.

    Raises:
        ValueError: a folder that is not empty, a share out of range, no text on one side of the split, or an
            end token that the tokenizer lacks.
        OSError: no space; `out` is then as it was.
    """
    out = Path(out)
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    expect(empty, "prepare", "OUT", "a new or empty folder", out)
    fits = isinstance(validation, (int, float)) and 0 <= validation < 1
    expect(fits, "prepare", "--validation", "a share from 0 to below 1", validation)
    if max_tokens is not None:
        integer(max_tokens, "prepare", "--max-tokens", 1)
    if tokenizer is None:
        texts = (text for name, text in documents() if not is_validation(name, validation))
        tokenizer = train_tokenizer(_first_characters(texts, TOKENIZER_CHARACTERS), vocab_size)
    last = end_token(tokenizer, end)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells the end token does not end there

    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new.chmod(0o755)  # mkdtemp makes it private
        total = max(tokenizer.get_vocab_size(), last + 1)
        train = _Writer(new / TRAIN, total, source, max_tokens)
        held = _Writer(new / VALIDATION, total, source)
        disable = None if progress is None else not progress
        with tqdm(total=max_tokens, desc="prepare", unit="token", unit_scale=True, disable=disable) as bar:
            for name, ids in _encoded(tokenizer, documents()):
                writer = held if is_validation(name, validation) else train
                written = writer.write([*ids, last])
                bar.update(written if writer is train else 0)
                if train.full:
                    break
        headers = {TRAIN: train.close(), VALIDATION: held.close()}
        if validation == 0:
            for file in (VALIDATION, Path(VALIDATION).with_suffix(".json")):
                (new / file).unlink()
            del headers[VALIDATION]
        for name, header in headers.items():
            wanted = f"documents for {name} (--validation {validation:g})"
            expect(header.num_tokens > 0, "prepare", "text", wanted, "none")
        tokenizer.save(str(new / TOKENIZER_NAME))
        new.rename(out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return headers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m fusedkv_ext prepare`."""
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to make, with train.bin, validation.bin and tokenizer.json")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="PATH", nargs="+", help="text files, or folders of them")
    text.add_argument(
        "--dataset", metavar="NAME", default=DATASET, help="of Hugging Face (default: %(default)s)"
    )
    add("--suffix", metavar="S", nargs="+", help="of a folder take only files that end so, as in .py .md")
    add("--subset", metavar="NAME", help=f"of the dataset, {SUBSET} for the default one")
    add("--split", metavar="NAME", default="train", help="of the dataset (default: %(default)s)")
    add("--column", metavar="NAME", default="text", help="of the dataset (default: %(default)s)")
    add(
        "--tokenizer",
        metavar="T",
        help="tokenizer.json, a folder with one, or a name on the Hugging Face hub",
    )
    add(
        "--vocab-size",
        metavar="N",
        type=int,
        default=VOCAB_SIZE,
        help="without --tokenizer, train one of this size (default: %(default)s)",
    )
    add("--end-token", metavar="TOKEN", help="to put after every document; by default the tokenizer's own")
    add(
        "--validation",
        metavar="SHARE",
        type=float,
        default=0.01,
        help="of the documents, kept apart to validate on (default: %(default)s)",
    )
    add("--max-tokens", metavar="N", type=int, help="stop after so many tokens to train on")


def run(args: argparse.Namespace) -> None:
    """`python -m fusedkv_ext prepare`."""
    skipped: list[Path] = []
    if args.text:

        def documents() -> Iterable[Document]:
            skipped.clear()
            return local_documents(args.text, args.suffix, skipped)

        source = " ".join(args.text)
    else:
        subset = args.subset or (SUBSET if args.dataset == DATASET else None)

        def documents() -> Iterable[Document]:
            return dataset_documents(args.dataset, subset, args.split, args.column)

        source = " ".join(filter(None, (args.dataset, subset, args.split)))
    options: dict[str, Any] = dict(end=args.end_token, validation=args.validation, max_tokens=args.max_tokens)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    headers = prepare(
        args.out, documents, tokenizer, args.vocab_size, source=source, progress=None, **options
    )
    for name, header in headers.items():
        print(f"{Path(args.out) / name}: {header.num_tokens:,} tokens of {header.num_documents:,} documents")
    print(f"vocabulary: {headers[TRAIN].vocab_size:,} tokens")
    if skipped:
        print(f"left out: {len(skipped)} files that are not UTF-8 text, the first {skipped[0]}")
