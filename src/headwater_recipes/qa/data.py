"""The run folder with the questions as tokens, the model with its first values, and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.common import checkpoint
from headwater_recipes.common.stages import say, stage
from headwater_recipes.qa import baselines, model, questions, spans
from headwater_recipes.qa.questions import Question, QuestionSet
from headwater_recipes.qa.settings import QaSettings
from headwater_recipes.text import classified
from headwater_recipes.text.labelled import Row, other_scripts

HELD_OUT = "held_out.jsonl"
"""The held-out questions, as they were read."""
_UNKNOWN = 0.5
"""A larger share of tokens that the encoder has no word for is an error; a share of other letters above ``_STRANGE`` is
told."""
_STRANGE = 0.1
SPANS = "spans"
"""The file that says of a run folder that its answers are spans."""


def prepare(wanted: QaSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    with stage(console, "loading transformers"):
        pretrained.quiet()
    with stage(console, "reading the questions"):
        asked = questions.read(wanted.data)
    _check(asked, wanted)
    with stage(console, "loading the model"):
        made, tokenizer = model.make(wanted, asked)
    with stage(console, "writing the questions as tokens"):
        training, held_out = (_tokens(tokenizer, part, asked.spans, wanted.seq) for part in asked[:2])
    _check_script(asked, wanted, tokenizer, training, console)
    with stage(console, "fitting the baselines"):
        beside = baselines.of(asked)
    kind = "spans" if asked.spans else "yes or no"
    more = "".join(f"; {note}" for note in asked.notes)
    counts = f"{len(asked.training):,} questions to train on, {len(asked.held_out):,} held out"
    say(console, f"data: {asked.source}; {counts}; answers: {kind}{more}")

    def fill(run: Path) -> None:
        with stage(console, "writing the model and the data"):
            tokenizer.model_max_length = wanted.seq
            tokenizer.save_pretrained(run)
            checkpoint.write_model(made, run)
            classified.save(run, "training", training)
            classified.save(run, "held_out", held_out)
            checkpoint.write_json(run / "baseline.json", beside)
            (run / HELD_OUT).write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in asked.held_out))
            if asked.spans:
                (run / SPANS).touch()

    return fill


def _check(asked: QuestionSet, wanted: QaSettings) -> None:
    if len(asked.training) < wanted.workers:
        raise DataError(
            f"{asked.source}: {len(asked.training)} questions to train on, fewer than the {wanted.workers} workers. "
            f"Nothing was started; give more questions, or fewer --workers."
        )
    if not asked.spans and len({each.answer for each in asked.training}) < 2:
        only = asked.training[0].answer
        raise DataError(f"{asked.source}: all answers are {only!r}. Nothing was started; give questions of both kinds.")


def _check_script(
    asked: QuestionSet, wanted: QaSettings, tokenizer: Any, training: classified.ClassifiedTexts, console: Console
) -> None:
    """Text in a script that the encoder has not learnt."""
    if tokenizer.unk_token_id is not None and (training.ids == tokenizer.unk_token_id).mean() > _UNKNOWN:
        raise DataError(
            f"{asked.source}: the encoder has no word for most of these texts: another script than it has learnt. "
            f"Nothing was started; give --model an encoder of this language, or --scratch."
        )
    other = other_scripts([Row(each.passage, "") for each in asked.training])
    if other > _STRANGE and not wanted.scratch and wanted.model == "minilm":
        say(
            console,
            f"{other:.0%} of the letters are not Latin, and MiniLM has learnt English: it will do little better than "
            f"guess. --model takes an encoder of another language.",
        )


def _tokens(tokenizer: Any, part: list[Question], of_spans: bool, seq: int) -> classified.ClassifiedTexts:
    if of_spans:
        return spans.encode(tokenizer, part, seq)
    rows = baselines.labelled(QuestionSet(part, [], spans=False, source="", notes=())).training
    return classified.encode(tokenizer, rows, model.CLASSES, seq).texts


def held_out(run: Path) -> list[Question]:
    """What ``prepare`` held out of a run."""
    return msgspec.json.Decoder(Question).decode_lines((run / HELD_OUT).read_bytes())
