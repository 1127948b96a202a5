"""Texts with labels: files, or a data set of the hub, to rows; duplicates settled; which rows are held out.

A ``.csv`` or ``.tsv`` file begins with the names of its columns; a line of a ``.jsonl`` file is one object. A folder
holds ``train.*`` and ``test.*`` (or ``validation.*``), as the library ``datasets`` reads it: then the split is given.
"""

from __future__ import annotations

import csv
import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headwater.errors import DataError
from headwater_recipes.common import hub
from headwater_recipes.common.parts import part_file
from headwater_recipes.text import corpus

HELD_OUT = 10
"""One group of texts in this many is held out."""

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_LONGEST = 10_000_000
"""Characters of a field of a CSV file."""


class Row(NamedTuple):
    """``second``: the other text of a pair, "" if there is none; rows of one ``group`` (if not "") are held out
    together or not at all.
    """

    text: str
    label: str
    group: str = ""
    second: str = ""


class Columns(NamedTuple):
    """How the columns are called; ``group`` may be absent."""

    text: str = "text"
    label: str = "label"
    group: str = "group"


@dataclass(frozen=True)
class Labelled:
    """Rows to train on and rows held out, with labels out of ``names``; ``notes`` says what was left out, in words."""

    training: tuple[Row, ...]
    held_out: tuple[Row, ...]
    names: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()


# ---- reading ---------------------------------------------------------------------------------------


def from_paths(paths: Sequence[Path], columns: Columns) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows that the user holds out (none, if files rather than a folder were named).

    Raises:
        DataError: a file that is missing, empty, no text, damaged, or has not these columns, by its line.
    """
    training: list[Row] = []
    held_out: list[Row] = []
    for path in paths:
        if path.is_dir():
            training += read(_split_file(path, "train"), columns)
            held_out += read(_split_file(path, "test", "validation", "valid", "dev"), columns)
        else:
            training += read(path, columns)
    return training, held_out


def _split_file(folder: Path, *names: str) -> Path:
    return part_file(folder, names, _SUFFIXES, "test")


def read(path: Path, columns: Columns) -> list[Row]:
    """The rows of a file. Raises ``DataError`` with the line that is no row."""
    text = corpus.read_named(path)
    if path.suffix not in _SUFFIXES:
        raise DataError(
            f"--data {path}: texts with labels are in a {', '.join(_SUFFIXES)} file. Nothing was started; convert it."
        )
    lines = json_lines(path, text) if path.suffix == ".jsonl" else _csv(path, text, columns)
    rows = [_row(line, f"{path}:{number}", columns) for number, line in lines]
    if not rows:
        raise DataError(f"--data {path}: no row in it. Nothing was started; name a file that holds texts and labels.")
    return rows


def json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a ``.jsonl`` file by their line, from 1. Raises ``DataError`` with the line that is none."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: no JSON object ({error}). Nothing was started; mend the line."
            ) from error


def _csv(path: Path, text: str, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    before = csv.field_size_limit(_LONGEST)
    good = 0  # lines; a quote that is not closed is in the next one, and noticed at the end of the file only
    try:
        reader = csv.DictReader(
            text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
        )
        named = reader.fieldnames or []
        missing = [name for name in columns[:2] if name not in named]
        if missing:
            raise DataError(
                f"--data {path}: no column {' and no column '.join(map(repr, missing))}; the first line names "
                f"{', '.join(map(repr, named[:8]))}. Nothing was started; say which they are: --text NAME --label NAME."
            )
        twice = [name for name in columns if named.count(name) > 1]
        if twice:
            raise DataError(
                f"--data {path}: two columns are called {twice[0]!r}, and which is meant nothing says. Nothing was "
                f"started; mend the first line."
            )
        good = reader.line_num
        for line in reader:
            good = reader.line_num
            if None in line:
                raise DataError(
                    f"{path}:{reader.line_num}: more fields than the first line names. Nothing was started; mend the "
                    f"line (a text with commas stands in quotes)."
                )
            yield reader.line_num, dict(line)
    except csv.Error as error:
        raise DataError(f"{path}:{good + 1}: {error}. Nothing was started; mend the line.") from error
    finally:
        csv.field_size_limit(before)


def _row(found: dict[str, Any], place: str, columns: Columns) -> Row:
    text, label = found.get(columns.text), found.get(columns.label)
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{place}: {columns.text!r} is {'missing' if text is None else 'empty or no text'}. Nothing was started; "
            f"mend the line, or leave it out."
        )
    if not isinstance(label, str | int) or not str(label).strip():
        raise DataError(
            f"{place}: {columns.label!r} is {'missing' if label is None else 'empty or no label'}; a label is a name "
            f"or a whole number. Nothing was started; mend the line, or leave it out."
        )
    return Row(text.strip(), str(label).strip(), str(found.get(columns.group) or ""))


def from_hub(name: str, columns: Columns) -> tuple[list[Row], list[Row]]:
    """The rows of a data set that the library ``datasets`` finds: on the hub, in its cache, or in a folder.

    Args:
        name: ``owner/name``, or ``owner/name:configuration``.

    Raises:
        DataError: it cannot be had, has no labelled texts, or a label that is none of its classes.
    """
    found = hub.load(name)
    # A part "test" without labels (GLUE's) holds -1.
    held_out = (_of_part(name, found, part, columns) for part in hub.HELD_OUT)
    return _of_part(name, found, "train", columns), next(filter(None, held_out), [])


def _of_part(name: str, found: Any, part: str, columns: Columns) -> list[Row]:
    if part not in found:
        return []
    table = found[part]
    for column in columns[:2]:
        if column not in table.column_names:
            raise DataError(
                f"--data {name}: its part {part!r} has no column {column!r}, but {', '.join(table.column_names)}. "
                f"Nothing was started; say which they are: --text NAME --label NAME."
            )
    names = getattr(table.features[columns.label], "names", None)
    labels = list(table[columns.label])
    if all(label in (None, -1) for label in labels):
        return []
    rows = []
    for number, (text, label) in enumerate(zip(table[columns.text], labels, strict=True)):
        place = f"{name}, {part} {number}"
        named = label if names is None else names[hub.check_class(place, label, names)]
        rows.append(_row({"text": text, "label": named}, place, Columns()))
    return rows


# ---- what may stand on which side --------------------------------------------------------------------


def settle(training: Sequence[Row], held_out: Sequence[Row], source: str) -> Labelled:
    """No text twice, and none on both sides; without ``held_out``, one group in ``HELD_OUT`` of each class is.

    A text (letters and digits count, cases do not) that stands twice is kept once; one with two labels is left out,
    wherever it stands; one on both sides is left out of training.

    Raises:
        DataError: one class only, a label of the held-out rows that no training row has, or too little.
    """
    notes: list[str] = []
    labels = defaultdict(set)
    for row in (*training, *held_out):
        labels[key(row)].add(row.label)
    given = bool(held_out)
    aside = _once(held_out, labels, set())
    kept = _once(training, labels, {key(row) for row in aside})
    left = len(training) + len(held_out) - len(kept) - len(aside)
    if left:
        doubtful = sum(len(found) > 1 for found in labels.values())
        notes.append(
            f"{left:,} rows left out whose text stands elsewhere too"
            + (f", {doubtful:,} of the texts with two labels" if doubtful else "")
        )
    names = _names(kept, source)
    strange = sorted({row.label for row in aside} - set(names))
    if strange:
        raise DataError(
            f"{source}: the held-out rows have labels that no training row has: {', '.join(map(repr, strange[:5]))}. "
            f"Nothing was started; mend them, or leave these rows out."
        )
    if not given:
        kept, aside = split(kept)
    if not aside:
        raise DataError(
            f"{source}: {len(kept)} rows, too few to hold some out: every class needs two different texts (of two "
            f"groups) or more. Nothing was started; give more."
        )
    alone = sorted(set(names) - {row.label for row in aside})
    if alone:
        notes.append(f"nothing is held out of the classes {', '.join(alone[:5])}")
    return Labelled(tuple(kept), tuple(aside), names, source, tuple(notes))


def key(row: Row) -> str:
    """The same for texts that differ in case, spaces and punctuation only (for a text of nothing else: itself)."""
    both = f"{row.text} {row.second}"
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", both).casefold())) or both


def _once(rows: Iterable[Row], labels: dict[str, set[str]], seen: set[str]) -> list[Row]:
    found = []
    for row in rows:
        mark = key(row)
        if mark not in seen and len(labels[mark]) == 1:
            seen.add(mark)
            found.append(row)
    return found


def _names(rows: Sequence[Row], source: str) -> tuple[str, ...]:
    counts = Counter(row.label for row in rows)
    if len(counts) < 2:
        only = f"one class only, {next(iter(counts))!r}" if counts else "no row is left"
        raise DataError(
            f"{source}: {only}; there is nothing to tell apart. Nothing was started; give rows of two or more."
        )
    if len(counts) > max(2, len(rows) // 2):
        raise DataError(
            f"{source}: {len(counts)} different labels in {len(rows)} rows ({', '.join(map(repr, list(counts)[:3]))}, "
            f"…): these are no classes. Nothing was started; --label NAME says which column holds them."
        )
    whole = all(re.fullmatch(r"\d+", name) for name in counts)
    return tuple(sorted(counts, key=int) if whole else sorted(counts))


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: whole groups, of each class one in ``HELD_OUT`` (but one if it has two), by
    their content, so that the order of a file does not matter.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"group {row.group}" if row.group else key(row)].append(row)
    classes: dict[str, list[str]] = defaultdict(list)
    for name, members in groups.items():
        classes[min(members).label].append(name)
    held = {
        name
        for names in classes.values()
        for name in sorted(names, key=_mark)[: max(1, round(len(names) / HELD_OUT)) if len(names) > 1 else 0]
    }
    aside = [row for name in sorted(held) for row in groups[name]]
    return [row for name in sorted(groups.keys() - held) for row in groups[name]], aside


def _mark(name: str) -> bytes:
    # Not hash(): that differs from process to process.
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def same_subject(texts: Sequence[str], most: int = 8, shared: int = 2) -> list[int]:
    """(N,) numbers, the same for texts that speak of the same thing as far as rare words tell: two texts that share
    ``shared`` words, each in at most ``most`` texts, and what hangs together by such pairs. Of names, mostly: of films,
    actors, places.
    """
    rare: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        for word in set(re.findall(r"[^\W\d_]{3,}", text.casefold())):
            rare[word].append(index)
    pairs: Counter[tuple[int, int]] = Counter()
    for places in rare.values():
        if 2 <= len(places) <= most:
            pairs.update((a, b) for i, b in enumerate(places) for a in places[:i])
    root = list(range(len(texts)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for (a, b), count in pairs.items():
        if count >= shared:
            root[max(find(a), find(b))] = min(find(a), find(b))
    return [find(index) for index in range(len(texts))]


def other_scripts(rows: Sequence[Row], most: int = 2000) -> float:
    """The share of letters that are not Latin, in the beginnings of up to ``most`` texts."""
    step = max(1, len(rows) // most)
    letters = [letter for row in rows[::step] for letter in row.text[:200] if letter.isalpha()]
    return sum(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters) / max(1, len(letters))
