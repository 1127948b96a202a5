"""Aligned verses of two Bibles: the World English Bible and the Spanish Reina-Valera of 1909, as SWORD modules.

Both are numbered by book, chapter and verse, not always alike. Three things keep verses together that say the same:
chapters whose counts differ are left out; verses name the Hebrew or Greek words they render (Strong's numbers), and a
pair that shares few of them is left out; so is one whose texts differ much in length. The English deuterocanon has no
Spanish beside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headwater.errors import DataError
from headwater_recipes.data.cache import folder

MODULES = {"en": "bible-english", "es": "bible-spanish"}

HELD_OUT = ("Ruth", "Esther", "Ecclesiastes", "Amos", "Acts", "James")
"""Whole books that are never trained on: history, wisdom, prophecy and a letter, from all over. None has a twin in
another book, as Kings have in Chronicles, the first three gospels in each other, Ephesians in Colossians, Jude in
II Peter, parts of Isaiah in Kings."""

VALIDATION = ("Joel", "Daniel", "Galatians")
"""Whole books to tune on."""

SHARED, LENGTH = 0.3, 2.5
"""Of a pair: the least share of the Strong's numbers of the verse with fewer, and the most that one text may be longer
than the other."""

_DROPPED = re.compile(r"<(note|title|rdg|figure)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
_WITHIN_WORDS = re.compile(r"</?(w|q|transChange|hi|seg|name|divineName|foreign)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_BEFORE_MARK = re.compile(r"\s+(?=[,.;:!?”’)\]])")
_STRONG = re.compile(r"strong:([GH]\d+)")

Place = tuple[str, int, int]


class Verse(NamedTuple):
    """``strong``: the Strong's numbers of its words."""

    text: str
    strong: frozenset[str]


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


class Aligned(NamedTuple):
    """``pairs`` by place; ``notes``: what was left out, in words."""

    pairs: dict[Place, Pair]
    notes: tuple[str, ...]


def plain(raw: str) -> str:
    """The text of an OSIS verse, without notes, titles and marks.

    Where a note stands between two words there may be no other space.
    """
    text = _TAG.sub(" ", _WITHIN_WORDS.sub("", _DROPPED.sub(" ", raw)))
    return _BEFORE_MARK.sub("", " ".join(text.split()))


@functools.lru_cache(maxsize=2)
def read(module: Path) -> dict[Place, Verse]:
    """Every verse that has a text. Raises ``DataError``: it is no SWORD Bible that can be read."""
    try:
        from pysword.modules import SwordModules
    except ImportError:
        raise DataError(
            "the package pysword, which reads SWORD modules, is not installed. Nothing was started; "
            "pip install pysword, or give --data."
        ) from None
    try:
        modules = SwordModules(str(module))
        bible = modules.get_bible_from_module(next(iter(modules.parse_modules())))
        # It unpacks a whole book for each verse of it.
        bible._decompressed_text = functools.lru_cache(maxsize=2)(bible._decompressed_text)  # noqa: SLF001
        raw = dict(_verses(bible))
    except Exception as error:  # of any kind: what a damaged file makes the library raise
        raise DataError(
            f"{module}: no SWORD Bible that can be read ({type(error).__name__}: {error}). Nothing was started; "
            f"fetch it anew: headwater data get {module.name}"
        ) from error
    found = {place: Verse(plain(text), frozenset(_STRONG.findall(text))) for place, text in raw.items()}
    if not any(verse.text for verse in found.values()):
        raise DataError(
            f"{module}: no verse in it has a text: it is damaged. Nothing was started; fetch it anew: "
            f"headwater data get {module.name}"
        )
    return {place: verse for place, verse in found.items() if verse.text}


def _verses(bible: Any) -> Iterator[tuple[Place, str]]:
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter, count in enumerate(book.chapter_lengths, start=1):
                for verse in range(1, count + 1):
                    found = bible.get(books=[book.name], chapters=[chapter], verses=[verse], clean=False)
                    yield (book.name, chapter, verse), found


def aligned(source: str, target: str) -> Aligned:
    """The verses of both, by place. Raises ``DataMissing``, ``DataDamaged``, ``DataError``."""
    return align(*(read(folder(MODULES[language])) for language in (source, target)))


def align(ours: dict[Place, Verse], theirs: dict[Place, Verse]) -> Aligned:
    """Verses of the same place that say the same."""
    lengths = [_last_verses(each) for each in (ours, theirs)]
    shared = lengths[0].keys() & lengths[1].keys()
    uneven = {chapter for chapter in shared if lengths[0][chapter] != lengths[1][chapter]}
    pairs: dict[Place, Pair] = {}
    other = long = 0
    for place, verse in ours.items():
        if place[:2] not in shared - uneven or place not in theirs:
            continue
        translated = theirs[place]
        if _agreement(verse.strong, translated.strong) < SHARED:
            other += 1
        elif not 1 / LENGTH <= len(verse.text) / len(translated.text) <= LENGTH:
            long += 1
        else:
            pairs[place] = Pair(verse.text, translated.text)
    return Aligned(
        pairs,
        (
            f"{len(uneven)} chapters left out whose numbers of verses differ",
            f"{other:,} verses whose Strong's numbers do",
            f"{long:,} whose lengths do",
        ),
    )


def _last_verses(verses: dict[Place, Verse]) -> dict[tuple[str, int], int]:
    found: dict[tuple[str, int], int] = {}
    for book, chapter, verse in verses:
        found[book, chapter] = max(verse, found.get((book, chapter), 0))
    return found


def _agreement(ours: frozenset[str], theirs: frozenset[str]) -> float:
    """1 where one verse has none, so that nothing is known."""
    least = min(len(ours), len(theirs))
    return len(ours & theirs) / least if least else 1.0
