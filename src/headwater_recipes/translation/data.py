"""From pairs of texts to the run folder: tokens, the model with its first values, baselines, what is held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.common import checkpoint
from headwater_recipes.common.stages import say, stage
from headwater_recipes.translation import clauses, dictionary, model, pairs, tokens
from headwater_recipes.translation.pairs import Parallel
from headwater_recipes.translation.settings import TranslationSettings
from headwater_recipes.translation.verses import Pair

UNKNOWN = 0.5
"""A larger share of tokens that a model to go on from has no word for is an error."""


def prepare(wanted: TranslationSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    with stage(console, "loading transformers"):
        pretrained.quiet()
    with stage(console, "reading the texts"):
        found = pairs.read(wanted)
    _check_enough(found.training, found, wanted)
    with stage(console, "loading the model" if wanted.model else "learning the tokens"):
        if wanted.model:
            made, tokenizer = model.from_pretrained(wanted.model, wanted.seq)
        else:
            made, tokenizer = model.from_scratch(found.training, wanted.vocabulary, wanted.seq, wanted.seed)
    with stage(console, "writing the texts as tokens"):
        encoded = {
            part: tokens.encode(tokenizer, texts if wanted.whole else list(clauses.paired(texts)), wanted.seq)
            for part, texts in zip(("training", "validation", "held_out"), found[:3], strict=True)
        }
    _check(found, encoded, wanted)
    with stage(console, "learning a dictionary to compare with"):
        known = dictionary.learn(found.training)
    long = sum(part.long for part in encoded.values())
    counts = [f"{len(found.training):,} pairs to train on, {len(found.validation):,} to look at on the way"]
    counts += [f"{len(found.held_out):,} held out", *found.notes]
    counts += [] if wanted.whole else [f"learnt as {len(encoded['training'].pairs):,} clauses"]
    counts += [f"{long:,} of more than {wanted.seq} tokens, not learnt from"] if long else []
    say(console, f"data: {found.source}; {'; '.join(counts)}")

    def fill(run: Path) -> None:
        with stage(console, "writing the model and the data"):
            made.config.headwater_clauses = not wanted.whole
            made.config.headwater_languages = [wanted.source, wanted.target]
            made.config.headwater_scripts = pairs.scripts(pair.source for pair in found.training[:5000])
            tokenizer.save_pretrained(run)
            checkpoint.write_model(made, run)
            for part, each in encoded.items():
                tokens.save(run, part, each.pairs)
            checkpoint.write_json(run / "dictionary.json", known)
            write_pairs(run / "held_out.jsonl", found.held_out)

    return fill


def _check_enough(training: Sequence[Pair], found: Parallel, wanted: TranslationSettings) -> None:
    if len(training) < wanted.workers:
        raise DataError(
            f"--data {found.source}: {len(training)} pairs to train on, fewer than the {wanted.workers} workers. "
            f"Nothing was started; give more, or fewer --workers."
        )


def _check(found: Parallel, encoded: dict[str, tokens.EncodedPairs], wanted: TranslationSettings) -> None:
    for part, each in encoded.items():
        if len(each.pairs) < (wanted.workers if part == "training" else 1):
            raise DataError(
                f"--data {found.source}: all but {len(each.pairs)} of the {each.long + len(each.pairs)} pairs of the "
                f"part {part!r} have more than {wanted.seq} tokens. Nothing was started; give shorter texts, or a "
                f"greater --seq."
            )
    if encoded["training"].unknown > UNKNOWN:
        raise DataError(
            f"--data {found.source}: the model {wanted.model} has no word for {encoded['training'].unknown:.0%} of "
            f"these texts: other languages than it has learnt. Nothing was started; give another --model, or none."
        )


def write_pairs(path: Path, held_out: Sequence[Pair]) -> None:
    """One JSON object a line."""
    lines = [msgspec.json.encode(pair._asdict()) for pair in held_out]
    path.write_bytes(b"\n".join([*lines, b""]))


def read_pairs(path: Path, most: int, seed: int) -> tuple[list[Pair], int]:
    """A random sample of at most ``most`` pairs, in their order; and how many there are."""
    lines = path.read_bytes().splitlines()
    chosen = np.sort(np.random.default_rng(seed).permutation(len(lines))[:most])
    return [Pair(**msgspec.json.decode(lines[i])) for i in chosen], len(lines)
