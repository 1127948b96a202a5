"""The run folder: which boxes are where, and the network's first values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from headwater.errors import DataError
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data.errors import DataMissing
from headwater_recipes.detection import boxes
from headwater_recipes.detection.boxes import Picture, Pictures
from headwater_recipes.detection.settings import DetectionSettings
from headwater_recipes.images.decode import read_image

FILE = "boxes.json"
"""In the run folder, see ``Prepared``."""


class Measures(msgspec.Struct, frozen=True):
    """Of the training images: ``size``, width and height of the mean box in pixels; mean and deviation of each channel,
    0 to 1.
    """

    size: tuple[float, float]
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


class Prepared(msgspec.Struct, frozen=True):
    """The images' paths with their boxes, and what was measured of them once, for all workers."""

    pictures: Pictures
    measures: Measures


def prepare(wanted: DetectionSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``. Workers read the images where they are: of a ``datasets`` name in Headwater's cache."""
    with stage(console, "reading the boxes"):
        found = boxes.read(wanted.data)
    if len(found.training) < wanted.workers:
        raise DataError(
            f"{len(found.training)} images to learn from are fewer than the {wanted.workers} workers. Nothing was "
            f"started; give more images, or fewer --workers."
        )
    sides = found.training, found.held_out
    counts = [f"{len(part)} images with {sum(len(each.boxes) for each in part):,} boxes" for part in sides]
    left = (
        f"; {len(found.skipped)} left out as they cannot be read, the first: {found.skipped[0]}"
        if found.skipped
        else ""
    )
    with stage(console, "measuring boxes and colours"):
        prepared = Prepared(found, measure(found.training))
    say(console, f"boxes: {', '.join(found.classes[:6])}; {counts[0]} to learn from, {counts[1]} held out{left}")

    def fill(folder: Path) -> None:
        (folder / FILE).write_bytes(msgspec.json.encode(prepared))

    return fill


def load(folder: Path) -> Prepared:
    """What ``prepare`` wrote. Raises ``DataError``: it is missing or damaged, or an image is gone."""
    path = folder / FILE
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Prepared)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path}: {error}. The run cannot go on without it; start a new one.") from error
    pictures = found.pictures
    gone = next((each.path for each in (*pictures.training, *pictures.held_out) if not Path(each.path).is_file()), None)
    if gone is not None:
        raise DataMissing(f"{gone}: the image is not where it was when the run began. Put it back, or start a new run.")
    return found


def measure(training: list[Picture]) -> Measures:
    """The boxes of all images, the colours of up to 50."""
    corners = np.concatenate([each.corners for each in training if each.boxes]).astype(np.float64)
    size = np.exp(np.log(np.maximum(corners[:, 2:] - corners[:, :2], 1)).mean(0))
    pixels = (np.asarray(read_image(Path(each.path)), dtype=np.uint8) for each in training[:50])
    sample = np.concatenate([each[::7, ::7].reshape(-1, 3) for each in pixels]) / 255
    mean, deviation = sample.mean(0), np.maximum(sample.std(0), 1 / 255)
    return Measures(*(tuple(each.tolist()) for each in (size, mean, deviation)))
