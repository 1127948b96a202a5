"""What answers are compared with: the commonest answer, words alone, and a window that slides over the passage."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from headwater_recipes.qa.questions import Question, QuestionSet
from headwater_recipes.text import linear
from headwater_recipes.text.labelled import Labelled, Row

_WIDTHS = (1, 2, 3, 5)
"""Words of the spans that the sliding window tries; most answers are as short."""
_AROUND = 8
"""Words on either side that count for a span."""


def of(asked: QuestionSet) -> dict[str, Any]:
    """For ``report.json``."""
    if asked.spans:
        told = [sliding_window(each.question, each.passage) for each in asked.held_out]
        found = {"sliding_window": squad(told, asked.held_out)}
        if any(each.start < 0 for each in asked.training):
            found["never_an_answer"] = squad([""] * len(told), asked.held_out)
        return found
    return {**linear.baselines(labelled(asked))}


def labelled(asked: QuestionSet) -> Labelled:
    """Yes and no as the classes of pairs."""
    training, held_out = (
        tuple(Row(each.question, each.answer, "", each.passage) for each in part) for part in asked[:2]
    )
    return Labelled(training, held_out, ("no", "yes"), asked.source, asked.notes)


def squad(told: Sequence[str], asked: Sequence[Question]) -> dict[str, float]:
    """``exact_match`` and ``f1``, shares of 1, as SQuAD defines them (Rajpurkar and others 2016), by torchmetrics: of
    several right answers the one that fits best counts.
    """
    from torchmetrics.functional.text import squad as measured

    said = [{"prediction_text": text, "id": str(at)} for at, text in enumerate(told)]
    truth = [
        {"answers": {"answer_start": [0] * len(right), "text": right}, "id": str(at)}
        for at, right in enumerate([each.answer, *each.others] for each in asked)
    ]
    found: Mapping[str, Any] = measured(said, truth)  # type: ignore[arg-type]
    return {"exact_match": float(found["exact_match"]) / 100, "f1": float(found["f1"]) / 100}


def sliding_window(question: str, passage: str) -> str:
    """The span whose neighbourhood has most of the question's words, rare ones counting more (Richardson and others
    2013, for choices: here all spans of a few words that are not the question's are the choices).
    """
    words = [(found.group(), found.start(), found.end()) for found in re.finditer(r"\w+", passage)]
    lower = [word.casefold() for word, _, _ in words]
    counts = Counter(lower)
    asked = {word.casefold() for word in re.findall(r"\w+", question)}
    weight = [math.log(1 + 1 / counts[word]) if word in asked else 0.0 for word in lower]
    top, place = -1.0, (0, 0)
    for width in _WIDTHS:
        for first in range(len(words) - width + 1):
            inside = lower[first : first + width]
            if any(word in asked for word in inside):
                continue
            near = sum(weight[max(0, first - _AROUND) : first + width + _AROUND])
            capital = sum(word[0].isupper() or word[0].isdigit() for word, _, _ in words[first : first + width]) / width
            if near + 0.2 * capital > top:
                top, place = near + 0.2 * capital, (words[first][1], words[first + width - 1][2])
    return passage[place[0] : place[1]]
