"""Word-by-word translation: IBM model 1 (Brown and others 1993, https://aclanthology.org/J93-2003), in NumPy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from headwater_recipes.translation.verses import Pair

ROUNDS = 5
MOST = 40_000
"""Pairs that it is learnt from; more say little that is new."""
_NONE = ""
"""What a word is translated to that stands for no word of the source."""

_WORD = re.compile(r"\w+(?:[’'-]\w+)*|[^\w\s]")
_BEFORE_MARK = re.compile(r" (?=[,.;:!?”’)\]])|(?<=[“‘(\[¿¡]) ")


def words(text: str) -> list[str]:
    """Words and marks."""
    return _WORD.findall(text)


def learn(pairs: Sequence[Pair]) -> dict[str, str]:
    """Of each word of the source the likeliest word of the target, by expectation and maximization."""
    pairs = pairs[:MOST]
    ours, names = _numbered([pair.source for pair in pairs], [_NONE])
    theirs, targets = _numbered([pair.target for pair in pairs], [])
    # Every word of the source (and none, number 0) beside every word of the target, of each pair.
    sides = [(np.concatenate([[0], a]), b) for a, b in zip(ours, theirs, strict=True)]
    key = np.concatenate([(a[:, None] * len(targets) + b).ravel() for a, b in sides])
    # Which word of which pair of the target an entry belongs to.
    first = np.cumsum([0, *(len(b) for _, b in sides[:-1])])
    place = np.concatenate([np.tile(np.arange(len(b)) + at, len(a)) for (a, b), at in zip(sides, first, strict=True)])
    entries, entry = np.unique(key, return_inverse=True)
    source = entries // len(targets)
    chance = np.ones(len(entries))
    for _ in range(ROUNDS):
        weight = chance[entry]
        weight /= np.bincount(place, weight)[place]
        count = np.bincount(entry, weight, minlength=len(entries))
        chance = count / np.bincount(source, count)[source]
    order = np.lexsort((chance, source))
    last = np.append(np.flatnonzero(np.diff(source[order])), len(order) - 1)
    return {names[source[i]]: targets[entries[i] % len(targets)] for i in order[last] if source[i]}


def _numbered(texts: Sequence[str], names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """The words of each text as numbers, and what they stand for; ``names`` are the first."""
    number = {name: index for index, name in enumerate(names)}
    found = [np.array([number.setdefault(word, len(number)) for word in words(text)], np.int64) for text in texts]
    return found, list(number)


def translate(text: str, known: Mapping[str, str]) -> str:
    """Each word by itself, in the order of the source; one that is not known stays."""
    return _BEFORE_MARK.sub("", " ".join(known.get(word, word) for word in words(text)))
