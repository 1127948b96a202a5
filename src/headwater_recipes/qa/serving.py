"""A run of ``qa``, asked over HTTP: the task question-answering of the Hugging Face API."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from headwater import pretrained
from headwater_recipes.common import serving
from headwater_recipes.qa import spans
from headwater_recipes.qa.data import SPANS
from headwater_recipes.text import encoder


class ServedAnswers:
    """Answers ``{"answer", "score", "start", "end"}``, in characters of the passage.

    A long passage is looked at in windows that overlap. A model of yes and no answers with one of these, of as
    much of the passage as it can read: ``start`` and ``end`` are where that begins and ends. See ``serving.Served``.
    """

    task = "question-answering"

    def __init__(self, tokenizer: Any, longest: int, *, of_spans: bool) -> None:
        self._tokenizer, self._longest, self._spans = tokenizer, longest, of_spans
        self._lock = threading.Lock()  # padding and truncation are the tokenizer's own state

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        pretrained.quiet()
        of_spans = (folder / SPANS).exists()
        model = encoder.read(folder, encoder.SPANS if of_spans else encoder.CLASSES).eval()
        tokenizer = pretrained.load_tokenizer(str(folder))
        return model, cls(tokenizer, int(tokenizer.model_max_length), of_spans=of_spans)

    def inputs(self, body: bytes, content_type: str) -> Any:
        """The question and its passage."""
        return serving.read_json(body, content_type, ("question", "context"))

    def answer(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        serving.check_names(parameters, ("handle_impossible_answer",))
        empty = parameters.get("handle_impossible_answer", False)
        if not isinstance(empty, bool):
            raise serving.BadInput(f"'handle_impossible_answer' is {json.dumps(empty)[:50]}; it is true or false")
        with self._lock:
            return self._answer(model, inputs["question"], inputs["context"], empty=empty)

    def _answer(self, model: nn.Module, question: str, passage: str, *, empty: bool) -> dict[str, Any]:
        if not self._spans:
            yes = probability_of_yes(model, self._tokenizer, question, passage)
            return {"answer": "yes" if yes > 0.5 else "no", "score": max(yes, 1 - yes), "start": 0, "end": len(passage)}
        with torch.no_grad():
            found = spans.best(model, self._tokenizer, [question], [passage], self._longest)[0]
        if empty and found.nothing > found.score:
            return {"answer": "", "score": found.nothing, "start": 0, "end": 0}
        return {
            "answer": passage[found.start : found.end], "score": found.score, "start": found.start, "end": found.end
        }  # fmt: skip


def probability_of_yes(model: Any, tokenizer: Any, question: str, passage: str) -> float:
    """Of what the tokenizer leaves of the passage."""
    pair = tokenizer(question, passage, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**pair).logits[0].float().softmax(0)
    if not found.isfinite().all():
        raise ValueError("the model's logits are not finite: its training has diverged")
    return float(found[int(model.config.label2id["yes"])])
