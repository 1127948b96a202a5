"""Pictures of what a classifier of texts does: its confusions, and what it makes of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEGIBLE = 20
"""Up to so many classes the numbers are written into the matrix."""
_COLUMNS = 4


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def confusions(path: Path, counts: npt.NDArray[np.int64], names: Sequence[str], title: str) -> None:
    """Each row (a true class) coloured by its shares; ``counts`` (C, C)."""
    many = len(names)
    side = max(4.0, min(16.0, 0.5 * many + 2.5))
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks: dict[str, Any] = {"fontsize": 9 if many <= _LEGIBLE else 5}
    axes.set_xticks(range(many), names, rotation=45, ha="right", rotation_mode="anchor", **ticks)
    axes.set_yticks(range(many), names, **ticks)
    for row, column in np.argwhere(counts) if many <= _LEGIBLE else ():
        colour = "white" if share[row, column] > 0.5 else "black"
        size = 11 if many <= 6 else 7
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=size)
    axes.set(xlabel="said", ylabel="true", title=title)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class")
    figure.savefig(path, dpi=120)


def telling_words(path: Path, words: Mapping[str, Sequence[tuple[str, float]]], title: str) -> None:
    """Of each class the words with their probabilities of it, most telling first."""
    columns = min(_COLUMNS, len(words))
    rows = -(-len(words) // columns)
    longest = max((len(found) for found in words.values()), default=1)
    figure = _figure(3.4 * columns, (0.19 * longest + 0.7) * rows + 0.5)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, found) in zip(grid.flat, words.items(), strict=False):
        axes.axis("on")
        axes.barh(range(len(found)), [value for _, value in found], color="#4878a8")
        axes.set_yticks(range(len(found)), [word for word, _ in found], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(name, fontsize=10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
