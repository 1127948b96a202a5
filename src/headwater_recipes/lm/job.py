"""The launching process of a run of this recipe: prepare the folder, and at the end write the report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from headwater_recipes.common import checkpoint, display, job, metrics
from headwater_recipes.common.stages import stage
from headwater_recipes.lm import corpus, finish, tokenizer
from headwater_recipes.lm.settings import RECIPE, Settings, check
from headwater_recipes.lm.windows import Windows

_SAME = 1e-4
"""Logits of the saved model may differ by this much from those in training: another order of summation."""


def prepare(wanted: Settings, run: Path | None, console: Console) -> Path:
    """Make the run folder: tokenizer, token arrays and settings.

    Raises:
        DataError: the corpus cannot be used, or the folder holds something. UsageError: a setting that cannot work.
    """
    check(wanted)
    if not checkpoint.free(run):
        checkpoint.new_folder(RECIPE.name, run)  # raises: says what is wrong, before any work is done
    begun = time.monotonic()
    with stage(console, "reading the corpus"):
        texts = corpus.from_paths([Path(p) for p in wanted.data]) if wanted.data else corpus.standard_library()
    with stage(console, f"learning {wanted.vocabulary:,} tokens from {texts.nbytes / 1e6:.1f} MB of text"):
        made = tokenizer.train(texts, wanted.vocabulary)
    with stage(console, "writing the text as tokens"):
        training, held_out = (tokenizer.encode(made, part) for part in (texts.training, texts.validation))
        arrays = tokenizer.Arrays(training, held_out, tokenizer.byte_lengths(made))
    Windows(arrays.training, wanted.seq, wanted.batch, 0, wanted.workers, wanted.seed)  # raises if there are too few
    with checkpoint.making(RECIPE.name, run) as folder:
        tokenizer.save(folder, made, arrays)
        checkpoint.begin(folder, wanted)
    source = "given" if wanted.data else "the standard library"
    skipped = f", {texts.skipped} binary files skipped" if texts.skipped else ""
    console.print(
        f"corpus: {source}, {len(texts.training)} files to train on, {len(texts.validation)} held out{skipped}; "
        f"{texts.nbytes / 1e6:.1f} MB in {(len(arrays.training) + len(arrays.validation)) / 1e6:.2f} M tokens of "
        f"{len(arrays.lengths)} ({time.monotonic() - begun:.1f} s)",
        soft_wrap=not console.is_terminal,
        highlight=False,
    )
    return folder


def resume(run: Path | None, changes: dict[str, Any]) -> Path:
    """See ``job.resume``."""
    return job.resume(RECIPE, run, changes)


class Job(job.Job[Settings]):
    """One launch of a run whose folder is ready."""

    def __init__(
        self, folder: Path, console: Console, restore: Path | None = None, *, only_rank0: bool = False
    ) -> None:
        super().__init__(RECIPE, folder, console, restore, only_rank0=only_rank0)

    def _report(self) -> None:
        s, say = self.settings, self._say
        found = finish.summary(self.folder, self.board, s.seq)
        metrics.plot(self.folder, self.board.rows, found["unigram_loss"])
        say("")
        say(
            f"trained {found['step']} steps in {display.clock(found['training_seconds'])}; "
            f"on {found['validation_tokens']:,} held-out tokens:"
        )
        for name, beside in (("validation", ""), ("unigram", "   (the baseline: no context)")):
            bits, loss = found[f"{name}_bits_per_byte"], found[f"{name}_loss"]
            say(f"  {name:<12} {bits:.3f} bits per byte   loss {loss:.3f}{beside}")
        difference = found["largest_logit_difference_of_saved_model"]
        verdict = "gives the same logits" if difference <= _SAME else "DOES NOT give the same logits"
        say(f"  AutoModelForCausalLM.from_pretrained {verdict} (largest difference {difference:.1e})")
        say("")
        say(finish.sample(self.folder, finish.prompt_of(self.folder, s.data), s.seed), whole=True)
        say("")
        say(f"{self.folder}: model.safetensors, config.json, tokenizer.json, metrics.jsonl, loss.png, report.json")
        say(f'go on writing: headwater generate --run {self.folder} --prompt "import os"', whole=True)
