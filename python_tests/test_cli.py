"""The command line, with a tiny random model."""

import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusedkv_ext import CrossLayerPlan, cli, extension
from fusedkv_ext.config import FusedKVConfig
from fusedkv_ext.generation import generate
from fusedkv_ext.model import FusedKVForCausalLM

CONTEXT = 192
PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator([PROMPT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    config = FusedKVConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=64,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        plan=CrossLayerPlan.fusedkv_lite(4, n=1),
    )
    FusedKVForCausalLM(config).save_pretrained(folder)
    return folder


def run(folder, *args, command="generate") -> int:
    return cli.main([command, "--model", str(folder), *args])


def expected_text(folder, device, **options) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = FusedKVForCausalLM.from_pretrained(folder, device, dtype)
    tokens = generate(model, [tokenizer.encode(PROMPT).ids], stop_tokens=[0], **options).tokens[0]
    assert tokens
    return PROMPT + tokenizer.decode(tokens)


@pytest.mark.parametrize("sampled", [False, True])
def test_generate_prints_prompt_and_completion(folder, device, capsys, sampled):
    args = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "3"] if sampled else []
    options = dict(temperature=0.9, top_k=40, top_p=0.95, seed=3) if sampled else {}
    assert run(folder, "--prompt", PROMPT, "--max-new-tokens", "20", "--device", device, *args) == 0
    printed = capsys.readouterr().out.removesuffix("\n")
    text = expected_text(folder, device, max_new_tokens=20, **options)
    assert printed == text.rstrip("\ufffd")  # bytes of a character that never became whole are not printed


def test_the_space_before_the_first_new_word_stays(folder, tmp_path, monkeypatch, capsys):
    """Tokenizers in the manner of SentencePiece mark it in the word, and drop it where a text begins."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=100, show_progress=False)
    tokenizer.train_from_iterator(["good morning"] * 9, trainer)
    model = shutil.copytree(folder, tmp_path / "model")
    tokenizer.save(str(model / "tokenizer.json"))
    new = tokenizer.encode("morning").ids
    monkeypatch.setattr(cli, "stream", lambda *args, **options: iter([(0, token) for token in new]))
    assert run(model, "--prompt", "good") == 0
    assert capsys.readouterr().out == "good morning\n"


def test_demo_prints_measured_cache(folder, device, capsys):
    assert run(folder, "--prompt", PROMPT, "--max-new-tokens", "20", "--device", device, command="demo") == 0
    out = capsys.readouterr().out
    tokens = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids) + 20
    pages = -(-tokens // cli.PAGE_SIZE)
    nbytes = (
        pages * cli.PAGE_SIZE * 2 * 64 * (2 if device == "cuda" else 4)
    )  # one layer's, with one head of 64
    assert f"{nbytes:,} bytes, 25% of {4 * nbytes:,}" in out
    assert "20 generated" in out and "tokens/s" in out
    assert ("CUDA kernels" if device == "cuda" else "CPU implementations") in out


@pytest.mark.parametrize("fp8_sources", ["copy", "only"])
def test_fp8_sources(folder, device, capsys, fp8_sources):
    """The one layer of this model that has a cache is a source."""
    args = ["--prompt", PROMPT, "--max-new-tokens", "20", "--device", device, "--fp8-sources", fp8_sources]
    assert run(folder, *args, "--temperature", "0") == 0
    printed = capsys.readouterr().out.removesuffix("\n")
    assert printed == expected_text(folder, device, max_new_tokens=20, fp8_sources=fp8_sources).rstrip(
        "\ufffd"
    )
    assert run(folder, *args, command="demo") == 0
    element = 2 if device == "cuda" else 4
    share = (1 + element * (fp8_sources == "copy")) / (4 * element)
    assert f" bytes, {share:.0%} of " in capsys.readouterr().out


def test_fp8_sources_have_three_values(folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, "--prompt", PROMPT, "--fp8-sources", "both")
    assert "invalid choice: 'both'" in capsys.readouterr().err


def test_demo_has_a_prompt_and_a_model():
    args = cli.parser().parse_args(["demo"])
    assert (args.prompt, args.model) == ("def fibonacci(", cli.DEMO_MODEL)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (cli.DEMO_MODEL / name).is_file()


def test_env(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and sys.version.split()[0] in out
    reason = cli.why_cpu()
    assert ("ops run on   CUDA kernels" if reason is None else reason) in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "prompts[0]: expected at least one token"),
        (["--prompt", "x" * CONTEXT], f"prompts[0]: expected at most {CONTEXT} tokens"),
        (
            ["--prompt", PROMPT, "--max-new-tokens", "0"],
            "max_new_tokens: expected an integer of at least 1, got 0",
        ),
        (["--prompt", PROMPT, "--max-new-tokens", str(10**9)], f"expected at most {CONTEXT} tokens"),
        (["--prompt", PROMPT, "--temperature", "-1"], "temperature: expected 0 or more, got -1.0"),
        (["--prompt", PROMPT, "--top-k", "0"], "top_k: expected an integer of at least 1, got 0"),
        (["--prompt", PROMPT, "--top-p", "2"], "top_p: expected None or above 0 and at most 1, got 2.0"),
        (["--prompt", PROMPT, "--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got abacus"),
        (
            ["--prompt", PROMPT, "--model", "nowhere"],
            "--model: expected a directory with config.json, got nowhere",
        ),
    ],
)
def test_bad_input_is_one_line(folder, capsys, args, message):
    assert run(folder, *args) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


def test_cuda_without_kernels_says_why(folder, capsys, monkeypatch):
    reason = extension.why_cpu() or "no GPU is visible"
    monkeypatch.setattr(extension, "why_cpu", lambda: reason)
    assert run(folder, "--prompt", PROMPT, "--device", "cuda") == 1
    assert f"--device: expected cpu ({reason}), got cuda" in capsys.readouterr().err


def test_ctrl_c_is_clean(folder, capsys, monkeypatch):
    def interrupted(*args, **options):
        yield 0, 70
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "stream", interrupted)
    assert run(folder, "--prompt", PROMPT) == 130
    out, err = capsys.readouterr()
    assert out.startswith(PROMPT) and out.endswith("\n") and err == ""


def test_colour_only_in_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert cli.styled("x", "1") == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.styled("x", "1") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.styled("x", "1") == "x"


def test_a_closed_pipe_is_no_error(folder):
    command = [sys.executable, "-m", "fusedkv_ext", "generate", "--model", folder, "--prompt", PROMPT]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "20"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
