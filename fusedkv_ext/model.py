"""The language model: layers put together from a config, its checkpoint, and its two cached calls."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusedkv_ext.attention import KeysValues
from fusedkv_ext.cache import DecodeStep, PagedKVCache, PrefillChunk, upload
from fusedkv_ext.checks import FLOATS, INDEX, expect
from fusedkv_ext.config import FusedKVConfig, read_json
from fusedkv_ext.modules import (
    DecoderLayer,
    ReconstructionAttention,
    RMSNorm,
    RotaryTable,
    StorageAttention,
    initialise_fusion,
)
from fusedkv_ext.plan import CrossLayerPlan

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
SAFETENSORS_DTYPES = dict(F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64)
TensorFacts = tuple[tuple[int, ...], torch.dtype | str]  # shape and dtype
PREFILL_CHUNK = 8192  # prompt tokens that go through the layers at once


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """The cached calls hand the model's own dtype to the ops: autocast around them would mix in another."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return run


def _decoder_layer(config: FusedKVConfig, layer: int) -> DecoderLayer:
    shape = (config.hidden_size, config.num_attention_heads, config.num_kv_heads, config.head_dim)
    rest = dict(qk_norm=config.qk_norm, eps=config.rms_norm_eps, interleaved=config.rope_interleaved)
    attention: StorageAttention | ReconstructionAttention
    if layer in config.plan.storage_layers:
        attention = StorageAttention(*shape, layer=layer, window=config.sliding_window or 0, **rest)
    else:
        attention = ReconstructionAttention(*shape, plan=config.plan.layers[layer], **rest)
    return DecoderLayer(attention, config.hidden_size, config.intermediate_size, config.rms_norm_eps)


class FusedKVModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: FusedKVConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_decoder_layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(
            config.head_dim, config.max_position_embeddings, config.rope_theta, config.rope_scaling
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # What adds to the residual stream starts smaller, so that depth does not make it grow.
                added = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / (2 * self.config.num_layers) ** (0.5 * added))
        attentions = (layer.attention for layer in self.layers)
        fused = [x.fusion for x in attentions if isinstance(x, ReconstructionAttention)]
        initialise_fusion(fused, self.config.fusion_init)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids, integers [B, S], to hidden states [B, S, hidden] after the final norm; no cache.

        Raises:
            ValueError: not an integer [B, S] of at least one token, or longer than the positions.
        """
        kind = input_ids.dtype in INDEX and input_ids.dim() == 2 and input_ids.numel() > 0
        got = f"{input_ids.dtype} {list(input_ids.shape)}"
        expect(kind, "FusedKVModel", "input_ids", "int64 or int32 [B, S], neither of them 0", got)
        longest, length = self.config.max_position_embeddings, input_ids.shape[1]
        expect(length <= longest, "FusedKVModel", "input_ids", f"at most {longest} tokens a sequence", length)
        x, cos_sin = self.embed_tokens(input_ids), self.rotary()
        shared: dict[int, KeysValues] = {}
        for i, layer in enumerate(self.layers):
            # No more than it reads: FSDP hooks into the backward pass of every tensor that a layer is given.
            sources = {s: shared[s] for s in self.config.plan.layers[i].sources if s != i}
            x, own = layer(x, cos_sin, sources)
            if own is not None:
                shared[i] = own
        return self.norm(x)

    def bind(self, cache: PagedKVCache, layers: Iterable[int]) -> None:
        """Hand a cache what it needs of the present weights of some layers, see DecoderLayer.bind."""
        for i in layers:
            self.layers[i].bind(cache, self.rotary())

    def cached(self, x: Tensor, layers: Iterable[int], step: PrefillChunk | DecodeStep) -> Tensor:
        """Change x [T, hidden] in place, through some of the layers with the cache, and return it."""
        for i in layers:
            x = self.layers[i].cached(x, self.rotary(), step)
        return x


class FusedKVForCausalLM(nn.Module):
    """A decoder language model under any cross-layer plan.

        model = FusedKVForCausalLM(FusedKVConfig.preset("332m", plan="fusedkv"))
        logits = model(input_ids)                        # whole sequences, no cache: training
        model.prefill(cache, rows, prompts)              # then decode, or generate() for all of it

    Parameters start at N(0, 0.02), those of the projections onto the residual stream smaller by sqrt(2 L).
    """

    def __init__(self, config: FusedKVConfig):
        super().__init__()
        self.config = config
        self.model = FusedKVModel(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """Output projection of hidden states [..., hidden] to [..., vocab]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def recompute_fusion(self, recompute: bool = True) -> None:
        """Whether a backward pass forms the keys and values of reconstruction layers again.

        Otherwise they are kept from the forward pass on: 2 B S Hkv D numbers for each such layer. The
        gradients are the same, bit for bit, and attention itself is not repeated.
        """
        for module in self.modules():
            if isinstance(module, ReconstructionAttention):
                module.recompute = recompute

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run whole sequences without a cache.

        Args:
            input_ids: integers [B, S].
            targets: int64 [B, S], the token that should follow each of input_ids; -100 is ignored.

        Returns:
            Logits [B, S, vocab]; with targets the mean cross-entropy, a float32 scalar.

        Raises:
            ValueError: as FusedKVModel, or targets of another shape.
        """
        hidden = self.model(input_ids)
        if targets is None:
            return self.logits(hidden)
        same = targets.shape == input_ids.shape
        expect(same, "FusedKVForCausalLM", "targets", f"shape {list(input_ids.shape)}", list(targets.shape))
        return self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, a float32 scalar, of hidden states [B, S, hidden] for targets [B, S]."""
        return F.cross_entropy(self.logits(hidden).flatten(0, 1).float(), targets.flatten())

    def check_cache(self, cache: PagedKVCache, op: str) -> None:
        """Raise ValueError unless the cache has this model's config, dtype and device."""
        made = isinstance(cache, PagedKVCache)
        expect(made, op, "cache", "a PagedKVCache", type(cache).__name__)
        fits = cache.config == self.config and cache.dtype == self.dtype and cache.device == self.device
        wanted = f"one with this model's config, {self.dtype} on {self.device}"
        got = f"one for plan {cache.config.plan.name}, {cache.dtype} on {cache.device}"
        expect(fits, op, "cache", wanted, got)

    def check_tokens(self, tokens: Tensor, op: str, name: str) -> None:
        """Raise ValueError unless every id is in the vocabulary; waits for tokens that are on a GPU."""
        low, high = (int(x) for x in tokens.aminmax())
        last = self.config.vocab_size - 1
        expect(low >= 0 and high <= last, op, name, f"token ids 0 to {last}", low if low < 0 else high)

    def new_cache(
        self, num_pages: int, page_size: int = 64, max_batch: int = 1, fp8_sources: str = "none"
    ) -> PagedKVCache:
        """A cache with this model's shape, dtype and device; arguments and errors as of PagedKVCache."""
        options = (self.dtype, self.device, fp8_sources)
        return PagedKVCache(self.config, num_pages, page_size, max_batch, *options)

    @torch.no_grad()
    @_without_autocast
    def bind(self, cache: PagedKVCache) -> None:
        """Hand a cache the scales and fusion weights of the present weights, in place of earlier ones.

        `prefill` and `decode` begin with it, so that a change of weights between two calls counts.
        `decode_step` does not, because it may be replayed as a graph.

        Raises:
            ValueError: the weights have changed since the cache's tokens were written in e4m3.
        """
        self.model.bind(cache, range(self.config.num_layers))

    @torch.no_grad()
    @_without_autocast
    def prefill(
        self,
        cache: PagedKVCache,
        rows: Sequence[int],
        prompts: Sequence[Tensor],
        chunk: int = PREFILL_CHUNK,
        all_logits: bool = False,
    ) -> Tensor | list[Tensor]:
        """Append prompts to sequences of a cache.

        Storage layers below the last run for every token and the last one only writes keys and values for
        every token; its attention and MLP and all layers above run for the last token of each prompt.

        Args:
            cache: with room in the rows for the prompts.
            rows: from cache.add; the sequences may have tokens already.
            prompts: for each row integers [S], of any lengths.
            chunk: the most tokens that go through the layers at once.
            all_logits: run every layer for every token.

        Returns:
            Logits [B, vocab] of the last tokens, or with all_logits a list of [S, vocab], one a prompt.

        Raises:
            ValueError: an empty batch or prompt, a row not in use or without room, or weights that have
                changed since the cache's tokens were written in e4m3; nothing is written then.
        """
        op = "prefill"
        self.check_cache(cache, op)
        expect(len(rows) > 0, op, "rows", "at least one sequence", 0)
        expect(len(prompts) == len(rows), op, "prompts", f"{len(rows)}, one a row", len(prompts))
        expect(chunk > 0, op, "chunk", "at least 1 token", chunk)
        for i, prompt in enumerate(prompts):
            fits = prompt.dtype in INDEX and prompt.dim() == 1 and len(prompt) > 0
            got = f"{prompt.dtype} {list(prompt.shape)}"
            expect(fits, op, f"prompts[{i}]", "int64 or int32 [S] of at least one token", got)
            self.check_tokens(prompt, op, f"prompts[{i}]")
        cache.check_append(rows, [len(prompt) for prompt in prompts])
        prompts = [prompt.cpu() for prompt in prompts]

        last, num_layers = self.config.plan.last_storage, self.config.num_layers
        upper = range(last + 1, num_layers)  # bound while the device is at work, unless they take all tokens
        self.model.bind(cache, range(num_layers if all_logits else last + 1))
        outputs: list[list[Tensor]] = [[] for _ in rows]  # of each prompt, chunk by chunk
        for parts in _chunks([len(prompt) for prompt in prompts], chunk):
            order = sorted(parts, key=lambda part: (part[2] - part[1], cache.length(rows[part[0]])))
            counts = [end - start for _, start, end in order]
            step = cache.prefill_chunk([rows[i] for i, _, _ in order], counts)
            tokens = upload(torch.cat([prompts[i][start:end] for i, start, end in order]), self.device)
            x = self.model.cached(self.model.embed_tokens(tokens), range(last), step)
            if all_logits:
                x = self.model.cached(x, range(last, num_layers), step)
                x = self.logits(self.model.norm(x))
            else:
                self.model.layers[last].write_kv(x, self.model.rotary(), step)
            cache.advance([rows[i] for i, _, _ in order], counts)
            for (i, _, _), part in zip(order, x.split(counts), strict=True):
                # A copy of the last row, because a view of it would keep the whole chunk in memory.
                outputs[i] = [*outputs[i], part] if all_logits else [part[-1:].clone()]
        if all_logits:
            return [torch.cat(parts) for parts in outputs]
        self.model.bind(cache, upper)
        x = torch.cat([parts[0] for parts in outputs])
        step = cache.last_token_step(upload(torch.tensor(list(rows)), self.device))
        return self.logits(self.model.norm(self.model.cached(x, range(last, num_layers), step)))

    @torch.no_grad()
    def decode(self, cache: PagedKVCache, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token to each of some sequences of a cache.

        Args:
            cache: with room in the rows for one token each.
            rows: B different rows.
            tokens: integers [B].

        Returns:
            Logits [B, vocab].

        Raises:
            ValueError: an empty batch, tokens that do not fit rows, a row not in use or full, or an error of
                `bind`; nothing is written then.
        """
        self.check_cache(cache, "decode")
        expect(len(rows) > 0, "decode", "rows", "at least one sequence", 0)
        fits = tokens.dtype in INDEX and list(tokens.shape) == [len(rows)]
        got = f"{tokens.dtype} {list(tokens.shape)}"
        expect(fits, "decode", "tokens", f"int64 or int32 [{len(rows)}]", got)
        self.check_tokens(tokens, "decode", "tokens")
        cache.check_append(rows, [1] * len(rows))
        self.bind(cache)
        step = cache.decode_step(torch.tensor(list(rows), device=self.device))
        logits = self.decode_step(tokens.to(self.device), step)
        cache.advance(rows, [1] * len(rows))
        return logits

    @torch.no_grad()
    @_without_autocast
    def decode_step(self, tokens: Tensor, step: DecodeStep) -> Tensor:
        """Logits [B, vocab] of tokens [B] at a step of a cache that `prefill` (or `bind`) has prepared.

        Device work only, fit for a CUDA graph.
        """
        x = self.model.cached(self.model.embed_tokens(tokens), range(self.config.num_layers), step)
        return self.logits(self.model.norm(x))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors; each file appears whole or not at all, weights first."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config, weights = directory / f".{CONFIG_NAME}.new", directory / f".{WEIGHTS_NAME}.new"
        try:
            config.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            save_file({name: x.contiguous() for name, x in self.state_dict().items()}, weights)
            os.replace(weights, directory / WEIGHTS_NAME)
            os.replace(config, directory / CONFIG_NAME)
        finally:
            config.unlink(missing_ok=True)
            weights.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> FusedKVForCausalLM:
        """Load what save_pretrained wrote.

        Args:
            directory: with config.json and model.safetensors.
            device: where to put the model.
            dtype: to convert to; None keeps that of the file. Fusion weights are float32 in any case.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a config out of range, an unreadable file, or tensors missing, extra or misshapen, all
                of them named; read from the header, before any weight is loaded.
        """
        directory = Path(directory)
        model = cls._meta(FusedKVConfig.load(directory / CONFIG_NAME))
        weights = directory / WEIGHTS_NAME
        model._check_tensors(_header(weights), str(weights))
        return model._assign(load_file(weights), device, dtype)

    @classmethod
    def from_hf(
        cls, directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> FusedKVForCausalLM:
        """Load a Qwen3 (or Llama) model in the Hugging Face format as a model with the vanilla plan.

        Args:
            directory: with config.json and one or more .safetensors files.
            device, dtype: as in from_pretrained.

        Raises:
            FileNotFoundError, ValueError: as from_pretrained.
        """
        directory = Path(directory)
        config = FusedKVConfig.from_hf(read_json(directory / CONFIG_NAME))
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory}: expected at least one .safetensors file, got none")
        for file in files:
            _header(file)  # for its error, which names an unreadable file
        tensors = {name: x for file in files for name, x in load_file(file).items()}
        return cls.from_hf_state_dict(config, tensors, device, dtype)

    @classmethod
    def from_hf_state_dict(
        cls,
        config: FusedKVConfig,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> FusedKVForCausalLM:
        """Build the model from a Hugging Face Qwen3ForCausalLM's (or Llama's) state dict.

        Raises:
            ValueError: tensors missing, extra or misshapen, all of them named.
        """
        vanilla = config.plan == CrossLayerPlan.vanilla(config.num_layers)
        expect(vanilla, "from_hf_state_dict", "config.plan", "vanilla", config.plan.name)
        model = cls._meta(config)
        # Old Llama checkpoints hold the RoPE frequencies, which the config gives.
        tensors = {name: x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some checkpoints hold the tied matrix twice
        # Before packing, which would widen a part of another dtype in silence.
        _raise_if(_other_dtypes({name: x.dtype for name, x in tensors.items()}), "from_hf_state_dict")
        packed, missing = {}, []
        for name in model.state_dict():
            sources = _hf_names(name)
            missing += [source for source in sources if source not in tensors]
            parts = [tensors.pop(source) for source in sources if source in tensors]
            if len(parts) == len(sources):
                packed[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        problems = [f"missing {missing}"] if missing else []
        problems += [f"extra {sorted(tensors)}"] if tensors else []
        _raise_if(problems, "from_hf_state_dict")
        model._check_tensors({name: _facts(x) for name, x in packed.items()}, "from_hf_state_dict")
        return model._assign(packed, device, dtype)

    @classmethod
    def _meta(cls, config: FusedKVConfig) -> FusedKVForCausalLM:
        with torch.device("meta"):
            return cls(config)

    def _check_tensors(self, got: Mapping[str, TensorFacts], where: str) -> None:
        expected = {name: tuple(x.shape) for name, x in self.state_dict().items()}
        problems = []
        if missing := sorted(expected.keys() - got.keys()):
            problems.append(f"missing {missing}")
        if extra := sorted(got.keys() - expected.keys()):
            problems.append(f"extra {extra}")
        for name in sorted(expected.keys() & got.keys()):
            shape, dtype = got[name]
            if expected[name] != shape:
                problems.append(f"{name}: expected shape {list(expected[name])}, got {list(shape)}")
            if dtype not in FLOATS:
                problems.append(f"{name}: expected a floating dtype, got {dtype}")
        dtypes = {name: dtype for name, (_, dtype) in got.items() if ".fusion." not in name}
        problems += _other_dtypes(dtypes)
        _raise_if(problems, where)

    def _assign(
        self, tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None
    ) -> FusedKVForCausalLM:
        # Copied, because tensors of a mapped file start at any multiple of 8 bytes and kernels load 16.
        copies = {name: x.to(device=device, copy=True) for name, x in tensors.items()}
        self.load_state_dict(copies, assign=True)
        self.model.rotary.reset(device)
        return self.to(device=device, dtype=dtype)


def _raise_if(problems: Sequence[str], where: str) -> None:
    if problems:
        raise ValueError(f"{where}: expected the tensors of the config, got " + "; ".join(problems))


def _other_dtypes(dtypes: Mapping[str, torch.dtype | str]) -> list[str]:
    """What is wrong with tensors of another dtype than the embedding's."""
    expected = dtypes.get("model.embed_tokens.weight")
    return [
        f"{name}: expected dtype {expected}, that of the embedding, got {dtype}"
        for name, dtype in dtypes.items()
        if expected is not None and dtype != expected
    ]


def _facts(x: Tensor) -> TensorFacts:
    return tuple(x.shape), x.dtype


def _header(path: Path) -> dict[str, TensorFacts]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(x.get_shape()), SAFETENSORS_DTYPES.get(x.get_dtype(), x.get_dtype()))
                for name, x in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def _hf_names(name: str) -> tuple[str, ...]:
    """The tensors of Hugging Face's Qwen3 that are packed, in this order, in one of ours."""
    for ours, theirs in (
        ("attention.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("attention_norm", ("input_layernorm",)),
        ("mlp_norm", ("post_attention_layernorm",)),
        ("attention.", ("self_attn.",)),
    ):
        if ours in name:
            return tuple(name.replace(ours, part) for part in theirs)
    return (name,)


def _chunks(lengths: Sequence[int], size: int) -> Iterable[list[tuple[int, int, int]]]:
    """Cut prompts into (prompt, start, end), and pack those into lists of at most `size` tokens."""
    parts: list[tuple[int, int, int]] = []
    room = size
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            parts.append((i, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield parts
                parts, room = [], size
    if parts:
        yield parts
