"""Passages with marks, whatever stands in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwater_recipes.text import pictures
from headwater_recipes.text.pictures import Marked, marked_passages

SHADE = (244, 201, 93)


def _drawn(path: Path, *marked: Marked) -> tuple[int, int]:
    """The picture's height, and how many of its dots are shaded."""
    marked_passages(path, marked, "a $title")
    dots = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # The shade is drawn over white by 0.6.
    shade = np.array([255 - 0.6 * (255 - each) for each in SHADE])
    return len(dots), int((abs(dots - shade).max(2) <= 4).sum())


def test_formulas_and_prices_are_drawn_as_they_stand(tmp_path: Path) -> None:
    marked = Marked("$5 or $\\frac$?\n→ $5; true: $6", r"It is \$5 or $6 or $\frac{$.", (6, 9), (13, 15))
    assert _drawn(tmp_path / "a.png", marked)[1] > 100


@pytest.mark.parametrize("place", [0, 150_000, 299_990])
def test_of_a_long_passage_what_is_told_is_drawn(tmp_path: Path, place: int) -> None:
    text = "word " * 60_000
    short, _ = _drawn(tmp_path / "a.png", Marked("q", text[: pictures._WIDE * pictures._LINES], (0, 9)))
    height, shaded = _drawn(tmp_path / "b.png", Marked("q", text, (place, place + 9)))
    assert shaded > 100
    assert height < 1.5 * short
