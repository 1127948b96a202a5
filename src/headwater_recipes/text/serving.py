"""A classifier of texts, asked over HTTP: the task text-classification of the Hugging Face API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from headwater import pretrained
from headwater_recipes.common import serving
from headwater_recipes.text import encoder


class ServedClassifier:
    """Answers ``[{"label", "score"}]``, likeliest first. Of a text longer than the model's training saw, the end is not
    read. See ``serving.Served``.
    """

    task = "text-classification"

    def __init__(self, tokenizer: Any, names: list[str], longest: int) -> None:
        self._tokenizer, self._names, self._longest = tokenizer, names, longest

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        pretrained.quiet()
        model = encoder.read(folder).eval()
        tokenizer = pretrained.load_tokenizer(str(folder))
        return model, cls(tokenizer, encoder.class_names(model), int(tokenizer.model_max_length))

    def inputs(self, body: bytes, content_type: str) -> Any:
        """The text's tokens."""
        text = serving.read_text(body, content_type)
        return self._tokenizer(text, truncation=True, max_length=self._longest, return_tensors="pt")

    def answer(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            found = model(**inputs).logits[0]
        return serving.classes(found, self._names, parameters)
