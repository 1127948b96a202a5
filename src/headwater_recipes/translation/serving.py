"""A translator, asked over HTTP: the task translation of the Hugging Face API."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from headwater import pretrained
from headwater.errors import BadInput
from headwater_recipes.common import serving
from headwater_recipes.translation import decode, model, pairs

PIECES = 200
"""Clauses or sentences of a text at most."""
_STRANGE = 0.5
"""A larger share of letters of scripts that the model has not read is refused."""
_BEAMS = 8


class ServedTranslator:
    """Answers ``{"translation_text"}`` for each text. It is translated as the model has learnt it, clause by clause or
    whole; a long one sentence by sentence, up to ``PIECES``. See ``serving.Served``.
    """

    task = "translation"

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self._tokenizer, self._longest = tokenizer, int(tokenizer.model_max_length)
        self._whole = not config.headwater_clauses
        self._languages, self._scripts = tuple(config.headwater_languages), list(config.headwater_scripts)
        self._lock = threading.Lock()  # padding and truncation are the tokenizer's own state

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        pretrained.quiet()
        found = model.read(folder).eval()
        tokenizer = pretrained.load_tokenizer(str(folder))
        return found, cls(tokenizer, found.config)

    def inputs(self, body: bytes, content_type: str) -> Any:
        """The text."""
        text = serving.read_text(body, content_type)
        letters = [letter for letter in text if letter.isalpha()]
        known = [letter for letter in letters if pairs.script(letter) in self._scripts]
        if len(letters) - len(known) > _STRANGE * len(letters):
            raise BadInput(
                f"the text is in {', '.join(pairs.scripts(text))} letters, and this model reads "
                f"{', '.join(self._scripts)} ({self._languages[0]}); nothing was answered"
            )
        with self._lock:
            count = len(decode.pieces(self._tokenizer, text, self._longest, whole=self._whole))
        if count > PIECES:
            raise BadInput(
                f"the text has {count} clauses or sentences, and this server translates {PIECES} at once; nothing was "
                f"answered: send it in parts",
                413,
            )
        return text

    def answer(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        beams, new = self._wanted(parameters)
        with self._lock:
            said = decode.translate(model, self._tokenizer, [inputs], self._longest, beams, new)
        return {"translation_text": said[0]}

    def _wanted(self, parameters: Mapping[str, Any]) -> tuple[int, int | None]:
        """``num_beams`` and ``max_new_tokens``. Raises ``BadInput``."""
        serving.check_names(
            parameters, ("src_lang", "tgt_lang", "clean_up_tokenization_spaces", "truncation", "generate_parameters")
        )
        for name, language in zip(("src_lang", "tgt_lang"), self._languages, strict=True):
            if parameters.get(name) not in (None, language):
                raise BadInput(
                    f"{name!r} is {json.dumps(parameters[name])[:50]}; this model translates from "
                    f"{self._languages[0]} into {self._languages[1]}"
                )
        given = parameters.get("generate_parameters") or {}
        if not isinstance(given, dict):
            raise BadInput("'generate_parameters' must be an object, as {\"num_beams\": 4}")
        serving.check_names(given, ("num_beams", "max_new_tokens"))
        most = 2 * self._longest
        beams, new = (_whole(given, *each) for each in (("num_beams", _BEAMS), ("max_new_tokens", most)))
        return beams or decode.BEAMS, new


def _whole(given: Mapping[str, Any], name: str, most: int) -> int | None:
    value = given.get(name)
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise BadInput(f"{name!r} is {json.dumps(value)[:50]}; it must be a whole number from 1 to {most}")
    return value
