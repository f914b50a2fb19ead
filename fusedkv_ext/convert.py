"""`convert`: from a trained vanilla model to any cross-layer plan, as a start for further training.

Storage layers are copied. A reconstruction layer keeps its queries, output projection, norms and MLP, and
loses its key and value projection. Its fusion weights are those that come closest, in least squares over
calibration text, to the keys and values that the vanilla model computes in that layer. The equations are in
docs/converting.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusedkv_ext.checks import FLOATS, expect, integer
from fusedkv_ext.config import read_json
from fusedkv_ext.data import TOKENIZER_NAME, TokenFile, spread
from fusedkv_ext.model import CONFIG_NAME, FusedKVForCausalLM
from fusedkv_ext.modules import KeysValues, ReconstructionAttention, initialise_fusion
from fusedkv_ext.plan import CrossLayerPlan

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STARTS = ("least-squares", "lite")
SIDES = ("key", "value")
REPORT_NAME = "conversion.csv"
RIDGE = 1e-9  # of sources scaled to one: bounds what cannot be told apart, changes nothing else
DTYPES = {str(x).removeprefix("torch."): x for x in FLOATS}
DEFAULT_CONTEXT = 1024
TEXT_PIECE = 1 << 20  # characters that are tokenized at once


@dataclass(frozen=True)
class Fit:
    """How much of a layer's keys or values its sources give.

        explained = 1 - sum |X_i - sum_s w_s X_s|^2 / sum |X_i|^2        X = K or V, sums over the calibration

    About zero and not about the mean, because the mix has no bias. At most 1; with least squares at least 0.

    Args:
        layer, side: the reconstruction layer, "key" or "value".
        head: a key/value head, or None for all of them together.
        sources: the layers mixed.
        explained: with the weights of the converted model.
        lite: with the weights of the start "lite": the last source for keys, the first for values.
    """

    layer: int
    side: str
    head: int | None
    sources: tuple[int, ...]
    explained: float
    lite: float


class NormalEquations:
    """Running sums, in float64, of the least-squares problem of one side of one layer.

    H key/value heads, D channels, S sources. For every head and channel, over all tokens t seen:

        gram [H, D, S, S] = sum_t x_s x_u    cross [H, D, S] = sum_t x_s y    power [H, D] = sum_t y^2

    with x_s the channel of source s and y that of the layer itself.
    """

    def __init__(self, num_sources: int, num_kv_heads: int, head_dim: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_kv_heads, head_dim, *shape, dtype=torch.float64, device=device)

        self.gram, self.cross, self.power = zeros(num_sources, num_sources), zeros(num_sources), zeros()

    def add(self, sources: Sequence[Tensor], target: Tensor) -> None:
        """Add the tokens of one batch; each tensor is [B, T, H, D]."""
        x = torch.stack([source.double() for source in sources])
        y = target.double()
        self.gram += torch.einsum("sbthd,ubthd->hdsu", x, x)
        self.cross += torch.einsum("sbthd,bthd->hds", x, y)
        self.power += y.square().sum((0, 1))

    def tied(self, parameter: Tensor, pairs: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
        """gram [..., S, S] and cross [..., S] of each free weight of a parameter of FusionWeights.

        Channels that share a weight are rows of one problem, so their sums add: all heads and channels of a
        scalar, with `pairs` the two of a RoPE pair.
        """

        def add(x: Tensor) -> Tensor:
            if parameter.dim() == 1:
                return x.sum((0, 1))
            if not pairs:
                return x
            first, second = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, 1)
            return first + second

        return add(self.gram), add(self.cross)

    def explained(self, weights: Tensor) -> list[float]:
        """Fit.explained with weights [S, H, D]: of all heads together, then of each."""
        w = weights.to(self.power).permute(1, 2, 0)
        squares = torch.einsum("hds,hdsu,hdu->hd", w, self.gram, w)
        lost = (self.power - 2 * (w * self.cross).sum(-1) + squares).clamp(min=0).sum(-1)
        total = self.power.sum(-1)
        lost, total = (torch.cat((x.sum(0, keepdim=True), x)) for x in (lost, total))
        return torch.where(lost > 0, 1 - lost / total, 1.0).tolist()  # 1 for zeros given as zeros


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """w [..., S] with the least w' gram w - 2 w' cross; sources that cannot be told apart share a weight."""
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # a source that is always zero gets the weight zero
    ridge = RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scaled = gram / (scale[..., None] * scale[..., None, :]) + ridge
    return torch.linalg.solve(scaled, cross / scale) / scale


@torch.no_grad()
def convert(
    source: FusedKVForCausalLM,
    plan: CrossLayerPlan,
    windows: Tensor | None = None,
    start: str = "least-squares",
    batch: int = 8,
) -> tuple[FusedKVForCausalLM, list[Fit]]:
    """Build a model with another plan from a trained vanilla model.

    Args:
        source: a model in which every layer has keys and values of its own; not changed.
        plan: of as many layers.
        windows: calibration, integers [N, T]: N texts of T tokens. The targets and the sources of every fit
            are what `source` computes on them.
        start: "least-squares" for the weights a, b that fit the windows, "lite" for those of Lite (with
            windows it is still measured how well they fit).
        batch: windows that go through the source at once.

    Returns:
        The model, with the dtype and device of the source, and for each reconstruction layer and side a Fit
        of all heads followed by one a head; none without windows.

    Raises:
        ValueError: a source of another plan or with a sliding window, a plan of other layers, another start,
            least squares without windows for a plan with learned weights, ids out of the vocabulary, or keys
            and values that are not finite.
    """
    op, config = "convert", source.config
    own = len(config.plan.storage_layers)
    wanted = f"a vanilla model, with keys and values in all of its {config.num_layers} layers"
    expect(own == config.num_layers, op, "source", wanted, f"{config.plan.name}, with them in {own}")
    fits = len(plan.layers) == config.num_layers
    expect(fits, op, "plan", f"one of {config.num_layers} layers", f"{len(plan.layers)} layers")
    upper = [i for i in range(config.num_layers) if i not in plan.storage_layers]
    window = config.sliding_window
    wanted = "a source without one, because reconstruction layers see all tokens"
    expect(window is None or not upper, op, "sliding_window", wanted, window)
    expect(start in STARTS, op, "start", " or ".join(STARTS), repr(start))

    model = _copy(source, plan, upper)
    attentions = {i: model.model.layers[i].attention for i in upper}
    if windows is None:
        learned = any(".fusion." in name for name in model.state_dict())
        wanted = f"calibration text to estimate the weights of {plan.name} from, or start lite"
        expect(start == "lite" or not learned, op, "windows", wanted, "none")
        return model, []
    expect(windows.dim() == 2 and windows.numel() > 0, op, "windows", "[N, T], N, T > 0", list(windows.shape))
    source.check_tokens(windows, op, "windows")
    sums = _accumulate(source, attentions, windows, batch)
    lite = {i: _explained(x, sums[i]) for i, x in attentions.items()}
    if start == "least-squares":
        for i, attention in attentions.items():
            _solve(attention, sums[i])
    report = []
    for i, attention in attentions.items():
        for side, shares in _explained(attention, sums[i]).items():
            sources = getattr(attention.plan, f"{side}_sources")
            heads = (None, *range(config.num_kv_heads))
            for head, share, by_lite in zip(heads, shares, lite[i][side], strict=True):
                report.append(Fit(i, side, head, sources, share, by_lite))
    return model, report


def _copy(source: FusedKVForCausalLM, plan: CrossLayerPlan, upper: Sequence[int]) -> FusedKVForCausalLM:
    """The model of a plan with the source's tensors, and Lite's fusion weights in its layers `upper`."""
    config = dataclasses.replace(source.config, plan=plan, fusion_init="lite")
    with torch.device("meta"):
        model = FusedKVForCausalLM(config)
    tensors = {name: x.clone() for name, x in source.state_dict().items()}
    for i in upper:
        prefix = f"model.layers.{i}.attention."
        packed = tensors.pop(prefix + "qkv_proj.weight")
        tensors[prefix + "q_proj.weight"] = packed[: config.num_attention_heads * config.head_dim].clone()
        tensors.pop(prefix + "k_norm.weight", None)
    wide = torch.promote_types(source.dtype, torch.float32)
    for name, parameter in model.state_dict().items():
        if ".fusion." in name:
            tensors[name] = torch.zeros(parameter.shape, dtype=wide, device=source.device)
    model.load_state_dict(tensors, assign=True)
    model.model.rotary.reset(source.device)
    initialise_fusion([model.model.layers[i].attention.fusion for i in upper], "lite")
    return model


def _accumulate(
    source: FusedKVForCausalLM,
    attentions: dict[int, ReconstructionAttention],
    windows: Tensor,
    batch: int,
) -> dict[int, dict[str, NormalEquations]]:
    """{layer: {side: sums}} of every reconstruction layer; one batch of activations lives at a time."""
    config = source.config
    shape = (config.num_kv_heads, config.head_dim, source.device)
    sums = {
        i: {side: NormalEquations(len(getattr(x.plan, f"{side}_sources")), *shape) for side in SIDES}
        for i, x in attentions.items()
    }
    read = {s for x in attentions.values() for s in x.plan.sources}
    for ids in tqdm(windows.split(batch), desc="calibration", unit="batch", disable=None):
        x, cos_sin = source.model.embed_tokens(ids.to(source.device)), source.model.rotary()
        shared: dict[int, KeysValues] = {}
        for i, layer in enumerate(source.model.layers):
            x, own = layer(x, cos_sin)
            if i in read:
                shared[i] = own
            if i not in attentions:
                continue
            for kv, side in enumerate(SIDES):
                sources = getattr(attentions[i].plan, f"{side}_sources")
                sums[i][side].add([shared[s][kv] for s in sources], own[kv])
    for i, sides in sums.items():
        for side, equations in sides.items():
            finite = equations.power.isfinite().all() and equations.gram.isfinite().all()
            wanted = f"finite {side}s in layer {i} and in its sources"
            expect(bool(finite), "convert", "windows", wanted, f"an infinity or NaN in {source.dtype}")
    return sums


def _solve(attention: ReconstructionAttention, sums: dict[str, NormalEquations]) -> None:
    """Set the fusion weights of one layer to those that fit best."""
    for side in SIDES:
        parameter = getattr(attention.fusion, side)
        if parameter is not None:
            best = least_squares(*sums[side].tied(parameter, side == "key", attention.interleaved))
            parameter.copy_(best.movedim(-1, 0))


def _explained(
    attention: ReconstructionAttention, sums: dict[str, NormalEquations]
) -> dict[str, list[float]]:
    """NormalEquations.explained of each side with the present weights; a source as it is has the weight 1."""
    ones = torch.ones(1, attention.num_kv_heads, attention.head_dim)
    mixes = zip(SIDES, attention.fusion(), strict=True)
    return {side: sums[side].explained(ones if w is None else w) for side, w in mixes}


def table(fits: Sequence[Fit]) -> str:
    """The shares of all heads together as text, a line a layer and side."""
    lines = [f"{'layer':>5}  {'side':5}  {'sources':15}  {'explained':>9}  {'Lite start':>10}"]
    for fit in fits:
        if fit.head is None:
            sources = ", ".join(map(str, fit.sources))
            shares = f"{fit.explained:9.4f}  {fit.lite:10.4f}"
            lines.append(f"{fit.layer:5}  {fit.side:5}  {sources:15}  {shares}")
    return "\n".join(lines)


def write_report(fits: Sequence[Fit], path: Path) -> None:
    """conversion.csv: one row a Fit, its head "all" or a number, sources joined by spaces."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["layer", "side", "head", "sources", "explained_variance", "explained_variance_lite_start"]
        )
        for fit in fits:
            head = "all" if fit.head is None else fit.head
            sources = " ".join(map(str, fit.sources))
            writer.writerow([fit.layer, fit.side, head, sources, fit.explained, fit.lite])


def load_source(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> FusedKVForCausalLM:
    """Load a checkpoint of ours, or of a Hugging Face Qwen3 or Llama, whichever its config.json is of.

    Raises:
        FileNotFoundError, ValueError: as FusedKVForCausalLM.from_pretrained and from_hf; nothing is loaded
            from an architecture or with an option that the model does not have.
    """
    config = Path(directory) / CONFIG_NAME
    expect(config.is_file(), "convert", "SOURCE", f"a directory with {CONFIG_NAME}", directory)
    load = FusedKVForCausalLM.from_pretrained
    if "model_type" in read_json(config):  # which only Hugging Face writes
        load = FusedKVForCausalLM.from_hf
    return load(directory, device, dtype)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.json whose ids a model with this vocabulary knows."""
    from tokenizers import Tokenizer

    expect(path.is_file(), "convert", "--tokenizer", "a tokenizer.json, to read text with", path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"convert: {path}: expected a tokenizer, got {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    wanted = f"the tokenizer of the model, with ids 0 to {vocab_size - 1}"
    expect(largest < vocab_size, "convert", "--tokenizer", wanted, f"ids up to {largest} in {path}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_calibration(path: Path, tokenizer_path: Path, vocab_size: int) -> np.ndarray:
    """The ids [T] of a token file that `prepare` wrote, or of a text, without special tokens.

    Raises:
        ValueError: not text, or ids that are not those of the model: beyond its vocabulary, or by another
            tokenizer than lies beside the model.
    """
    expect(path.is_file(), "convert", "--calibration", "a file", path)
    if path.suffix == ".bin" and path.with_suffix(".json").is_file():
        file = TokenFile(path)
        file.check_vocabulary(vocab_size)
        theirs = path.with_name(TOKENIZER_NAME)
        if theirs.is_file() and tokenizer_path.is_file():
            ours, other = (load_tokenizer(x, vocab_size).get_vocab() for x in (tokenizer_path, theirs))
            expect(ours == other, "convert", "--calibration", f"tokens of {tokenizer_path}", f"of {theirs}")
        return file.tokens
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"convert: --calibration: expected text in UTF-8, got {path}: {error}") from error
    tokenizer = load_tokenizer(tokenizer_path, vocab_size)
    pieces = [text[i : i + TEXT_PIECE] for i in range(0, len(text), TEXT_PIECE)]
    encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
    return np.array([token for encoding in encodings for token in encoding.ids], dtype=np.int64)


def windows_of(tokens: np.ndarray, count: int, context: int, batch: int) -> Tensor:
    """Windows, int64 [N, context], at even distances in tokens [T]: `count` tokens of them, or all there are.

    Raises:
        ValueError: fewer tokens than a batch of windows.
    """
    wanted = f"at least one batch of {batch} x {context} tokens"
    expect(len(tokens) >= batch * context, "convert", "--calibration", wanted, len(tokens))
    chosen = spread(len(tokens) // context, max(batch, count // context))
    rows = np.stack([tokens[i * context : (i + 1) * context] for i in chosen])
    return torch.from_numpy(rows.astype(np.int64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m fusedkv_ext convert`."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="model directory: of ours, or a Hugging Face Qwen3 or Llama")
    add("out", metavar="OUT", help="new directory for the model, its tokenizer and " + REPORT_NAME)
    add(
        "--plan",
        required=True,
        help="as in fusedkv, fusedkv:4 (4 storage layers), cla:4, layer_types:0_1_1_1",
    )
    add("--calibration", metavar="FILE", help="text in UTF-8, or a token file of `prepare`")
    add("--tokenizer", metavar="FILE", help=f"for text; by default {TOKENIZER_NAME} of SOURCE")
    add("--start", choices=STARTS, default=STARTS[0], help="fusion weights (default: %(default)s)")
    add("--tokens", metavar="N", type=int, default=1 << 17, help="of the calibration (default: %(default)s)")
    add("--context", metavar="N", type=int, help=f"tokens a sequence (default: up to {DEFAULT_CONTEXT})")
    add("--batch", metavar="N", type=int, default=8, help="sequences at once (default: %(default)s)")
    add("--device", help="by default cuda where there is one")
    add("--dtype", choices=DTYPES, help="to compute in and to save; by default that of SOURCE")


def run(args: argparse.Namespace) -> None:
    """`python -m fusedkv_ext convert`."""
    op, out = "convert", Path(args.out)
    for name in ("tokens", "batch"):
        integer(getattr(args, name), op, f"--{name}", 1)
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    expect(free, op, "OUT", "a directory that is new or empty", out)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = device == "cpu" or (device.split(":")[0] == "cuda" and torch.cuda.is_available())
    expect(there, op, "--device", "cpu, or cuda or cuda:N where there is a GPU", device)
    source = load_source(args.source, device, DTYPES.get(args.dtype))
    config = source.config
    plan = CrossLayerPlan.parse(args.plan, config.num_layers)
    tokenizer = Path(args.tokenizer or Path(args.source) / TOKENIZER_NAME)
    windows = None
    if args.calibration:
        longest = config.max_position_embeddings
        context = min(DEFAULT_CONTEXT, longest) if args.context is None else args.context
        integer(context, op, "--context", 1, longest)
        tokens = read_calibration(Path(args.calibration), tokenizer, config.vocab_size)
        windows = windows_of(tokens, args.tokens, context, args.batch)
    elif args.tokenizer:
        load_tokenizer(tokenizer, config.vocab_size)
    model, fits = convert(source, plan, windows, args.start, args.batch)

    new = out.with_name(f".{out.name}.new")  # OUT appears whole or not at all
    try:
        model.save_pretrained(new)
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, new / TOKENIZER_NAME)
        if windows is not None:
            write_report(fits, new / REPORT_NAME)
        os.replace(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if fits:
        print(table(fits))
    before, after = (sum(p.numel() for p in x.parameters()) for x in (source, model))
    stored = len(plan.storage_layers)
    print(
        f"{out}: {plan.name}, {stored} of {config.num_layers} layers with a cache,"
        f" {after / 1e6:.2f}M of {before / 1e6:.2f}M parameters"
    )
