"""Pieces of images: drawn and varied to learn from; side by side, overlapping, to find what is in a whole image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headwater_recipes.detection.boxes import Picture
from headwater_recipes.detection.model import MULTIPLE, Detections, Detector, peaks
from headwater_recipes.images.decode import Pixels, read_image

MOST = 1000
"""Boxes of a tile, and of an image."""
_KEPT = 0.4
"""A box of which less than this part is in a piece is none of it."""
_HELD = 512 << 20
"""Bytes of images in memory, beside the one that was read last."""


class Tile(NamedTuple):
    """``pixels`` uint8 (S, S, 3); ``boxes`` float32 (N, 4), clipped to it; ``labels`` int64 (N,)."""

    pixels: Pixels
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


_held: OrderedDict[str, Pixels] = OrderedDict()


def pixels_of(path: str) -> Pixels:
    """(H, W, 3) uint8."""
    if path in _held:
        _held.move_to_end(path)
        return _held[path]
    found = _held[path] = np.asarray(read_image(Path(path)), dtype=np.uint8)
    while len(_held) > 1 and sum(each.nbytes for each in _held.values()) > _HELD:
        _held.popitem(last=False)
    return found


def cut(picture: Picture, left: int, top: int, side: int) -> Tile:
    """A piece; what it has outside of the image is grey."""
    whole = pixels_of(picture.path)
    part = whole[max(0, top) : top + side, max(0, left) : left + side]
    pixels = np.full((side, side, 3), 128, np.uint8)
    y, x = max(0, -top), max(0, -left)
    pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
    boxes = picture.corners - np.array([left, top, left, top], np.float32)
    clipped = boxes.clip(0, side)
    area, before = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (clipped, boxes))
    kept = area >= _KEPT * before
    return Tile(pixels, clipped[kept], np.array(picture.labels, np.int64)[kept])


def drawn(pictures: list[Picture], side: int, random: np.random.Generator) -> Tile:
    """A piece of a random place and scale, turned and mirrored, in another light. Large images are drawn more often."""
    areas = np.array([each.width * each.height for each in pictures], np.float64) ** 0.5
    picture = pictures[random.choice(len(pictures), p=areas / areas.sum())]
    scale = float(np.exp(random.uniform(-0.3, 0.3)))
    reach = max(MULTIPLE, round(side / scale))
    left, top = (
        int(random.integers(min(0, most - reach), max(0, most - reach) + 1)) for most in (picture.width, picture.height)
    )
    return lit(turned(resized(cut(picture, left, top, reach), side), random), random)


def resized(tile: Tile, side: int) -> Tile:
    """The same piece of another size."""
    before = tile.pixels.shape[0]
    if before == side:
        return tile
    from PIL import Image

    pixels = np.asarray(Image.fromarray(tile.pixels).resize((side, side), Image.Resampling.BILINEAR))
    return Tile(pixels, tile.boxes * np.float32(side / before), tile.labels)


def turned(tile: Tile, random: np.random.Generator) -> Tile:
    """One of the eight ways to lay down a square."""
    pixels, boxes, side = tile.pixels, tile.boxes, tile.pixels.shape[0]
    if random.random() < 0.5:
        pixels, boxes = pixels[:, ::-1], np.stack([side - boxes[:, 2], boxes[:, 1], side - boxes[:, 0], boxes[:, 3]], 1)
    for _ in range(random.integers(4)):  # a quarter, against the clock
        pixels = np.rot90(pixels)
        boxes = np.stack([boxes[:, 1], side - boxes[:, 2], boxes[:, 3], side - boxes[:, 0]], 1)
    return Tile(np.ascontiguousarray(pixels), boxes, tile.labels)


def lit(tile: Tile, random: np.random.Generator) -> Tile:
    """Each channel by up to a quarter brighter or darker."""
    gain, light = random.uniform(0.8, 1.25, 3), random.uniform(-25, 25, 3)
    pixels = (tile.pixels * gain + light).clip(0, 255).astype(np.uint8)
    return tile._replace(pixels=pixels)


def grid(width: int, height: int, side: int) -> Iterator[tuple[int, int]]:
    """Left and top of pieces that cover an image; neighbours share a quarter."""
    step = side * 3 // 4
    for top in range(0, max(1, height - side // 4), step):
        for left in range(0, max(1, width - side // 4), step):
            yield left, top


def find(model: Detector, pixels: Pixels, least: float) -> Detections:
    """All boxes of an image (H, W, 3), surest first: of each piece those whose middle lies nearer to the piece's own
    than to a neighbour's, so that nothing is found twice.
    """
    height, width = pixels.shape[:2]
    side = model.settings.tile * 2
    margin = side // 8
    parts = []
    for left, top in grid(width, height, side):
        part = pixels[top : top + side, left : left + side]
        whole = [-(-each // MULTIPLE) * MULTIPLE for each in part.shape[:2]]
        padded = np.full((*whole, 3), 128, np.uint8)
        padded[: part.shape[0], : part.shape[1]] = part
        with torch.no_grad():
            told = model(model.scale(torch.from_numpy(padded)[None]))
        if not all(each.isfinite().all() for each in told):
            raise ValueError("the model's outputs are not finite: its training has diverged")
        found = peaks(told, model.settings.size, least, MOST)[0]
        boxes = found.boxes + torch.tensor([left, top, left, top])
        x, y = ((boxes[:, at] + boxes[:, at + 2]) / 2 for at in (0, 1))
        first, last = (
            (left + margin if left else 0, top + margin if top else 0),
            (left + side - margin, top + side - margin),
        )
        kept = (x >= first[0]) & (y >= first[1])
        kept &= (x < (last[0] if last[0] + margin < width else width)) & (
            y < (last[1] if last[1] + margin < height else height)
        )
        parts.append(Detections(boxes[kept], found.scores[kept], found.labels[kept]))
    boxes, scores, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    scores, order = scores.sort(descending=True, stable=True)
    boxes = boxes[order][:MOST].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    return Detections(boxes, scores[:MOST], labels[order][:MOST])
