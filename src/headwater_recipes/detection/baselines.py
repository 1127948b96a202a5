"""What boxes are compared with: a grid of mean boxes, and green blobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headwater_recipes.detection import tiles
from headwater_recipes.detection.boxes import Picture
from headwater_recipes.detection.model import Detections

Array = npt.NDArray[Any]


def of(training: Sequence[Picture], held: Sequence[Picture], classes: int) -> dict[str, list[Detections]]:
    """Of each held-out image what each says. All is of the commonest class."""
    corners = np.concatenate([each.corners for each in training if each.boxes])
    size = (corners[:, 2:] - corners[:, :2]).mean(0)
    label = int(np.bincount([label for each in training for label in each.labels], minlength=classes).argmax())
    return {
        "mean_boxes": [_grid(each, size, label) for each in held],
        "green_blobs": [_blobs(each, size, label) for each in held],
    }


def _grid(picture: Picture, size: Array, label: int) -> Detections:
    """Side by side over the whole image, all as sure."""
    x, y = np.meshgrid(
        *(np.arange(each / 2, most, each) for each, most in zip(size, (picture.width, picture.height), strict=True))
    )
    even = np.linspace(0, x.size - 1, min(x.size, tiles.MOST)).astype(int)
    return _around(np.stack([x.ravel(), y.ravel()], 1)[even], np.ones(len(even)), size, label)


def _blobs(picture: Picture, size: Array, label: int) -> Detections:
    """Mean boxes around the peaks of how green the image is (2 g - r - b), smoothed by a quarter of the mean box."""
    from scipy import ndimage

    red, green, blue = tiles.pixels_of(picture.path).astype(np.float32).transpose(2, 0, 1)
    smooth = ndimage.gaussian_filter(2 * green - red - blue, float(size.mean()) / 4)
    high = (smooth == ndimage.maximum_filter(smooth, int(size.mean() / 2))) & (smooth > smooth.mean())
    y, x = np.nonzero(high)
    return _around(np.stack([x, y], 1), smooth[y, x], size, label)


def _around(middles: Array, scores: Array, size: Array, label: int) -> Detections:
    order = np.argsort(-scores, kind="stable")[: tiles.MOST]
    boxes = np.concatenate([middles[order] - size / 2, middles[order] + size / 2], 1)
    labels = torch.full((len(order),), label, dtype=torch.int64)
    return Detections(
        torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(scores[order].astype(np.float32)), labels
    )
