"""Which model is trained: MiniLM's encoder, another one, or a small one from its first values; and its head."""

from __future__ import annotations

from typing import Any

from headwater_recipes.data.cache import folder
from headwater_recipes.qa.questions import QuestionSet
from headwater_recipes.qa.settings import QaSettings
from headwater_recipes.text import encoder

CLASSES = ("no", "yes")


def make(settings: QaSettings, asked: QuestionSet) -> tuple[Any, Any]:
    """The model and its tokenizer. Raises ``DataError`` if there is none such."""
    head, classes = (encoder.SPANS, ()) if asked.spans else (encoder.CLASSES, CLASSES)
    if settings.scratch:
        texts = [f"{each.question} {each.passage}" for each in asked.training]
        return encoder.from_scratch(texts, classes, settings.seq, settings.seed, head)
    name = settings.model
    if name == "minilm":
        name = str(next(folder("minilm").rglob("model.safetensors")).parent)
    return encoder.from_pretrained(name, classes, settings.seq, settings.seed, head)
