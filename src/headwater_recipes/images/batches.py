"""Which images a rank is given at a step, and how they are varied.

Legend: B batch, S side in pixels, C channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from headwater_recipes.images.decode import Pixels

Augment = Literal["none", "shift", "flip", "warp"]
"""``shift``: moved by up to a fourteenth of the side, black comes in; ``flip``: half of them mirrored as well;
``warp``: see that function."""


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
    if kind == "warp":
        return warp(pixels, random)
    side = pixels.shape[1]
    reach = max(1, side // 14)
    around = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    corners = random.integers(0, 2 * reach + 1, (len(pixels), 2))
    moved = np.stack([each[y : y + side, x : x + side] for each, (y, x) in zip(around, corners, strict=True)])
    if kind == "flip":
        mirrored = random.random(len(pixels)) < 0.5
        moved[mirrored] = moved[mirrored, :, ::-1]
    return moved


def warp(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """(B, S, S, C) pixels, each turned by up to 0.2 rad, scaled by up to 15 %, moved by up to 7.5 % of the side, in
    another light, half of them mirrored, and with a square of a third of the side hidden (DeVries and Taylor, 2017).
    """
    count, side = pixels.shape[:2]
    angle, scale = random.uniform(-0.2, 0.2, count), random.uniform(0.85, 1.15, count)
    mirror = random.choice([-1.0, 1.0], count)
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    move = random.uniform(-0.15, 0.15, (2, count))  # of half a side, in which the grid is measured
    rows = [np.stack([cosine * mirror, -sine, move[0]], 1), np.stack([sine * mirror, cosine, move[1]], 1)]
    grid = F.affine_grid(torch.from_numpy(np.stack(rows, 1)).float(), [count, 1, side, side], align_corners=False)
    values = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    values = F.grid_sample(values, grid, padding_mode="border", align_corners=False)
    gain, light = random.uniform(0.7, 1.3, (count, 1, 1, 1)), random.uniform(-50, 50, (count, 1, 1, 1))
    found = np.clip(values.permute(0, 2, 3, 1).numpy() * gain + light, 0, 255).astype(np.uint8)
    hidden = max(1, side // 3)
    for image, (y, x) in zip(found, random.integers(0, side - hidden + 1, (count, 2)), strict=True):
        image[y : y + hidden, x : x + hidden] = 128
    return found
