"""Pictures that recipes share, by matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEGIBLE = 20
"""Up to so many classes the numbers are written into the matrix."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_confusion(path: Path, counts: npt.NDArray[np.int64], classes: Sequence[str], title: str) -> None:
    """Each row, a true class, coloured by its shares; ``counts`` as ``scores.confusion_matrix`` makes them."""
    many = len(classes)
    side = max(4.5, min(16.0, 0.62 * many + 2.5))
    figure = new_figure(side + 1, side)
    axes = figure.add_subplot()
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks: dict[str, Any] = {"fontsize": 8 if many <= 40 else 5}
    axes.set_xticks(range(many), classes, rotation=60, ha="right", rotation_mode="anchor", **ticks)
    axes.set_yticks(range(many), classes, **ticks)
    for row, column in np.argwhere(counts) if many <= _LEGIBLE else ():
        colour = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="said", ylabel="true", title=title)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class")
    figure.savefig(path, dpi=110)
