"""Boxes of images: from the catalog's trees, CSV, COCO's JSON or a ``datasets`` name; checked against their images.

A box is xmin, ymin, xmax, ymax in pixels, of which the first two are inside and the others the first outside. What is
over an image's edge by no more than ``SLACK`` is clipped, as annotation tools round; more of it, or no area, is an
error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from headwater.errors import DataError
from headwater_recipes.common import checkpoint, hub
from headwater_recipes.common.parts import part_file
from headwater_recipes.common.unreadable import check_unreadable
from headwater_recipes.data import cache
from headwater_recipes.images.decode import Unreadable, read_image

TREES = "tree-crowns"
"""Its name in the catalog."""
HELD_OUT_TREES = "2019_YELL_2_541000_4977000_image_crop"
"""Taken 13 km from the other image of Yellowstone; the other two are of Florida and of California."""

SLACK = 2.0
"""Pixels."""
_EVERY = 10
"""One image in so many is held out, where the data have no part that is."""
_COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax", "label")
_SUFFIXES = (".csv", ".json")


class Picture(msgspec.Struct, frozen=True):
    """An image and what is in it.

    Attributes:
        path: the file.
        boxes: (N, 4), see the module.
        labels: (N,) indices of classes.
        width, height: pixels.
    """

    path: str
    boxes: list[tuple[float, float, float, float]]
    labels: list[int]
    width: int
    height: int

    @property
    def corners(self) -> npt.NDArray[np.float32]:
        """(N, 4) float32."""
        return np.array(self.boxes, np.float32).reshape(-1, 4)


class Pictures(msgspec.Struct, frozen=True):
    """What a run is about. ``skipped``: images that cannot be read, and why."""

    classes: list[str]
    training: list[Picture]
    held_out: list[Picture]
    skipped: list[str] = []


class _Raw(msgspec.Struct):
    """An image's boxes as they were read; ``places`` says where each stood, ``row`` what the image is called where its
    path is the cache's.
    """

    path: Path
    boxes: list[tuple[float, float, float, float]]
    labels: list[str]
    places: list[str]
    row: str = ""


def read(names: Iterable[str]) -> Pictures:
    """What ``--data`` names. Raises ``DataError``."""
    training: list[_Raw] = []
    held_out: list[_Raw] = []
    given = tuple(dict.fromkeys(names))
    for name in given or (TREES,):
        learnt, aside = _sources(name)
        training += learnt
        held_out += aside
    training, held_out = _merged(training), _merged(held_out)
    if not held_out:
        training, held_out = _apart(training)
    _check_apart(training, held_out)
    classes = sorted({label for raw in training for label in raw.labels})
    source = ", ".join(Path(name).name for name in given) or TREES
    if not classes:
        raise DataError(f"{source}: no box to learn from. Nothing was started; give images with boxes.")
    skipped: list[str] = []
    sides = [
        [found for raw in part if (found := _checked(raw, classes, skipped)) is not None]
        for part in (training, held_out)
    ]
    total = len(training) + len(held_out)
    check_unreadable("images", total, skipped)
    if not any(each.boxes for each in sides[0]):
        raise DataError(
            f"{source}: no image to learn from that can be read has a box. Nothing was started; mend it: {skipped[0]}."
        )
    if not sides[1] or not any(each.boxes for each in sides[1]):
        raise DataError(
            f"{source}: no held-out image has a box, so nothing could be said of the model. Give more images."
        )
    return Pictures(classes, sides[0], sides[1], skipped)


def _merged(found: list[_Raw]) -> list[_Raw]:
    """Each image once, with the boxes of all who name it: half of its boxes would teach that the others are none."""
    once: dict[Path, _Raw] = {}
    for each in found:
        first = once.setdefault(each.path.resolve(), _Raw(each.path, [], [], [], each.row))
        known = set(zip(first.boxes, first.labels, strict=True))  # a box that both have is one
        for box, label, place in zip(each.boxes, each.labels, each.places, strict=True):
            if (box, label) not in known:
                first.boxes.append(box)
                first.labels.append(label)
                first.places.append(place)
    return list(once.values())


def _apart(found: list[_Raw]) -> tuple[list[_Raw], list[_Raw]]:
    """Of the images about a tenth, one with boxes at least, drawn by the files' names, so that a file more moves no
    other to its other side; none that has the only boxes of a class.
    """
    left = Counter(label for each in found for label in set(each.labels))
    held_out: dict[Path, _Raw] = {}
    for each in sorted(found, key=lambda each: (not each.boxes, _draw(each) % _EVERY > 0, _draw(each))):
        drawn = _draw(each) % _EVERY == 0 or not held_out
        if drawn and all(left[label] > 1 for label in set(each.labels)) and (each.boxes or held_out):
            held_out[each.path] = each
            left.subtract(set(each.labels))
    return [each for each in found if each.path not in held_out], list(held_out.values())


def _draw(raw: _Raw) -> int:
    body = raw.path.name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(body, digest_size=8).digest())


def _check_apart(training: list[_Raw], held_out: list[_Raw]) -> None:
    """Raises ``DataError`` for an image on both sides: what is learnt by heart would count as known."""
    learnt = {each.path.resolve() for each in training}
    both = [each.row or each.path for each in held_out if each.path.resolve() in learnt]
    if both:
        raise DataError(
            f"{both[0]}: this image is held out and learnt from as well, and {len(both) - 1} more are. Nothing was "
            f"started; name each image on one side only."
        )


def _checked(raw: _Raw, classes: list[str], skipped: list[str]) -> Picture | None:
    if not raw.path.is_file():
        raise DataError(
            f"{raw.places[0] if raw.places else raw.path}: no image {raw.path}. Nothing was started; check the path."
        )
    try:
        width, height = read_image(raw.path).size
    except Unreadable as error:
        skipped.append(f"{raw.row or raw.path}: {error}")
        return None
    found: list[tuple[float, float, float, float]] = []
    for box, label, place in zip(raw.boxes, raw.labels, raw.places, strict=True):
        if label not in classes:
            raise DataError(
                f"{place}: the label {label!r} is held out and has no box to learn from. Nothing was started."
            )
        found.append(_inside(box, width, height, place))
    return Picture(str(raw.path), found, [classes.index(label) for label in raw.labels], width, height)


def _inside(
    box: tuple[float, float, float, float], width: int, height: int, place: str
) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    if not all(np.isfinite(box)):
        raise DataError(f"{place}: the box {box} has no place. Nothing was started; mend it, or leave it out.")
    over = max(-left, -top, right - width, bottom - height)
    if over > SLACK:
        raise DataError(
            f"{place}: the box {box} is {over:g} pixels outside its image of {width} × {height}. Nothing was started; "
            f"mend it, or leave it out."
        )
    kept = (max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom))
    if kept[2] - kept[0] < 1 or kept[3] - kept[1] < 1:
        raise DataError(
            f"{place}: the box {box} has no area (it is xmin, ymin, xmax, ymax, of a pixel or more). Nothing was "
            f"started; mend it, or leave it out."
        )
    return kept


# ---- sources ---------------------------------------------------------------------------------------


def _sources(name: str) -> tuple[list[_Raw], list[_Raw]]:
    path = Path(name)
    if name == TREES and not path.exists():
        return _trees(cache.folder(TREES))
    if hub.is_saved(path):
        return _hub(name)
    if path.is_dir():
        return list(_file(_part(path, "train"))), list(_file(_part(path, "test", "validation", "val")))
    if path.exists() or path.suffix in _SUFFIXES:
        return list(_file(path)), []
    return _hub(name)


def _trees(place: Path) -> tuple[list[_Raw], list[_Raw]]:
    """PASCAL VOC's form, in which pixels count from 1 and the last one is inside. Alive or dead, all are trees."""
    found: tuple[list[_Raw], list[_Raw]] = ([], [])
    for path in sorted(place.glob("*.xml")):
        boxes = []
        for each in ET.parse(path).getroot().iter("object"):
            box = [float(each.findtext(f"bndbox/{edge}") or "nan") for edge in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append((box[0] - 1, box[1] - 1, box[2], box[3]))
        raw = _Raw(
            path.with_suffix(".png"), boxes, ["tree"] * len(boxes), [f"{path}: object {n}" for n in range(len(boxes))]
        )
        found[path.stem == HELD_OUT_TREES].append(raw)
    return found


def _part(place: Path, *names: str) -> Path:
    return part_file(place, names, _SUFFIXES, "test", "a tenth of the images")


def _file(path: Path) -> Iterator[_Raw]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: it cannot be read ({error}). Nothing was started; check it.") from error
    if path.suffix == ".csv":
        return _csv(path, text)
    if path.suffix == ".json":
        return _coco(path, text)
    raise DataError(f"--data {path}: boxes are in a {' or '.join(_SUFFIXES)} file. Nothing was started; convert it.")


def _csv(path: Path, text: str) -> Iterator[_Raw]:
    rows = _rows(path, text)
    _, head = next(rows, (0, []))
    columns = ["image" if name == "image_path" else name for name in head]  # deepforest's own name
    wrong = next((name for name in _COLUMNS if columns.count(name) != 1), None)
    if wrong is not None:
        raise DataError(
            f"--data {path}: {'several columns' if wrong in columns else 'no column'} {wrong!r}; the first line names "
            f"{', '.join(columns)[:200]}. Nothing was started; mend it."
        )
    found: dict[str, _Raw] = {}
    for place, cells in rows:
        if len(cells) > len(columns):
            raise DataError(
                f"{place}: {len(cells)} fields, and the first line names {len(columns)}. Nothing was started; mend the "
                f"line (a label with commas stands in quotes)."
            )
        row = dict(zip(columns, cells, strict=False))
        image, *values = [row.get(name, "") for name in _COLUMNS]
        raw = found.setdefault(image, _Raw(path.parent / image, [], [], []))
        if not any(values):
            continue
        try:
            left, top, right, bottom = map(float, values[:4])
        except ValueError:
            raise DataError(
                f"{place}: {', '.join(values[:4])!r} are no four numbers. Nothing was started; mend the line."
            ) from None
        if not values[4].strip():
            raise DataError(f"{place}: no label. Nothing was started; mend the line, or leave it out.")
        raw.boxes.append((left, top, right, bottom))
        raw.labels.append(values[4].strip())
        raw.places.append(place)
    yield from found.values()


def _rows(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    """The lines that are not empty, the first too, each with its place."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = 0  # lines; a quote that is not closed is in the next one, and noticed at the end of the file only
    try:
        for row in reader:
            before = reader.line_num
            if row:
                yield f"{path}:{before}", row
    except csv.Error as error:
        raise DataError(
            f"{path}:{before + 1}: {error} (as CSV, see its quotes). Nothing was started; mend the line."
        ) from error


class _Category(msgspec.Struct):
    id: int | str
    name: int | str


class _Image(msgspec.Struct):
    id: int | str
    file_name: str


class _Annotation(msgspec.Struct):
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    iscrowd: bool | int | None = None


class _Coco(msgspec.Struct):
    categories: list[_Category]
    images: list[_Image]
    annotations: list[_Annotation]


def _coco(path: Path, text: str) -> Iterator[_Raw]:
    """COCO's form (Lin and others 2014): boxes as x, y, width, height; groups that are not told apart are left out."""
    try:
        held = msgspec.json.decode(text, type=_Coco)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(
            f"--data {path}: not in COCO's form: {error}. Nothing was started; mend it, or give a .csv file."
        ) from error
    kinds: tuple[tuple[str, list[Any]], ...] = (("categories", held.categories), ("images", held.images))
    for kind, entries in kinds:
        twice = next((each for each, count in Counter(each.id for each in entries).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two of its {kind} have the id {twice!r}. Nothing was started; mend it.")
    classes = {each.id: str(each.name) for each in held.categories}
    found = {each.id: _Raw(path.parent / each.file_name, [], [], []) for each in held.images}
    for number, each in enumerate(held.annotations):
        if each.iscrowd:
            continue
        place = f"{path}: annotation {number}"
        if each.category_id not in classes or each.image_id not in found:
            raise DataError(f"{place}: its category or image is none of the file's. Nothing was started; mend it.")
        x, y, width, height = each.bbox
        raw = found[each.image_id]
        raw.boxes.append((x, y, x + width, y + height))
        raw.labels.append(classes[each.category_id])
        raw.places.append(place)
    images = path.parent / "images"
    for raw in found.values():
        beside = images / raw.path.name
        yield msgspec.structs.replace(raw, path=beside) if not raw.path.exists() and beside.exists() else raw


def _hub(name: str) -> tuple[list[_Raw], list[_Raw]]:
    """A data set of ``datasets`` with columns image and objects (bbox as x, y, width, height; category).

    Its images go into Headwater's cache, where workers read them, and are called there by what they hold: a newer
    version of the data set changes nothing for a run that goes on.
    """
    found = hub.load(name)
    aside = next((part for part in hub.HELD_OUT if part in found), None)
    return _part_of(name, "train", found["train"]), _part_of(name, aside, found[aside]) if aside else []


def _part_of(name: str, part: str, table: Any) -> list[_Raw]:
    kind = table.features.get("objects")  # before version 4 of datasets a Sequence with the fields in its feature
    images = hub.of_part(name, part, table, "Image")
    return [_of_row(image, objects, kind) for image, objects in zip(images, _objects(name, table), strict=True)]


def _objects(name: str, table: Any) -> Sequence[Any]:
    if "objects" not in table.column_names:
        there = ", ".join(table.column_names)
        raise DataError(f"--data {name}: no column objects, but {there}. Nothing was started; give another data set.")
    return list(table["objects"])


def _of_row(image: hub.File, objects: Any, kind: Any) -> _Raw:
    try:
        category = getattr(kind, "feature", kind)["category"]
        names = getattr(getattr(category, "feature", category), "names", None)
        labels = [
            names[hub.check_class(image.place, each, names)] if names else str(each) for each in objects["category"]
        ]
        corners = (map(float, each) for each in objects["bbox"])
        boxes = [(x, y, x + width, y + height) for x, y, width, height in corners]
        if len(boxes) != len(labels):
            raise ValueError(f"{len(boxes)} boxes and {len(labels)} categories")
    except DataError:  # it is a ValueError, and says more
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(
            f"{image}: no objects (bbox, category), or a category out of range: {error!r}. Nothing was started; mend "
            f"the data set."
        ) from error
    return _Raw(_kept(image), boxes, labels, [f"{image}, object {n}" for n in range(len(boxes))], str(image))


def _kept(image: hub.File) -> Path:
    """The cache's copy of an image; of one that has no bytes an empty file of its own, which counts as unreadable."""
    try:
        body = image.read_bytes()
    except OSError:
        body = b""
    path = cache.root().parent / "images" / hashlib.blake2b(body or image.place.encode(), digest_size=16).hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")  # another run may write the same
        checkpoint.replace(beside, body)
        beside.replace(path)
    return path
