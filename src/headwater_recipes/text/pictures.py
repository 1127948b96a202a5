"""A picture of what a classifier of texts does: what it makes of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


class Marked(NamedTuple):
    """A passage below its ``head``: the characters ``told`` are shaded, those of ``true`` underlined."""

    head: str
    passage: str
    told: tuple[int, int]
    true: tuple[int, int] = (0, 0)


_LINES = 14
"""Of a passage; a longer one is drawn around its marks."""
_WIDE = 110
"""Letters of a line of a passage."""
_SIZE = 8.0
"""Of letters, in points."""
_ADVANCE, _LINE = 0.602, 1.6
"""Of matplotlib's own monospaced letters, and from line to line, in parts of their size."""


def marked_passages(path: Path, passages: Sequence[Marked], title: str) -> None:
    """One below the other."""
    blocks = [(each, _around(_wrapped(each.passage), each)) for each in passages]
    lines = 2 + sum(len(lines) + each.head.count("\n") + 2 for each, lines in blocks)
    figure = new_figure((_WIDE + 4) * _SIZE * _ADVANCE / 72, lines * _SIZE * _LINE / 72)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2, _WIDE + 2), ylim=(lines, 0))
    axes.axis("off")
    axes.text(0, 1, title, fontsize=_SIZE + 2, va="center", parse_math=False)
    row = 2.5
    for each, wrapped in blocks:
        for line in each.head.split("\n"):
            axes.text(0, row, line[: _WIDE + 20], fontsize=_SIZE, va="center", weight="bold", parse_math=False)
            row += 1
        for start, line in wrapped:
            axes.text(0, row, line, fontsize=_SIZE, va="center", family="DejaVu Sans Mono", parse_math=False)
            for (first, last), drawn in ((each.told, "shade"), (each.true, "line")):
                left, right = max(first, start) - start, min(last, start + len(line)) - start
                if left < right and drawn == "shade":
                    axes.fill_between([left, right], row - 0.45, row + 0.45, color="#f4c95d", alpha=0.6, lw=0)
                elif left < right:
                    axes.plot([left, right], [row + 0.45] * 2, color="#2b6c3f", lw=1.6)
            row += 1
        row += 1
    figure.savefig(path, dpi=120)


def _around(lines: list[tuple[int, str]], each: Marked) -> list[tuple[int, str]]:
    """The lines about what is told, of a passage too long to be drawn, with dots where more was."""
    if len(lines) <= _LINES:
        return lines
    first = next((at for at, (start, line) in enumerate(lines) if start + len(line) > each.told[0]), 0)
    first = max(0, min(first - _LINES // 2, len(lines) - _LINES))
    before, after = [(-2, "…")] * (first > 0), [(-2, "…")] * (first + _LINES < len(lines))
    return [*before, *lines[first : first + _LINES], *after]


def _wrapped(text: str) -> list[tuple[int, str]]:
    """Lines, and the character at which each begins; as many characters as there were."""
    lines, start = [], 0
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    while start < len(text):
        end = start + _WIDE
        if end < len(text):
            end = max(text.rfind(" ", start, end) + 1, start + 1) if " " in text[start:end] else end
        lines.append((start, text[start:end]))
        start = end
    return lines
