"""Questions with passages and answers: where they come from, and what of them cannot be used."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headwater.errors import DataError
from headwater_recipes.common import hub
from headwater_recipes.common.parts import part_file
from headwater_recipes.data.cache import folder
from headwater_recipes.text import corpus, labelled

HELD_OUT = 5
"""One passage in this many is held out, where the data have no part that is."""
_RUN = 12
"""Words in a row by which passages are compared."""
_TITLE = 10
"""Words of a title at most, which some sets put before a passage, with a dash."""
_START = 30
"""Words of a passage's beginning that no other text has."""
_COMPARED = 50
"""Passages with the same words that another one is compared with at most: a form that all share costs no more."""
_LEFT_OUT = 0.1
"""A larger share of answers that are not in their passages is an error."""
_SUFFIXES = (".jsonl", ".json")
_YES_NO: Mapping[str, str] = {"true": "yes", "false": "no", "yes": "yes", "no": "no"}
_NUMBERS: Mapping[int, str] = {1: "yes", 0: "no"}
"""True and false too; but "0" in quotes may be words of a passage."""


class Question(NamedTuple):
    """``answer``: yes or no, or the characters ``start`` to ``end`` of the passage; "" where the passage has none.
    ``others``: spans that are as right (people do not mark the same words): judged by, not trained on.
    """

    question: str
    passage: str
    answer: str
    start: int = -1
    end: int = -1
    others: tuple[str, ...] = ()


class QuestionSet(NamedTuple):
    """Questions to train on and questions held out; ``spans``: of what kind they are; ``notes``: what was left out."""

    training: list[Question]
    held_out: list[Question]
    spans: bool
    source: str
    notes: tuple[str, ...]


class _Raw(NamedTuple):
    place: str
    item: Mapping[str, Any]


def read(names: Iterable[str]) -> QuestionSet:
    """What ``--data`` names, with no passage on both sides. Raises ``DataError``."""
    training: list[_Raw] = []
    held_out: list[_Raw] = []
    for name in names:
        learnt, aside = _sources(name)
        training += learnt
        held_out += aside
    source = ", ".join(Path(name).name for name in names)
    spans = _kind([*training, *held_out], source)
    left: list[str] = []
    sides = [
        [found for raw in part if (found := _question(raw, spans, left)) is not None] for part in (training, held_out)
    ]
    total = len(training) + len(held_out)
    if len(left) > _LEFT_OUT * total:
        raise DataError(
            f"{source}: the answers of {len(left):,} of {total:,} questions are not in their passages, the first at "
            f"{left[0]}. Nothing was started; mend the data (an answer is copied from its passage)."
        )
    return _apart(sides[0], sides[1], spans, source, len(left))


def _apart(training: list[Question], held_out: list[Question], spans: bool, source: str, left: int) -> QuestionSet:
    notes = [f"{left:,} questions left out whose answer is not in the passage"] if left else []
    group = groups(each.passage for each in (*training, *held_out))
    if held_out:
        aside = {group[each.passage] for each in held_out}
        kept = [each for each in training if group[each.passage] not in aside]
        if len(kept) < len(training):
            notes.append(
                f"{len(training) - len(kept):,} left out of training whose passage, or a version of it, is held out"
            )
    else:
        aside = _drawn(Counter(group[each.passage] for each in training))
        kept = [each for each in training if group[each.passage] not in aside]
        held_out = [each for each in training if group[each.passage] in aside]
    if not kept or not held_out:
        raise DataError(
            f"{source}: {len(kept)} questions to train on and {len(held_out)} held out; there must be some of both. "
            f"Nothing was started; give more, with different passages (versions of one text count as one)."
        )
    return QuestionSet(kept, held_out, spans, source, tuple(notes))


def groups(passages: Iterable[str]) -> dict[str, str]:
    """For each passage one that stands for all versions of its text: those that begin alike, and those that share half
    of the runs of ``_RUN`` words of the shorter one. A title that is put before a passage does not count.
    """
    root: dict[str, str] = {}
    many: dict[str, int] = {}
    having: dict[int, list[str]] = {}  # a run of words → passages that have it

    def top(passage: str) -> str:
        while root[passage] != passage:
            passage = root[passage]
        return passage

    for passage in sorted(set(passages)):
        title, dash, rest = passage.partition(" -- ")
        body = rest if dash and len(title.split()) <= _TITLE else passage
        words = re.findall(r"\w+", body.casefold())
        runs = {hash(" ".join(words[at : at + _RUN])) for at in range(max(1, len(words) - _RUN + 1))}
        start = hash(" ".join(["", *words[:_START]]))
        root[passage], many[passage] = passage, len(runs)
        shared = Counter(other for run in runs for other in having.get(run, ()))
        versions = [other for other, count in shared.items() if 2 * count >= min(len(runs), many[other])]
        for other in (*versions, *having.get(start, ())):
            root[top(passage)] = top(other)
        for run in (*runs, start):
            if len(others := having.setdefault(run, [])) < _COMPARED:
                others.append(passage)
    return {passage: top(passage) for passage in root}


def _drawn(groups: Mapping[str, int]) -> set[str]:
    """One in ``HELD_OUT``, whatever their order; the one with most questions is always learnt from."""
    most = max(groups, key=lambda group: (groups[group], group))
    others = sorted((group for group in groups if group != most), key=_mark)
    return set(others[: max(1, len(groups) // HELD_OUT)])


def _mark(text: str) -> bytes:
    # Not hash(): that differs from process to process.
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


# ---- sources ---------------------------------------------------------------------------------------


def _sources(name: str) -> tuple[list[_Raw], list[_Raw]]:
    path = Path(name)
    if name == "boolq":
        return _boolq(folder("boolq"))
    if name == "disflqa":
        return [_known(raw) for raw in _file(folder("disflqa") / "test.jsonl")], []
    if hub.is_saved(path):
        return _hub(name)
    if path.is_dir():
        return list(_file(_part(path, "train"))), list(_file(_part(path, "dev", "validation", "test")))
    if path.exists() or path.suffix in _SUFFIXES:
        return list(_file(path)), []
    return _hub(name)


def _boolq(place: Path) -> tuple[list[_Raw], list[_Raw]]:
    """The carrier's first file holds all parts; what is in the others is no training data. Its held-out part is dev."""
    files = {name: list(_file(place / f"{name}.jsonl")) for name in ("combined", "dev", "test")}
    aside = {_words(raw.item["question"]) for name in ("dev", "test") for raw in files[name]}
    return [raw for raw in files["combined"] if _words(raw.item["question"]) not in aside], files["dev"]


def _known(raw: _Raw) -> _Raw:
    """Disfl-QA says "unknown" of questions that their passage does not answer (those of SQuAD 2)."""
    return raw._replace(item={**raw.item, "answers": []}) if raw.item["answer"] == "unknown" else raw


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _part(place: Path, *names: str) -> Path:
    return part_file(place, names, _SUFFIXES, "dev")


def _file(path: Path) -> Iterator[_Raw]:
    text = corpus.read_named(path)
    if path.suffix == ".json":
        yield from _squad(path, text)
        return
    if path.suffix != ".jsonl":
        raise DataError(
            f"--data {path}: questions are in a {' or '.join(_SUFFIXES)} file. Nothing was started; convert it."
        )
    for number, item in labelled.json_lines(path, text):
        yield _Raw(f"{path}:{number}", item)


class _Paragraph(msgspec.Struct):
    context: str
    qas: list[dict[str, Any]]


class _Article(msgspec.Struct):
    paragraphs: list[_Paragraph]


class _Squad(msgspec.Struct):
    data: list[_Article]


def _squad(path: Path, text: str) -> Iterator[_Raw]:
    """SQuAD's own form (Rajpurkar and others 2016): data, paragraphs, qas."""
    try:
        held = msgspec.json.decode(text, type=_Squad)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(
            f"--data {path}: not in SQuAD's form: {error}. Nothing was started; it is "
            '{"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text", "answer_start"}]}]}]}]}, '
            "or give a .jsonl file."
        ) from error
    for at, article in enumerate(held.data):
        for place, paragraph in enumerate(article.paragraphs):
            for qa in paragraph.qas:
                yield _Raw(f"{path}, data {at}, paragraph {place}", {**qa, "passage": paragraph.context})


def _hub(name: str) -> tuple[list[_Raw], list[_Raw]]:
    found = hub.load(name)
    aside = next((part for part in ("validation", *hub.HELD_OUT) if part in found), None)
    return tuple(  # type: ignore[return-value]
        [_Raw(f"{name}, {part} {number}", row) for number, row in enumerate(found[part])] if part else []
        for part in ("train", aside)
    )


# ---- answers ---------------------------------------------------------------------------------------


def _kind(raws: list[_Raw], source: str) -> bool:
    """Whether the answers are spans: some are neither yes nor no. Raises ``DataError``: of both kinds, or none."""
    if not raws:
        raise DataError(f"{source}: no question in it. Nothing was started.")
    spans = any(_yes_no(raw) is None for raw in raws)
    odd = [raw.place for raw in raws if spans and isinstance(raw.item.get("answer", raw.item.get("label")), bool | int)]
    if odd:
        other = next(raw.place for raw in raws if _yes_no(raw) is None)
        raise DataError(
            f"{source}: answers of two kinds, at {odd[0]} true or false and at {other} neither: one model gives one "
            f"kind. Nothing was started; mend the answer, or take them apart."
        )
    return spans


def _yes_no(raw: _Raw) -> str | None:
    value = raw.item.get("answer", raw.item.get("label"))
    if isinstance(value, str):
        return _YES_NO.get(value.strip().lower())
    return _NUMBERS.get(value) if isinstance(value, bool | int) else None


def _text(raw: _Raw, *names: str) -> str:
    value = next((raw.item[name] for name in names if name in raw.item), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{raw.place}: {names[0]!r} is {'missing' if value is None else 'empty or no text'}. Nothing was started; "
            f"mend it, or leave it out."
        )
    return value


def _question(raw: _Raw, spans: bool, left: list[str]) -> Question | None:
    """``left`` gains the place of a question whose answer is not in its passage."""
    question, passage = _text(raw, "question"), _text(raw, "passage", "context")
    if not spans:
        return Question(question, passage, _yes_no(raw) or "")
    given = _answers(raw)
    if not given:
        return Question(question, passage, "")
    places = [place for text, at in given if (place := _place(text, at, passage)) is not None]
    if not places:
        left.append(raw.place)
        return None
    texts = list(dict.fromkeys(passage[start:end] for start, end in places))
    return Question(question, passage, texts[0], *places[0], tuple(texts[1:]))


def _answers(raw: _Raw) -> list[tuple[str, int | None]]:
    """The answers' texts, and where each is said to start; none of a question that its passage does not answer (SQuAD
    2). The library datasets has texts and starts side by side.
    """
    given = raw.item.get("answers", raw.item.get("answer"))
    if isinstance(given, Mapping) and isinstance(given.get("text"), list):
        starts = given.get("answer_start") or []
        if not isinstance(starts, list):
            raise DataError(
                f"{raw.place}: 'answer_start' is no list beside that of texts. Nothing was started; mend it."
            )
        given = [{"text": text, "answer_start": at} for text, at in zip_longest(given["text"], starts)]
    if given == [] and "answers" in raw.item:
        return []
    found: list[tuple[str, int | None]] = []
    for each in given if isinstance(given, list) and given else [given]:
        text, at = (each.get("text"), each.get("answer_start")) if isinstance(each, Mapping) else (each, None)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{raw.place}: 'answer' is missing, empty or no text. Nothing was started; mend it.")
        found.append((text, at if isinstance(at, int) else None))
    return found


def _place(text: str, at: int | None, passage: str) -> tuple[int, int] | None:
    """Where an answer stands; if not where it is said to, its first place. None: not in the passage."""
    if at is not None and at >= 0 and passage[at : at + len(text)] == text:
        return at, at + len(text)
    return locate(text, passage)


def locate(text: str, passage: str) -> tuple[int, int] | None:
    """The first place of an answer, whatever its case and the spaces in it (some sets part ``19.3%`` into tokens)."""
    pattern = r"\s*".join(re.escape(letter) for letter in re.sub(r"\s+", "", text))
    edge = (r"(?<!\w)" if text.strip()[0].isalnum() else "", r"(?!\w)" if text.strip()[-1].isalnum() else "")
    found = re.search(f"{edge[0]}{pattern}{edge[1]}", passage, re.IGNORECASE) or re.search(
        pattern, passage, re.IGNORECASE
    )
    return found.span() if found else None
