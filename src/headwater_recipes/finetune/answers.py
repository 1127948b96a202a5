"""What the model answers before and after: ``answers.json`` of the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from headwater.errors import DataError
from headwater_recipes.common.checkpoint import write_json
from headwater_recipes.text.chats import Chat, Item
from headwater_recipes.text.examples import render

LONGEST = 64
"""Tokens of an answer."""
EACH = 3
"""Questions of what is trained on, and as many of what is held out."""
_BEGINNING = 12
"""Words of a document that stand for a question."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """``prompt``: the question as the model gets it; ``wanted``: what the data says."""

    question: str
    prompt: str
    wanted: str
    held_out: bool
    before: str = ""
    after: str = ""


def choose(tokenizer: Any, training: Sequence[Item], held_out: Sequence[Item]) -> list[Asked]:
    """The first ``EACH`` of both."""
    return [
        _answer(tokenizer, item, held) for items, held in ((training, False), (held_out, True)) for item in items[:EACH]
    ]


def _answer(tokenizer: Any, item: Item, held_out: bool) -> Asked:
    if isinstance(item, Chat):
        prompt = render(tokenizer, Chat(item.question, item.place), ask=True)
        return Asked(question=item.question[-1].content, prompt=prompt, wanted=item.answer, held_out=held_out)
    words = item.text.split(" ")
    question, wanted = " ".join(words[:_BEGINNING]), " ".join(words[_BEGINNING : _BEGINNING + LONGEST])
    return Asked(question=question, prompt=question, wanted=wanted, held_out=held_out)


@torch.no_grad()
def ask(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The likeliest words each time, up to ``LONGEST`` tokens, all prompts side by side."""
    found = tokenizer(list(prompts), padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    ids = found["input_ids"]
    model.eval()
    made = model.generate(
        input_ids=ids,
        attention_mask=found["attention_mask"],
        max_new_tokens=LONGEST,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)]


def write(folder: Path, answers: Sequence[Asked]) -> None:
    """Replace ``answers.json``."""
    write_json(folder / "answers.json", list(answers))


def read(folder: Path) -> list[Asked]:
    """Raises ``DataError`` if ``answers.json`` is missing or damaged."""
    path = folder / "answers.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Asked])
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path}: {error}. What the model said before is lost; start a new run.") from error
