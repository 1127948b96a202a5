"""Sentence encoders: folders of the sentence-transformers layout, without that library.

``modules.json`` names what follows the encoder. Pooling (mean, mean over √length, maximum, first token) and Normalize
are done here; a folder with anything else is refused, as its vectors would be other ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor, nn

from headwater import pretrained
from headwater.errors import DataError, UsageError
from headwater.gateway.problems import Refusal

if TYPE_CHECKING:
    from headwater.gateway.live import Live, LiveStatistics
    from headwater.types import VersionInfo

_BATCH = 32
"""Texts of one forward."""
KINDS = ("Transformer", "Pooling", "Normalize")
"""Modules that a folder may have, in this order; the last may be left out."""
_POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")

# B texts of a batch, T tokens of the longest, W width of a vector


class Recipe(NamedTuple):
    """What a folder says of its vectors. ``pooling``: one of ``_POOLINGS``; ``longest``: tokens of a text."""

    pooling: str
    normalise: bool
    longest: int


def read_recipe(folder: Path) -> Recipe:
    """Raises ``UsageError``: a file is damaged, or asks for what is not done here."""
    modules: list[dict[str, Any]] = _read(folder / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds) - set(KINDS):
        raise UsageError(
            f"{folder}/modules.json has the modules {', '.join(kinds)}; served are a Transformer and its Pooling, with "
            "or without Normalize; it is not served"
        )
    pooling: dict[str, Any] = _read(folder / str(modules[1].get("path", "1_Pooling")) / "config.json")
    chosen = [name for name in _POOLINGS if pooling.get(f"pooling_mode_{name}")]
    if len(chosen) != 1:
        raise UsageError(f"{folder}: poolings {chosen}; one of {', '.join(_POOLINGS)} is served; it is not served")
    limit = _read(folder / "sentence_bert_config.json") if (folder / "sentence_bert_config.json").is_file() else {}
    positions = int(_read(folder / "config.json").get("max_position_embeddings", 512))
    return Recipe(chosen[0], "Normalize" in kinds, min(positions, int(limit.get("max_seq_length") or positions)))


def _read(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{path}: {error}; it is not served") from None


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The encoder, with the folder's values, and its tokenizer. Raises ``UsageError`` if they cannot be loaded."""
    import transformers

    try:
        # What a pooler makes of the first token is not looked at: many encoders are saved without one.
        module = pretrained.load(transformers.AutoModel, str(folder), unused=r"^pooler\.")
        tokenizer = pretrained.load_tokenizer(str(folder))
    except DataError as error:
        raise UsageError(f"no encoder could be loaded from {folder}: {error}; it is not served") from None
    return module.eval().requires_grad_(requires_grad=False), tokenizer


class SentenceEncoder:
    """A ``served.Embedder``: a live encoder, its tokenizer and its recipe."""

    def __init__(self, live: Live, tokenizer: Any, recipe: Recipe) -> None:
        self._live = live
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._lock = threading.Lock()
        with live.hold() as (module, _):
            self.width = int(cast(Any, module).config.hidden_size)
        self.longest = recipe.longest

    def encode(self, text: str) -> Sequence[int]:
        """A text's token ids, with those that the model expects around it."""
        with self._lock:
            return cast(Any, self._tokenizer)(text, truncation=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def embed(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, VersionInfo]:
        """Vectors (texts, width) float32 of token ids, and the version that all of them are of."""
        with self._live.hold() as (module, version):
            vocabulary = int(cast(Any, module).config.vocab_size)
            if max(map(max, texts)) >= vocabulary:
                raise Refusal(400, f"token ids go from 0 to {vocabulary - 1} here", param="input", slug="invalid_value")
            order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
            vectors = torch.empty(len(texts), self.width)
            for first in range(0, len(order), _BATCH):
                chosen = order[first : first + _BATCH]
                vectors[chosen] = self._vectors(module, [texts[number] for number in chosen])
            return vectors, version

    def statistics(self) -> LiveStatistics:
        return self._live.statistics()

    def close(self) -> None:
        self._live.close()

    def _vectors(self, module: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, texts))
        pad = self._tokenizer.pad_token_id or 0
        ids_BT = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts])  # noqa: N806
        lengths_B = torch.tensor([len(text) for text in texts])  # noqa: N806
        seen_BT = torch.arange(longest) < lengths_B[:, None]  # noqa: N806
        hidden_BTW = module(input_ids=ids_BT, attention_mask=seen_BT.long()).last_hidden_state  # noqa: N806
        vectors_BW = _POOL[self._recipe.pooling](hidden_BTW.float(), seen_BT[..., None])  # noqa: N806
        return nn.functional.normalize(vectors_BW) if self._recipe.normalise else vectors_BW


_POOL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls_token": lambda hidden, _: hidden[:, 0],
    "mean_tokens": lambda hidden, seen: (hidden * seen).sum(1) / seen.sum(1),
    "mean_sqrt_len_tokens": lambda hidden, seen: (hidden * seen).sum(1) / seen.sum(1).sqrt(),
    "max_tokens": lambda hidden, seen: hidden.masked_fill(~seen, float("-inf")).amax(1),
}
"""From hidden states (B, T, W) and which of them are of a token (B, T, 1) to vectors (B, W)."""
