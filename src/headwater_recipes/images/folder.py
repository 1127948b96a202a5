"""Folders of images as torchvision's ``ImageFolder`` and the ``imagefolder`` of ``datasets`` have them.

    DIR/CLASS/…/anything.jpg                          a tenth of each class is held out
    DIR/train/CLASS/…  and  DIR/test/CLASS/…          what is in test (or val, validation) is held out

or data sets that ``datasets`` finds by a name, or wrote into a folder: see ``common.hub``.

Files of other endings are no images and count for nothing; an image that cannot be read is left out and counted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headwater.errors import DataError
from headwater_recipes.common import hub
from headwater_recipes.common.unreadable import check_unreadable
from headwater_recipes.images.decode import Pixels, Unreadable, read_image, square
from headwater_recipes.images.store import Images, Split

ENDINGS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's IMG_EXTENSIONS
    | {".gif"}
)

HELD_OUT = ("test", "val", "validation", "valid")

Source = Path | hub.File

Classes = dict[str, list[Source]]
"""Files of images by the names of their classes."""

_EVERY = 10
"""One of so many is held out, where the folder does not say which."""


@dataclass(frozen=True)
class Gathered:
    """What a folder, or a data set, was read into. ``skipped``: what could not be read, and why."""

    images: Images
    skipped: list[str] = field(default_factory=list)


def read_folder(folder: str | Path, size: int) -> Gathered:
    """All images of a folder, or of a data set's name, ``size`` pixels wide and high.

    Raises:
        DataError: there are no images in subfolders, one class only, a held-out class that is not trained, more than
            ``unreadable.MOST_UNREADABLE`` of the images cannot be read, or what ``hub.files`` says.
    """
    training, held_out = _named_parts(str(folder)) if hub.finds(folder) else _parts(Path(folder))
    classes = tuple(training)
    strange = sorted(set(held_out) - set(classes))
    if strange:
        raise DataError(f"{folder}: class {strange[0]!r} is held out and has no images to train on")
    sides, skipped = [], []
    for part in (training, held_out):
        split, bad = _read([(path, classes.index(name)) for name in part for path in part[name]], size)
        sides.append(split)
        skipped += bad
    check_unreadable("images", sum(len(side.labels) for side in sides) + len(skipped), skipped)
    return Gathered(Images(classes, *sides), skipped)


def read_classes(folder: str | Path, size: int) -> tuple[tuple[str, ...], Split, list[str]]:
    """All images of DIR/CLASS/…, or of a data set's name, of which nothing is held out.

    Returns names of the classes, images, and what was left out.

    Raises:
        DataError: as ``read_folder``.
    """
    found: dict[str, list[Source]] = {}
    if hub.finds(folder):
        named = hub.files(str(folder), "Image")
        found = _by_class(named.names, [*named.training, *named.held_out])
    else:
        found.update(_classes(_there(Path(folder))))
    split, skipped = _read([(path, label) for label, name in enumerate(found) for path in found[name]], size)
    check_unreadable("images", len(split.labels) + len(skipped), skipped)
    return tuple(found), split, skipped


def _parts(folder: Path) -> tuple[Classes, Classes]:
    """The files to train on and those held out, by class."""
    apart = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
    if (_there(folder) / "train").is_dir() and apart is not None:
        return _classes(folder / "train"), _classes(apart)
    # By the file's name: which images are held out does not change when others are added.
    return _apart(_classes(folder), lambda file: Path(str(file)).relative_to(folder).as_posix())


def _named_parts(name: str) -> tuple[Classes, Classes]:
    found = hub.files(name, "Image")
    training = _by_class(found.names, found.training)
    if found.held_out:
        return training, _by_class(found.names, found.held_out)
    return _apart(training, lambda file: str(file).removeprefix(name))


def _by_class(names: Sequence[str], files: Iterable[hub.File]) -> Classes:
    found: Classes = {name: [] for name in names}
    for file in files:
        found[file.label].append(file)
    return {name: some for name, some in found.items() if some}


def _apart(found: Classes, mark: Callable[[Source], str]) -> tuple[Classes, Classes]:
    """Of each class a tenth, but one if it has two."""
    held_out = {name: [file for file in files if _held_out(mark(file))] for name, files in found.items()}
    for name, files in found.items():
        if len(files) > 1 and not held_out[name]:
            held_out[name] = files[-1:]
        if len(held_out[name]) == len(files):
            held_out[name] = held_out[name][1:]
    training = {name: [file for file in files if file not in set(held_out[name])] for name, files in found.items()}
    return training, held_out


def _there(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {_WANTED}")
    return folder


_WANTED = "give a folder that holds a subfolder of images for each class"


def _held_out(mark: str) -> bool:
    body = mark.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(body, digest_size=8).digest()) % _EVERY == 0


def _classes(folder: Path) -> Classes:
    found: Classes = {
        each.name: files
        for each in sorted(folder.iterdir())
        if each.is_dir() and not each.name.startswith(".") and (files := list[Source](sorted(_files(each))))
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


def _read(wanted: Sequence[tuple[Source, int]], size: int) -> tuple[Split, list[str]]:
    """The images that can be read, and what is wrong with the others."""

    def one(source: Source) -> Pixels | str:
        try:
            return square(read_image(source if isinstance(source, Path) else source.read_bytes()), size)
        except (Unreadable, OSError) as error:
            return f"{source}: {error}"

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
