"""What a kind of table is told of the values that a snapshot holds, to say whether they are all there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

VALUE = "value"
"""The slot of a parameter's own elements."""


class Extent(NamedTuple):
    """Elements ``start:stop`` of a slot. ``whole``: it has no element per element, and ``start`` says whose it is."""

    start: int
    stop: int
    dtype: str
    whole: bool


Saved = Callable[[int, str], Sequence[Extent]]
"""(parameter, slot) → what there is of it, in the order of ``start``."""
