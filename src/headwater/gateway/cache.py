"""Keys and values of the sequences that run on one version: memory only, no model and no version is known here.

One row per sequence, rows 0 to n without gaps, so that a forward over all of them reads a plain view: nothing is
gathered, nothing is copied but the new token's own keys and values. When a sequence ends the last row moves into its
place, and what it leaves behind is zeroed: no answer can be made of another's.

Shapes: R rows, H heads of keys and values, L positions, D width of a head, Q new positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST = 128
"""Positions of the first allocation; doubled whenever a sequence outgrows it."""


@dataclass(frozen=True, slots=True)
class Window:
    """What one forward writes and reads: rows ``first`` and on, each at its own positions.

    ``positions``, (R, Q) int64, are where the new keys go; positions up to ``length`` (not included) are read.
    """

    first: int
    positions: Tensor
    length: int
    order: Tensor = field(init=False)
    """0 to R - 1, (R, 1): made once for all layers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", torch.arange(self.rows, device=self.positions.device)[:, None])

    @property
    def rows(self) -> int:
        return self.positions.shape[0]


class KeyValues:
    """The key-value memory of one version, for at most ``slots`` rows of at most ``context`` positions.

    It is allocated as it is needed, doubling in both directions, and so holds at most ``slots`` × ``context`` positions
    (while a layer grows, its old memory is there as well). Layers may differ in heads and width: each is laid out by
    the first keys that it is given.
    """

    def __init__(self, layers: int, slots: int, context: int) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._slots = slots
        self._context = context
        self.rows = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers if layer for tensor in layer)

    @property
    def nbytes_of_position(self) -> int:
        """Bytes of one position of one row, in all layers; 0 before the first forward."""
        return self.nbytes // (self.rows * self.length) if self.rows and self.length else 0

    def reserve(self, rows: int, length: int) -> None:
        """Make room for ``rows`` rows of ``length`` positions; what is stored stays."""
        if rows > self.rows or length > self.length:
            self._resize(
                min(max(_doubled(rows, 1), self.rows), self._slots),
                min(max(_doubled(length, _FIRST), self.length), self._context),
            )

    def shrink(self, rows: int) -> None:
        """Give memory back once no more than half of the rows are in use; the first ``rows`` stay."""
        if rows * 2 <= self.rows:
            self._resize(rows, self.length)

    def free(self) -> None:
        """Give all memory back."""
        self._layers = [None] * len(self._layers)
        self.rows = self.length = 0

    def _resize(self, rows: int, length: int) -> None:
        kept_rows, kept_length = min(rows, self.rows), min(length, self.length)
        for index, layer in enumerate(self._layers):
            if layer is not None:
                self._layers[index] = tuple(_resized(t, rows, length, kept_rows, kept_length) for t in layer)  # type: ignore[assignment]
        self.rows, self.length = rows, length

    def update(self, layer: int, keys: Tensor, values: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (R, H, Q, D); returns views of all in these rows: (R, H, L, D)."""
        stored = self._layers[layer]
        if stored is None:
            stored = self._layers[layer] = (self._empty(keys), self._empty(values))
        return _written(stored[0], keys, window), _written(stored[1], values, window)

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(self.rows, heads, self.length, width)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first ``length`` positions over another row, and zero it where it was."""
        for layer in self._layers:
            for tensor in layer or ():
                tensor[target, :, :length] = tensor[source, :, :length]
        self.clear(source, length)

    def clear(self, row: int, length: int) -> None:
        """Zero a row. Masked positions still take part with weight 0, and 0 × NaN is NaN: nothing may linger."""
        for layer in self._layers:
            for tensor in layer or ():
                tensor[row, :, :length].zero_()


def _written(stored: Tensor, new: Tensor, window: Window) -> Tensor:
    rows, queries = window.positions.shape
    here = stored[window.first : window.first + rows]
    if rows == 1:
        start = window.length - queries
        here[:, :, start : window.length] = new
    else:
        here[window.order, :, window.positions] = new.transpose(1, 2)
    return here[:, :, : window.length]


def _resized(tensor: Tensor, rows: int, length: int, kept_rows: int, kept_length: int) -> Tensor:
    _, heads, _, width = tensor.shape
    bigger = tensor.new_zeros(rows, heads, length, width)
    bigger[:kept_rows, :, :kept_length] = tensor[:kept_rows, :, :kept_length]
    return bigger


def _doubled(wanted: int, unit: int) -> int:
    """The smallest ``unit`` × 2ⁿ that holds ``wanted``."""
    while unit < wanted:
        unit *= 2
    return unit
