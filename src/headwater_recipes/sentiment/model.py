"""Which model is trained: MiniLM's encoder, another one, or a small one from its first values."""

from __future__ import annotations

from typing import Any

from headwater_recipes.data.cache import folder
from headwater_recipes.sentiment.settings import SentimentSettings
from headwater_recipes.text import encoder
from headwater_recipes.text.labelled import Labelled


def make(settings: SentimentSettings, found: Labelled) -> tuple[Any, Any]:
    """The model and its tokenizer. Raises ``DataError`` if there is none such."""
    if settings.scratch:
        return encoder.from_scratch([row.text for row in found.training], found.names, settings.seq, settings.seed)
    name = settings.model
    if name == "minilm":
        name = str(next(folder("minilm").rglob("model.safetensors")).parent)
    return encoder.from_pretrained(name, found.names, settings.seq, settings.seed)
