"""Translating with a trained model: texts in pieces, those of like length together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from headwater_recipes.translation import clauses

BEAMS = 4
"""1.6 BLEU and 2.1 chrF more than one beam, on verses to tune on."""
ROWS = 64
_REPEATED = 3
"""So many tokens are not said twice in a piece: a model that has learnt little may else say them without end."""
_SENTENCE = re.compile(r"(?<=[.!?;:。！？])\s+")


def pieces(tokenizer: Any, text: str, longest: int, *, whole: bool) -> list[str]:
    """Its clauses; or, ``whole``, the text, if it has ``longest`` tokens or fewer, else its sentences. What is longer
    still is cut between words, and a word of more tokens within it: nothing is lost. None is empty.
    """
    if whole and _count(tokenizer, text) <= longest:
        return [text]
    parts = _SENTENCE.split(text.strip()) if whole else clauses.split(text)
    return [piece for part in parts for piece in _cut(tokenizer, part, longest)]


def _cut(tokenizer: Any, sentence: str, longest: int) -> list[str]:
    """As few parts as fit, by halves: between words, and within one that is too long by itself."""
    words, found = sentence.split(), list[str]()
    while words:
        size = len(words)
        while size > 1 and _count(tokenizer, " ".join(words[:size])) > longest:
            size = (size + 1) // 2
        if size == 1 and len(words[0]) > 1 and _count(tokenizer, words[0]) > longest:
            half = len(words[0]) // 2
            words[:1] = [words[0][:half], words[0][half:]]
            continue
        found.append(" ".join(words[:size]))
        words = words[size:]
    return found


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def pieces_of(model: Any, tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[str]]:
    """Of each text the pieces that the model translates at once."""
    whole = not getattr(model.config, "headwater_clauses", False)
    return [pieces(tokenizer, text, longest, whole=whole) for text in texts]


def translate(
    model: Any, tokenizer: Any, texts: Sequence[str], longest: int, beams: int = BEAMS, new: int | None = None
) -> list[str]:
    """Of each text its translation; ``new``: tokens of a piece's translation at most (default: 1.5 times those of the
    piece, and 10).
    """
    cut = pieces_of(model, tokenizer, texts, longest)
    flat = [(index, piece) for index, part in enumerate(cut) for piece in part]
    lengths = [_count(tokenizer, piece) for _, piece in flat]
    order = sorted(range(len(flat)), key=lambda i: lengths[i])
    said = [""] * len(flat)
    for first in range(0, len(order), ROWS):
        chosen = order[first : first + ROWS]
        for index, text in zip(
            chosen, _batch(model, tokenizer, [flat[i][1] for i in chosen], longest, beams, new), strict=True
        ):
            said[index] = text
    found: list[list[str]] = [[] for _ in texts]
    for (index, _), text in zip(flat, said, strict=True):
        found[index].append(text)
    return [" ".join(part) for part in found]


def _batch(model: Any, tokenizer: Any, texts: Sequence[str], longest: int, beams: int, new: int | None) -> list[str]:
    given = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=longest)
    most = new or int(1.5 * given["input_ids"].shape[1]) + 10
    with torch.no_grad():
        ids = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            num_beams=beams,
            do_sample=False,
            no_repeat_ngram_size=_REPEATED,
            max_new_tokens=most,
            max_length=None,
        )
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
