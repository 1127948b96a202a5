"""``metrics.jsonl`` and ``loss.png`` of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headwater_recipes.common import checkpoint
from headwater_recipes.common.pictures import new_figure
from headwater_recipes.common.recipe import Wording


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
    checkpoint.replace(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def plot(folder: Path, rows: list[dict[str, Any]], wording: Wording, baseline: tuple[str, float] | None = None) -> None:
    """``loss.png``: training and validation loss by step, beside the name and value of a ``baseline``."""
    figure = new_figure(8, 4.5)
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
            label=f"part of the held-out {wording.data}",
        )
    if final:
        axes.plot(
            [r["step"] for r in final],
            [r["loss"] for r in final],
            "*",
            color="#c8553d",
            ms=11,
            label=f"all held-out {wording.data}",
        )
    if baseline is not None:
        axes.axhline(baseline[1], color="#888888", ls="--", lw=1, label=baseline[0])
    axes.set(
        xlabel="step", ylabel=f"loss ({wording.loss})" if wording.loss else "loss", title=f"Headwater: {folder.name}"
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=120)
