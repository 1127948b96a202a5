"""The run folder: which boxes are where, and the network's first values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from headwater.errors import DataError
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data.errors import DataMissing
from headwater_recipes.detection import boxes
from headwater_recipes.detection.boxes import Picture, Pictures
from headwater_recipes.detection.settings import DetectionSettings

FILE = "boxes.json"
"""The images' paths and their boxes, in the run folder."""


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
    say(console, f"boxes: {', '.join(found.classes[:6])}; {counts[0]} to learn from, {counts[1]} held out{left}")

    def fill(folder: Path) -> None:
        (folder / FILE).write_bytes(msgspec.json.encode(found))

    return fill


def load(folder: Path) -> Pictures:
    """What ``prepare`` wrote. Raises ``DataError``: it is missing or damaged, or an image is gone."""
    path = folder / FILE
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Pictures)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path}: {error}. The run cannot go on without it; start a new one.") from error
    gone = next((each.path for each in (*found.training, *found.held_out) if not Path(each.path).is_file()), None)
    if gone is not None:
        raise DataMissing(f"{gone}: the image is not where it was when the run began. Put it back, or start a new run.")
    return found


def measures(training: list[Picture], pixels: Callable[[str], Any]) -> dict[str, Any]:
    """Of the training images: the mean box, and mean and deviation of the colours (of up to 50 of them)."""
    corners = np.concatenate([each.corners for each in training if each.boxes]).astype(np.float64)
    sample = np.concatenate([pixels(each.path)[::7, ::7].reshape(-1, 3) for each in training[:50]]) / 255
    size = np.exp(np.log(np.maximum(corners[:, 2:] - corners[:, :2], 1)).mean(0))
    return {
        "size": tuple(map(float, size)),
        "mean": tuple(map(float, sample.mean(0))),
        "deviation": tuple(map(float, np.maximum(sample.std(0), 1 / 255))),
    }
