"""A picture of what a classifier of texts does: what it makes of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headwater_recipes.common.pictures import new_figure

_COLUMNS = 4


def telling_words(path: Path, words: Mapping[str, Sequence[tuple[str, float]]], title: str) -> None:
    """Of each class the words with their probabilities of it, most telling first."""
    columns = min(_COLUMNS, len(words))
    rows = -(-len(words) // columns)
    longest = max((len(found) for found in words.values()), default=1)
    figure = new_figure(3.4 * columns, (0.19 * longest + 0.7) * rows + 0.5)
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
