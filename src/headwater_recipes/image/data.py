"""From Fashion-MNIST, or the user's folder, to pixels and labels in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data import cache
from headwater_recipes.image import model
from headwater_recipes.image.settings import ImageSettings
from headwater_recipes.images.decode import Pixels
from headwater_recipes.images.folder import Gathered, read_folder
from headwater_recipes.images.idx import read_idx
from headwater_recipes.images.store import Images, Scale, Split

FASHION = "fashion-mnist"
"""Its name in the catalog."""

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def prepare(wanted: ImageSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    with stage(console, "reading the images"):
        found = read(wanted)
        images = found.images.check(wanted.workers)
        scale = Scale.of(images.training.pixels)
    if wanted.model:
        with stage(console, f"reading {wanted.model}"):
            model.begin(wanted.model, images.classes, wanted.seed)  # raises if it cannot be read

    def fill(folder: Path) -> None:
        images.save(folder)
        scale.processor(wanted.size).save_pretrained(folder)
        say(console, _describe(wanted, found))

    return fill


def read(wanted: ImageSettings) -> Gathered:
    """The images that a run is about. Raises ``DataError``."""
    if not wanted.data:
        return Gathered(read_fashion(cache.folder(FASHION), wanted.size))
    if len(wanted.data) > 1:
        raise UsageError(f"--data: {len(wanted.data)} folders were given; give the one that holds all classes")
    return read_folder(wanted.data[0], wanted.size)


def read_fashion(folder: Path, size: int) -> Images:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 images to train on, 10,000 held out, as its authors say.

    Any data set of ten classes in MNIST's four files is read. Raises ``DataError`` if they are damaged.
    """
    splits = []
    for name in ("train", "t10k"):
        pixels = read_idx(_one(folder, f"{name}-images-idx3-ubyte.gz"), 3)
        labels = read_idx(_one(folder, f"{name}-labels-idx1-ubyte.gz"), 1)
        if len(pixels) != len(labels):
            raise DataError(f"{folder}: {len(pixels)} images of {name} have {len(labels)} labels")
        splits.append(Split(_resized(pixels, size)[..., None], labels.astype(np.int64)))
    return Images(FASHION_CLASSES, *splits)


def _one(folder: Path, name: str) -> Path:
    """The file of this name, however deep: Debian's package keeps its folders."""
    return next(iter(sorted(folder.rglob(name))), folder / name)


def _resized(pixels: Pixels, size: int) -> Pixels:
    if pixels.shape[1:] == (size, size):
        return pixels
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(each).resize((size, size), bilinear)) for each in pixels])


def _describe(wanted: ImageSettings, found: Gathered) -> str:
    images = found.images
    source = wanted.data[0] if wanted.data else "Fashion-MNIST"
    text = (
        f"images: {source}, {len(images.classes)} classes, {len(images.training.labels):,} to train on, "
        f"{len(images.held_out.labels):,} held out"
    )
    if found.skipped:
        text += f"; {len(found.skipped)} left out as they cannot be read, the first: {found.skipped[0]}"
    return text
