"""Texts as clauses: short pairs show which words go together, where whole sentences would need many more of them.

A new model that is given whole verses for minutes learns to write Spanish, and nothing of what the English says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from headwater_recipes.translation.verses import Pair

_MARKS = (re.compile(r"(?<=[,.;:!?”)])\s+"), re.compile(r"(?<=[.;:!?”])\s+"))
"""Where texts are parted: at all marks, or at the strong ones."""
_LENGTH = 2.0
"""The most that one of two clauses may be longer than the other, a word or so aside."""
_WORD = 5


def split(text: str) -> list[str]:
    """The clauses of a text, each with the mark that ends it."""
    return [part for part in _MARKS[0].split(text.strip()) if part]


def paired(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Of each pair its clauses, if both texts have as many and they are of like lengths; else the pair."""
    for pair in pairs:
        yield from _clauses(pair) or [pair]


def _clauses(pair: Pair) -> list[Pair]:
    for marks in _MARKS:
        ours, theirs = (marks.split(text) for text in pair)
        if len(ours) == len(theirs) and all(map(_alike, ours, theirs)):
            return [Pair(*both) for both in zip(ours, theirs, strict=True)]
    return []


def _alike(ours: str, theirs: str) -> bool:
    return 1 / _LENGTH <= (len(ours) + _WORD) / (len(theirs) + _WORD) <= _LENGTH
