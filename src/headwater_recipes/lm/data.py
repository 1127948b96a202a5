"""Text files to a tokenizer and its token arrays, in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from headwater_recipes.common.stages import say, stage
from headwater_recipes.lm.settings import LmSettings
from headwater_recipes.text import corpus, tokenizer
from headwater_recipes.text.windows import Windows


def prepare(wanted: LmSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    begun = time.monotonic()
    with stage(console, "reading the corpus"):
        texts = corpus.from_paths([Path(p) for p in wanted.data]) if wanted.data else corpus.standard_library()
    with stage(console, f"learning {wanted.vocabulary:,} tokens from {texts.nbytes / 1e6:.1f} MB of text"):
        made = tokenizer.train(texts, wanted.vocabulary)
    with stage(console, "writing the text as tokens"):
        training, held_out = (tokenizer.encode(made, part) for part in (texts.training, texts.validation))
        arrays = tokenizer.Arrays(training, held_out, tokenizer.byte_lengths(made))
    Windows(arrays.training, wanted.seq, wanted.batch, 0, wanted.workers, wanted.seed)  # raises if there are too few
    source = "given" if wanted.data else "the standard library"

    def fill(folder: Path) -> None:
        tokenizer.save(folder, made, arrays)
        say(console, f"corpus: {source}, {_describe(texts, arrays)} ({time.monotonic() - begun:.1f} s)")

    return fill


def _describe(texts: corpus.Corpus, arrays: tokenizer.Arrays) -> str:
    skipped = f", {texts.skipped} binary files skipped" if texts.skipped else ""
    return (
        f"{len(texts.training)} files to train on, {len(texts.validation)} held out{skipped}; "
        f"{texts.nbytes / 1e6:.1f} MB in {(len(arrays.training) + len(arrays.validation)) / 1e6:.2f} M tokens of "
        f"{len(arrays.lengths)}"
    )
