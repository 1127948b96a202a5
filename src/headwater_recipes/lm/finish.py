"""After training: a sample and the summary, in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwater_recipes.common import checkpoint
from headwater_recipes.common.board import Board
from headwater_recipes.common.score import Score
from headwater_recipes.lm import evaluate, tokenizer
from headwater_recipes.lm.generation import generate_text

PROMPT = "def __init__(self"
"""What the sample at the end begins with, when the corpus is the standard library."""


def baseline(folder: Path, length: int) -> Score:
    """The unigram model's score on the windows of the final validation."""
    arrays = tokenizer.load_arrays(folder)
    length = evaluate.fits(arrays, length)
    return evaluate.unigram(arrays, evaluate.starts(arrays, length), length)


def summary(folder: Path, board: Board, length: int) -> dict[str, Any]:
    """The figures of the run; written to ``report.json``."""
    assert board.final is not None
    unigram = baseline(folder, length)
    done = board.finished[0]
    found = {
        "step": done.step,
        "training_seconds": round(done.elapsed, 1),
        "validation_loss": board.final.loss,
        "validation_bits_per_byte": board.final.bits_per_byte,
        "unigram_loss": unigram.loss,
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "validation_tokens": board.final.tokens,
        "validation_bytes": board.final.nbytes,
        "largest_logit_difference_of_saved_model": done.difference,
    }
    checkpoint.write_json(folder / "report.json", found)
    return found


def sample(folder: Path, prompt: str, seed: int) -> str:
    """Generated text; written to ``sample.txt``."""
    text = generate_text(folder, prompt, max_new_tokens=160, seed=seed)
    (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
    return text


def prompt_of(folder: Path, data: tuple[str, ...]) -> str:
    """The first words of the held-out text; of the standard library ``def``, a start that it can do something with."""
    if not data:
        return PROMPT
    tokens = tokenizer.load_arrays(folder).validation[:8].tolist()
    return str(tokenizer.load(folder).decode(tokens, skip_special_tokens=True))
