"""Token files: what prepare writes, what TokenFile reads back, and the batches cut from it."""

import json
import sys
import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fusedkv_ext import cli, data
from fusedkv_ext.data import Batches, TokenFile, prepare, spread

TEXTS = {f"part{i % 3}/file{i}.py": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(40)}


def documents():
    return TEXTS.items()


def tokenizer() -> Tokenizer:
    return data.train_tokenizer(TEXTS.values(), 300)


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path / "out", documents, tokenizer(), validation=0.2)
    return tmp_path / "out"


def texts_of(path) -> list[str]:
    """The documents of a token file, decoded."""
    file, made = TokenFile(path), Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    ends = np.flatnonzero(file.tokens == made.token_to_id(data.END))
    parts = np.split(file.tokens, ends + 1)
    assert len(parts[-1]) == 0  # every document has its end
    return [made.decode(part[:-1].tolist()) for part in parts[:-1]]


def write(path, ids, **changes) -> TokenFile:
    """A token file made by hand, with a header that may lie."""
    np.asarray(ids, "<u2").tofile(path)
    header = dict(
        dtype="uint16",
        num_tokens=len(ids),
        num_documents=1,
        max_token=max(ids),
        vocab_size=100,
        sha256="0",
        source="test",
    )
    path.with_suffix(".json").write_text(json.dumps({**header, **changes}))
    return TokenFile(path)


def test_prepare_keeps_every_document_whole_on_one_side(folder):
    train, held = texts_of(folder / "train.bin"), texts_of(folder / "validation.bin")
    assert train == [x for name, x in TEXTS.items() if not data.is_validation(name, 0.2)]
    assert held == [x for name, x in TEXTS.items() if data.is_validation(name, 0.2)]
    assert 0 < len(held) < len(train)
    header = TokenFile(folder / "train.bin").header
    assert (header.dtype, header.num_documents, header.vocab_size) == ("uint16", len(train), 300)
    assert header.max_token == TokenFile(folder / "train.bin").tokens.max()
    assert {x.name for x in folder.parent.iterdir()} == {"out"}


def test_share_of_validation():
    names = [str(i) for i in range(20000)]
    assert sum(data.is_validation(name, 0.05) for name in names) == pytest.approx(1000, abs=150)
    assert not any(data.is_validation(name, 0.0) for name in names)
    assert all(data.is_validation(name, 0.5) for name in names if data.is_validation(name, 0.05))


def test_prepare_trains_a_tokenizer_on_the_training_side_alone(tmp_path):
    held = next(str(i) for i in range(1000) if data.is_validation(str(i), 0.5))
    train = next(str(i) for i in range(1000) if not data.is_validation(str(i), 0.5))
    side = [(train, "abab " * 50), (held, "xyxy " * 50)]
    prepare(tmp_path / "out", lambda: side, vocab_size=270, validation=0.5)
    vocabulary = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).get_vocab()
    assert "abab" in vocabulary and "xy" not in vocabulary


def test_max_tokens_is_met_exactly(tmp_path):
    headers = prepare(tmp_path / "out", documents, tokenizer(), validation=0, max_tokens=77)
    assert headers["train.bin"].num_tokens == 77 == len(TokenFile(tmp_path / "out/train.bin"))
    assert set(headers) == {"train.bin"} and not (tmp_path / "out/validation.bin").exists()


def test_a_tokenizer_that_truncates_pads_or_adds_tokens_does_not_here(tmp_path):
    made = tokenizer()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    prepare(tmp_path / "out", documents, made, validation=0)
    assert texts_of(tmp_path / "out/train.bin") == list(TEXTS.values())


def test_text_that_spells_the_end_token_does_not_end_a_document(tmp_path):
    text = f"print('{data.END}')"
    prepare(tmp_path / "out", lambda: [("a", text), ("b", "x")], tokenizer(), validation=0)
    assert texts_of(tmp_path / "out/train.bin") == [text, "x"]


def test_a_large_vocabulary_takes_uint32(tmp_path):
    words = {f"w{i}": i for i in range(70000)} | {"</s>": 70000}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    prepare(tmp_path / "out", lambda: [("a", "w1 w69999")], made, validation=0)
    file = TokenFile(tmp_path / "out/train.bin")
    assert file.header.dtype == "uint32" and file.tokens.tolist() == [1, 69999, 70000]


def test_a_failure_leaves_nothing(tmp_path):
    def broken():
        yield "a", "some text"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        prepare(tmp_path / "out", broken, tokenizer(), validation=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(validation=1.0), "--validation: expected a share from 0 to below 1, got 1.0"),
        (dict(max_tokens=0), "--max-tokens: expected an integer of at least 1, got 0"),
        (
            dict(end="<none>"),
            r"--end-token: expected <none> in the tokenizer, got a tokenizer with \['<\|end",
        ),
        (dict(validation=1e-9), r"expected documents for validation.bin \(--validation 1e-09\), got none"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", documents, tokenizer(), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(folder):
    before = (folder / "train.bin").read_bytes()
    with pytest.raises(ValueError, match="OUT: expected a new or empty folder, got"):
        prepare(folder, lambda: [("a", "b")], tokenizer())
    assert (folder / "train.bin").read_bytes() == before


def test_command_line_reads_folders(tmp_path, capsys):
    text = tmp_path / "text"
    for name, content in TEXTS.items():
        (text / name).parent.mkdir(parents=True, exist_ok=True)
        (text / name).write_text(content)
    (text / "notes.md").write_text("left out by its suffix")
    (text / ".hidden").mkdir()
    (text / ".hidden/a.py").write_text("left out too")
    (text / "latin1.py").write_bytes(b"caf\xe9")
    out = tmp_path / "out"
    options = ["--suffix", ".py", "--vocab-size", "300", "--validation", "0.2"]
    assert cli.main(["prepare", str(out), "--text", str(text), *options]) == 0
    printed = capsys.readouterr().out
    assert f"{out / 'train.bin'}: " in printed and "vocabulary: 300 tokens" in printed
    assert "left out: 1 files that are not UTF-8 text" in printed and "latin1.py" in printed
    assert sorted(texts_of(out / "train.bin") + texts_of(out / "validation.bin")) == sorted(TEXTS.values())

    again = ["prepare", str(tmp_path / "again"), "--text", str(text), *options, "--tokenizer", str(out)]
    assert cli.main(again) == 0
    assert (tmp_path / "again/train.bin").read_bytes() == (out / "train.bin").read_bytes()
    for args, message in (
        (["--text", str(tmp_path / "none")], "--text: expected files or folders, got"),
        (
            ["--text", str(text), "--tokenizer", str(text / "notes.md")],
            "--tokenizer: expected a tokenizer.json",
        ),
        (
            ["--text", str(text), "--vocab-size", "5"],
            "--vocab-size: expected an integer of at least 257, got 5",
        ),
    ):
        assert cli.main(["prepare", str(tmp_path / "bad"), *args]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_dataset_is_streamed(tmp_path, monkeypatch, capsys):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"id": "a", "text": "one"}, {"id": "b", "text": " "}, {"text": "three"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = list(data.dataset_documents(data.DATASET, data.SUBSET))
    assert found == [("a", "one"), ("three", "three")]
    assert calls == [
        (("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True}),
    ]
    with pytest.raises(
        ValueError, match=r"--column: expected a column of text, 'body', got the columns \['id"
    ):
        list(data.dataset_documents("x", column="body"))

    made = tmp_path / "tokenizer.json"
    tokenizer().save(str(made))
    options = ["--tokenizer", str(made), "--validation", "0"]
    assert cli.main(["prepare", str(tmp_path / "out"), *options]) == 0
    assert calls[-1][0] == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert texts_of(tmp_path / "out/train.bin") == ["one", "three"]
    assert "HuggingFaceFW/fineweb-edu" in TokenFile(tmp_path / "out/train.bin").header.source

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert cli.main(["prepare", str(tmp_path / "none"), *options]) == 1
    assert "expected the package datasets, which `pip install datasets` adds" in capsys.readouterr().err


def test_the_datasets_package_reads_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"id": f"{i}", "text": f"text {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(data.dataset_documents(str(tmp_path)))
    assert found == [(row["id"], row["text"]) for row in rows]


def test_windows_are_slices_that_share_a_token(tmp_path):
    file = write(tmp_path / "a.bin", range(50))
    assert file.num_windows(7) == 7
    rows = file.windows([0, 6, 2], 7, 100)
    assert rows.tolist() == [list(range(i * 7, i * 7 + 8)) for i in (0, 6, 2)]


def test_every_window_once_an_epoch_in_an_order_of_the_seed(tmp_path):
    file = write(tmp_path / "a.bin", [1] * 72)  # 10 windows of 7
    batches = Batches(file, 7, 4, 100, seed=3)
    samples = [i for step in range(10) for i in batches.numbers(step)]  # 4 epochs, cut where no step ends
    epochs = [samples[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert samples == [i for step in range(10) for i in Batches(file, 7, 4, 100, seed=3).numbers(step)]
    assert samples != [i for step in range(10) for i in Batches(file, 7, 4, 100, seed=4).numbers(step)]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_same_batches(tmp_path, world):
    file = write(tmp_path / "a.bin", list(range(72)))
    whole = Batches(file, 7, 8, 100)
    parts = [Batches(file, 7, 8, 100, 0, rank, world) for rank in range(world)]
    for step in (0, 1, 5):
        assert [i for part in parts for i in part.numbers(step)] == whole.numbers(step)
        assert parts[1](step).tolist() == whole(step)[8 // world : 16 // world].tolist()


def test_spread():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7]


def test_ids_beyond_the_vocabulary(tmp_path):
    file = write(tmp_path / "a.bin", [1, 2, 3, 60, 5, 6, 7, 8, 9])
    with pytest.raises(
        ValueError, match=r"a.bin: expected token ids 0 to 59, the vocabulary of the model, got 60"
    ):
        Batches(file, 2, 1, 60)
    Batches(file, 2, 1, 61)
    lying = write(tmp_path / "b.bin", [1, 2, 3, 60, 5, 6, 7, 8, 9], max_token=9)
    batches = Batches(lying, 2, 4, 60)
    with pytest.raises(ValueError, match=r"b.bin, token 3: expected an id from 0 to 59, .* got 60"):
        batches(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_tokens=10), "expected 10 tokens of uint16, as its header says, got 18 bytes"),
        (dict(dtype="float16"), "dtype: expected uint16 or uint32, got 'float16'"),
        (dict(dtype=["uint16"]), r"dtype: expected uint16 or uint32, got \['uint16'\]"),
        (dict(max_token=-1), "max_token: expected an integer of at least 0, got -1"),
        (dict(extra=1), "expected a token file's header with the fields"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.bin", range(9), **changes)


def test_files_that_are_not_there_or_too_short(tmp_path):
    file = write(tmp_path / "a.bin", range(9))
    with pytest.raises(ValueError, match=r"expected at least 10 tokens, a window of context 9 .* got 9"):
        file.num_windows(9)
    (tmp_path / "a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a.json: expected a file that prepare wrote, got none"):
        TokenFile(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(ValueError, match=r"a.json: expected JSON"):
        TokenFile(tmp_path / "a.bin")
