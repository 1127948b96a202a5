"""After training: the figures beside the baselines, and answers marked in their passages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from rich.console import Console

from headwater import pretrained
from headwater_recipes.common import checkpoint
from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.qa import baselines, data, spans
from headwater_recipes.qa.questions import Question
from headwater_recipes.qa.serving import probability_of_yes
from headwater_recipes.text.pictures import Marked, marked_passages

if TYPE_CHECKING:
    from headwater_recipes.qa.task import QuestionAnswering

PICTURE = "answers.png"
_DRAWN = 6


def of_classes(task: QuestionAnswering, ended: Ended) -> dict[str, Any]:
    """For ``report.json``: yes or no. Draws, for the first few, which sentence the answer hangs on."""
    folder, asked = task.folder, data.held_out(task.folder)
    model, tokenizer = task.read(folder).eval(), pretrained.load_tokenizer(str(folder))
    accuracy = ended.metrics["accuracy"]
    drawn = [_on_which_sentence(model, tokenizer, each) for each in asked[:_DRAWN]]
    title = f"{folder.name}: the sentence that the answer hangs on most"
    marked_passages(folder / PICTURE, [each for each, _ in drawn], title)
    checkpoint.write_json(folder / "answers.json", [told for _, told in drawn])
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / max(1, len(asked))) ** 0.5,
        "macro_f1": ended.metrics["macro_f1"],
        "validation_loss": ended.metrics["loss"],
        "held_out_questions": len(asked),
        **_both(folder, ended),
    }


def of_spans(task: QuestionAnswering, ended: Ended) -> dict[str, Any]:
    """For ``report.json``: spans. Draws the first few with what was told and what is true."""
    folder, asked = task.folder, data.held_out(task.folder)
    model, tokenizer = task.read(folder).eval(), pretrained.load_tokenizer(str(folder))
    with torch.no_grad():
        found = spans.best(model, tokenizer, [q.question for q in asked], [q.passage for q in asked], task.settings.seq)
    empty = any(each.start < 0 for each in asked)
    places = [(0, 0) if empty and each.nothing > each.score else (each.start, each.end) for each in found]
    told = [question.passage[start:end] for question, (start, end) in zip(asked, places, strict=True)]
    rows = [
        {
            "question": q.question,
            "answer": q.answer,
            "told": text,
            "score": round(best.score if text else best.nothing, 4),
            "passage": q.passage,
        }
        for q, text, best in zip(asked, told, found, strict=True)
    ]
    checkpoint.write_json(folder / "answers.json", rows)
    marks = [
        Marked(
            f"{q.question}\n→ {text or '(no answer)'} ({best.score if text else best.nothing:.0%}); "
            f"true: {q.answer or '(no answer)'}",
            q.passage,
            place,
            (q.start, q.end),
        )
        for q, text, best, place in zip(asked[:_DRAWN], told, found, places, strict=False)
    ]
    marked_passages(folder / PICTURE, marks, f"{folder.name}: what is told (shaded) and what is true (underlined)")
    return {
        **baselines.squad(told, asked),
        "validation_loss": ended.metrics["loss"],
        "held_out_questions": len(asked),
        **_both(folder, ended),
    }


def _both(folder: Path, ended: Ended) -> dict[str, Any]:
    return {
        "baseline": msgspec.json.decode((folder / "baseline.json").read_bytes()),
        "pictures": [PICTURE],
        "largest_logit_difference_of_saved_model": ended.difference,
    }


def _on_which_sentence(model: Any, tokenizer: Any, asked: Question) -> tuple[Marked, dict[str, Any]]:
    """The sentence without which the probability of what is told falls most."""
    pieces = [found.span() for found in re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", asked.passage, re.DOTALL)][:40]
    whole = probability_of_yes(model, tokenizer, asked.question, asked.passage)
    told = "yes" if whole > 0.5 else "no"
    sure = whole if told == "yes" else 1 - whole
    falls = []
    for start, end in pieces if len(pieces) > 1 else ():
        yes = probability_of_yes(model, tokenizer, asked.question, asked.passage[:start] + asked.passage[end:] or " ")
        falls.append(sure - (yes if told == "yes" else 1 - yes))
    place = pieces[max(range(len(falls)), key=falls.__getitem__)] if falls else (0, len(asked.passage))
    head = f"{asked.question}\n→ {told} ({sure:.0%}); true: {asked.answer}"
    row = {"question": asked.question, "answer": asked.answer, "told": told, "score": round(sure, 4)}
    return Marked(head, asked.passage, place), {
        **row,
        "sentence": asked.passage[slice(*place)],
        "passage": asked.passage,
    }


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures, and a few answers."""
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; "
        f"on {found['held_out_questions']:,} held-out questions of other passages:",
    )
    for name, score in (("this model", found), *found["baseline"].items()):
        figures = ("accuracy", "macro_f1") if "accuracy" in score else ("exact_match", "f1")
        told = "   ".join(f"{figure.replace('_', ' ')} {score[figure]:.1%}" for figure in figures)
        say(console, f"  {name.replace('_', ' '):<27} {told}")
    loads = "AutoModelForSequenceClassification" if "accuracy" in found else "AutoModelForQuestionAnswering"
    say_saved(console, loads, "logits", found["largest_logit_difference_of_saved_model"])
    for each in msgspec.json.decode((folder / "answers.json").read_bytes())[:3]:
        say(
            console,
            f"  {each['question']} → {each['told'] or '(no answer)'} ({each['score']:.0%}); true: {each['answer']}",
        )
    say(console, f"{folder}: model, tokenizer, answers.json, metrics.jsonl, loss.png, {PICTURE}, report.json")
    say(console, f"serve it: headwater serve --model {folder}", whole=True)
