"""Pairs of texts: two files line by line, a TSV file, or a data set of the hub; which of them are held out."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headwater.errors import DataError
from headwater_recipes.common import hub
from headwater_recipes.text import corpus
from headwater_recipes.translation import verses
from headwater_recipes.translation.settings import TranslationSettings
from headwater_recipes.translation.verses import Pair

SHARE = 20
"""One pair in this many is held out where no part is, and one to validate on."""

_PARTS = {"training": ("train",), "validation": ("valid", "validation", "dev"), "held_out": ("test",)}


class Parallel(NamedTuple):
    """Pairs to train on, to look at on the way, and held out; ``notes``: what was left out, in words."""

    training: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    source: str
    notes: tuple[str, ...] = ()


def read(wanted: TranslationSettings) -> Parallel:
    """What ``--data`` names, settled. Raises ``DataError``."""
    name = wanted.data[0]
    if name == "verses":
        return _verses(wanted)
    path = Path(name)
    if hub.is_saved(path):
        parts = _hub(name, wanted)
    elif path.is_dir():
        parts = _folder(path, wanted)
    elif path.exists() or path.suffix in (".tsv", ".csv", ".txt"):
        parts = {"training": _tsv(path, wanted)}
    else:
        parts = _hub(name, wanted)
    return settle(parts, path.name)


def _verses(wanted: TranslationSettings) -> Parallel:
    found = verses.aligned(wanted.source, wanted.target)
    aside = {*verses.HELD_OUT, *verses.VALIDATION}
    training, validation, held_out = (
        tuple(pair for (book, *_), pair in found.pairs.items() if test(book))
        for test in (lambda b: b not in aside, verses.VALIDATION.__contains__, verses.HELD_OUT.__contains__)
    )
    return Parallel(training, validation, held_out, "Bible verses", found.notes)


# ---- reading ---------------------------------------------------------------------------------------


def _folder(path: Path, wanted: TranslationSettings) -> dict[str, list[Pair]]:
    """Files named by part and language, their lines side by side."""
    found = {}
    for part, names in _PARTS.items():
        for name in names:
            ours, theirs = (path / f"{name}.{language}" for language in (wanted.source, wanted.target))
            if ours.is_file() or theirs.is_file():
                found[part] = _lines(ours, theirs)
                break
    if "training" not in found:
        raise DataError(
            f"--data {path}: no train.{wanted.source} and train.{wanted.target} there. Nothing was started; a folder "
            f"holds one file for each language, whose lines belong together. --source and --target say which."
        )
    return found


def _lines(ours: Path, theirs: Path) -> list[Pair]:
    for path, other in ((ours, theirs), (theirs, ours)):
        if not path.is_file():
            raise DataError(
                f"{other} is there, and {path.name} beside it is not: one language is missing. Nothing was started; "
                f"add it, or say which languages there are: --source NAME --target NAME."
            )
    texts = [corpus.read_named(path).removesuffix("\n").split("\n") for path in (ours, theirs)]
    if len(texts[0]) != len(texts[1]):
        raise DataError(
            f"{ours} has {len(texts[0]):,} lines and {theirs.name} {len(texts[1]):,}: they do not belong together line "
            f"by line. Nothing was started; mend the files."
        )
    return [Pair(*pair) for pair in zip(*texts, strict=True)]


def _tsv(path: Path, wanted: TranslationSettings) -> list[Pair]:
    """Its first line names languages; tabs and quotes have no other meaning."""
    lines = corpus.read_named(path).removesuffix("\n").split("\n")
    names = lines[0].rstrip("\r").split("\t")
    missing = [name for name in (wanted.source, wanted.target) if name not in names]
    if missing:
        raise DataError(
            f"--data {path}: no column {' and no column '.join(map(repr, missing))}; the first line names "
            f"{', '.join(map(repr, names[:8]))[:200]}. Nothing was started; the first line of a .tsv file names the "
            f"languages, as in {wanted.source}<TAB>{wanted.target}; --source and --target say which are meant."
        )
    ours, theirs = names.index(wanted.source), names.index(wanted.target)
    found = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.rstrip("\r").split("\t")
        if fields == [""]:
            found.append(Pair("", ""))
            continue
        if len(fields) != len(names):
            raise DataError(
                f"{path}:{number}: {len(fields)} columns, and the first line names {len(names)}. Nothing was started; "
                f"mend the line."
            )
        found.append(Pair(fields[ours], fields[theirs]))
    return found


def _hub(name: str, wanted: TranslationSettings) -> dict[str, list[Pair]]:
    """In WMT's form: a column ``translation`` of ``{"en": …, "de": …}``."""
    found = hub.load(name)
    return {part: _rows(name, found[each], wanted) for part, names in _PARTS.items() for each in names if each in found}


def _rows(name: str, table: Any, wanted: TranslationSettings) -> list[Pair]:
    if "translation" not in table.column_names:
        raise DataError(
            f"--data {name}: no column 'translation' as in WMT's data sets, but {', '.join(table.column_names)}. "
            f"Nothing was started; give another."
        )
    found = []
    for row in table["translation"]:
        missing = [language for language in (wanted.source, wanted.target) if language not in row]
        if missing:
            raise DataError(
                f"--data {name}: no language {' and '.join(map(repr, missing))} in it, but {', '.join(row)}. Nothing "
                f"was started; say which: --source NAME --target NAME."
            )
        found.append(Pair(row[wanted.source] or "", row[wanted.target] or ""))
    return found


# ---- what may stand on which side ------------------------------------------------------------------


def settle(parts: dict[str, list[Pair]], source: str) -> Parallel:
    """No empty text, no pair twice, and no text of held-out pairs among those to train on.

    Raises ``DataError``: too little is left.
    """
    given = {part: [_trimmed(pair) for pair in pairs] for part, pairs in parts.items()}
    whole = {part: [pair for pair in pairs if all(pair)] for part, pairs in given.items()}
    empty = sum(len(given[part]) - len(whole[part]) for part in given)
    training = list(dict.fromkeys(whole["training"]))
    held_out, training = _aside(whole.get("held_out"), training, "held out")
    validation, training = _aside(whole.get("validation"), training, "validation")
    left = sum(map(len, whole.values())) - len(training) - len(held_out) - len(validation)
    if not (training and validation and held_out):
        raise DataError(
            f"--data {source}: {sum(map(len, whole.values()))} pairs of two texts, too few to train on some, hold "
            f"some out and validate on some. Nothing was started; give more."
        )
    notes = [f"{empty:,} pairs skipped of which a text is empty"] if empty else []
    notes += [f"{left:,} left out that stand elsewhere too"] if left else []
    return Parallel(tuple(training), tuple(validation), tuple(held_out), source, tuple(notes))


def _trimmed(pair: Pair) -> Pair:
    return Pair(*(" ".join(text.split()) for text in pair))


def _aside(given: Sequence[Pair] | None, training: list[Pair], purpose: str) -> tuple[list[Pair], list[Pair]]:
    """What was given to be held out, or one pair in ``SHARE`` by its content; and the others."""
    chosen = list(dict.fromkeys(given)) if given else _by_content(training, purpose)
    sources, targets = {pair.source for pair in chosen}, {pair.target for pair in chosen}
    return chosen, [pair for pair in training if pair.source not in sources and pair.target not in targets]


def _by_content(pairs: Sequence[Pair], purpose: str) -> list[Pair]:
    def mark(pair: Pair) -> bytes:
        # By the source: its translations stay together. Not hash(), which differs from process to process.
        return hashlib.blake2b(f"{purpose}\0{pair.source}".encode(), digest_size=8).digest()

    return sorted(pairs, key=mark)[: max(1, len(pairs) // SHARE)]


def scripts(texts: Iterable[str], least: float = 0.01) -> list[str]:
    """The scripts (LATIN, CYRILLIC, as Unicode names letters) of at least this share of the letters."""
    letters = Counter(letter for text in texts for letter in text if letter.isalpha())
    counts: Counter[str] = Counter()
    for letter, count in letters.items():
        counts[script(letter)] += count
    total = sum(counts.values())
    return sorted(name for name, count in counts.items() if count >= least * total)


def script(letter: str) -> str:
    """The first word of its name."""
    return unicodedata.name(letter, "?").partition(" ")[0]
