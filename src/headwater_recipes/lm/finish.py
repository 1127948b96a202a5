"""After training: the curve, a sample and the summary, all in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headwater_recipes.lm import checkpoint, evaluate, tokenizer
from headwater_recipes.lm.board import Board
from headwater_recipes.lm.evaluate import Score
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


def read_rows(folder: Path, upto: int | None = None) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` up to a step; a last line that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if upto is None or row["step"] <= upto:
            rows.append(row)
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replace ``metrics.jsonl``."""
    beside = folder / "metrics.jsonl.new"
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    beside.replace(folder / "metrics.jsonl")


def plot(folder: Path, rows: list[dict[str, Any]], unigram: float | None = None) -> None:
    """``loss.png``: training and validation loss by step, in nats per token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row for row in rows if row["kind"] == "step"]
    held = [row for row in rows if row["kind"] == "validation"]
    final = [row for row in rows if row["kind"] == "final"]
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="#4878a8", lw=1.2, label="training")
    if held:
        axes.plot(
            [r["step"] for r in held],
            [r["loss"] for r in held],
            "o-",
            color="#c8553d",
            ms=4,
            label="part of the held-out text",
        )
    if final:
        axes.plot(
            [r["step"] for r in final],
            [r["loss"] for r in final],
            "*",
            color="#c8553d",
            ms=11,
            label="all held-out text",
        )
    if unigram is not None:
        axes.axhline(unigram, color="#888888", ls="--", lw=1, label="unigram baseline")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"Headwater: {folder.name}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=120)
