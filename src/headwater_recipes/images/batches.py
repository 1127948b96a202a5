"""Which images a rank is given at a step, and how they are varied.

Legend: B batch, S side in pixels, C channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from headwater_recipes.images.decode import Pixels

Augment = Literal["none", "shift", "flip"]
"""``shift``: moved by up to a fourteenth of the side, black comes in; ``flip``: half of them mirrored as well."""


class Order:
    """Each epoch visits every one of ``count`` things once, in a random order.

    What a rank is given depends on (seed, rank, world, step) only, so a run can go on anywhere.
    """

    def __init__(self, count: int, batch: int, rank: int, world: int, seed: int) -> None:
        self._count, self._batch = count, batch
        self._rank, self._world, self._seed = rank, world, seed
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)

    def places(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of this rank's things at a step, shape (B,)."""
        first = (step * self._world + self._rank) * self._batch
        found = (divmod(index, self._count) for index in range(first, first + self._batch))
        return np.array([self._order(epoch)[place] for epoch, place in found])


def vary(pixels: Pixels, kind: Augment, random: np.random.Generator) -> Pixels:
    """(B, S, S, C) pixels, each varied by itself."""
    if kind == "none":
        return pixels
    side = pixels.shape[1]
    reach = max(1, side // 14)
    around = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    corners = random.integers(0, 2 * reach + 1, (len(pixels), 2))
    moved = np.stack([each[y : y + side, x : x + side] for each, (y, x) in zip(around, corners, strict=True)])
    if kind == "flip":
        mirrored = random.random(len(pixels)) < 0.5
        moved[mirrored] = moved[mirrored, :, ::-1]
    return moved
