"""Folders of images as torchvision's ``ImageFolder`` and the ``imagefolder`` of ``datasets`` have them.

    DIR/CLASS/…/anything.jpg                          a tenth of each class is held out
    DIR/train/CLASS/…  and  DIR/test/CLASS/…          what is in test (or val, validation) is held out

Files of other endings are no images and count for nothing; an image that cannot be read is left out and counted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headwater.errors import DataError
from headwater_recipes.images.decode import Pixels, Unreadable, read_image, square
from headwater_recipes.images.store import Images, Split

ENDINGS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's IMG_EXTENSIONS
    | {".gif"}
)

HELD_OUT = ("test", "val", "validation", "valid")

MOST_UNREADABLE = 0.1
"""Share of a folder's images above which they are not left out any more: something else is wrong."""

_EVERY = 10
"""One of so many is held out, where the folder does not say which."""


@dataclass(frozen=True)
class Gathered:
    """What a folder was read into. ``skipped``: what could not be read, and why."""

    images: Images
    skipped: list[str] = field(default_factory=list)


def read_folder(folder: Path, size: int) -> Gathered:
    """All images of a folder, ``size`` pixels wide and high.

    Raises:
        DataError: there are no images in subfolders, one class only, a held-out class that is not trained, or more
            than ``MOST_UNREADABLE`` of the images cannot be read.
    """
    training, held_out = _parts(folder)
    classes = tuple(training)
    strange = sorted(set(held_out) - set(classes))
    if strange:
        raise DataError(f"{folder}: class {strange[0]!r} is held out and has no images to train on")
    sides, skipped = [], []
    for part in (training, held_out):
        split, bad = _read([(path, classes.index(name)) for name in part for path in part[name]], size)
        sides.append(split)
        skipped += bad
    _check_skipped(folder, sum(len(side.labels) for side in sides), skipped)
    return Gathered(Images(classes, *sides), skipped)


def read_classes(folder: Path, size: int) -> tuple[tuple[str, ...], Split, list[str]]:
    """All images of DIR/CLASS/…, of which nothing is held out: names of the classes, images, and what was left out.

    Raises:
        DataError: as ``read_folder``.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {_WANTED}")
    found = _classes(folder)
    split, skipped = _read([(path, label) for label, name in enumerate(found) for path in found[name]], size)
    _check_skipped(folder, len(split.labels), skipped)
    return tuple(found), split, skipped


def _check_skipped(folder: Path, read: int, skipped: Sequence[str]) -> None:
    total = read + len(skipped)
    if len(skipped) > MOST_UNREADABLE * total:
        raise DataError(
            f"{folder}: {len(skipped)} of {total} images cannot be read, above {MOST_UNREADABLE:.0%}; the first is "
            f"{skipped[0]}. Nothing was started; mend or remove them."
        )


def _parts(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The files to train on and those held out, by class."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {_WANTED}")
    apart = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and apart is not None:
        return _classes(folder / "train"), _classes(apart)
    found = _classes(folder)
    held_out = {name: [path for path in paths if _held_out(folder, path)] for name, paths in found.items()}
    for name, paths in found.items():
        if len(paths) > 1 and not held_out[name]:
            held_out[name] = paths[-1:]
        if len(held_out[name]) == len(paths):
            held_out[name] = held_out[name][1:]
    training = {name: [path for path in paths if path not in set(held_out[name])] for name, paths in found.items()}
    return training, held_out


_WANTED = "give a folder that holds a subfolder of images for each class"


def _held_out(folder: Path, path: Path) -> bool:
    """By the file's name: which images are held out does not change when others are added."""
    name = path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) % _EVERY == 0


def _classes(folder: Path) -> dict[str, list[Path]]:
    found = {
        each.name: files
        for each in sorted(folder.iterdir())
        if each.is_dir() and not each.name.startswith(".") and (files := sorted(_files(each)))
    }
    if not found:
        raise DataError(f"{folder}: no images in subfolders; {_WANTED}")
    return found


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in ENDINGS and not name.startswith("."):
                yield Path(place, name)


def _read(wanted: Sequence[tuple[Path, int]], size: int) -> tuple[Split, list[str]]:
    """The images that can be read, and what is wrong with the others."""

    def one(path: Path) -> Pixels | str:
        try:
            return square(read_image(path), size)
        except Unreadable as error:
            return f"{path}: {error}"

    pixels = np.empty((len(wanted), size, size, 3), np.uint8)
    labels: list[int] = []
    bad: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found, (_, label) in zip(pool.map(one, (path for path, _ in wanted)), wanted, strict=True):
            if isinstance(found, str):
                bad.append(found)
                continue
            pixels[len(labels)] = found
            labels.append(label)
    return Split(pixels[: len(labels)], np.array(labels, np.int64)), bad
