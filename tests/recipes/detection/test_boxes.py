"""Boxes of all forms, and what of them is refused."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from headwater.errors import DataError
from headwater_recipes.detection import boxes, data
from headwater_recipes.detection.boxes import read
from headwater_recipes.detection.model import Detector
from headwater_recipes.detection.settings import DetectionSettings
from headwater_recipes.detection.task import Detection
from tests.recipes import hub
from tests.recipes.data import need
from tests.recipes.hub import Table
from tests.recipes.tiny import squares

HEAD = "image,xmin,ymin,xmax,ymax,label"


def _csv(place: Path, *lines: str, images: int = 2) -> tuple[str]:
    for number in range(images):
        Image.new("RGB", (40, 30)).save(place / f"{number}.png")
    (place / "a.csv").write_text("\n".join([HEAD, *lines]), encoding="utf-8")
    return (str(place / "a.csv"),)


def test_of_the_trees_an_image_taken_elsewhere_is_held_out() -> None:
    need("tree-crowns")
    found = read(())
    assert found.classes == ["tree"]
    assert sorted(len(each.boxes) for each in found.training) == [37, 61, 574]
    (aside,) = found.held_out
    assert (len(aside.boxes), aside.width, aside.height) == (279, 1249, 1035)
    for picture in (*found.training, aside):
        assert (picture.corners[:, 2:] - picture.corners[:, :2]).min() >= 8
        assert (picture.corners >= 0).all()
        assert (picture.corners <= [picture.width, picture.height] * 2).all()


def test_of_a_csv_file_about_one_image_in_ten_is_held_out(tmp_path: Path) -> None:
    found = read((str(squares(tmp_path, 40)),))
    assert found.classes == ["round", "square"]
    assert len(found.training) + len(found.held_out) == 40
    assert 1 <= len(found.held_out) <= 8
    learnt = {each.path for each in found.training}
    assert not learnt & {each.path for each in found.held_out}
    more = read((str(squares(tmp_path, 41)),))
    assert learnt <= {each.path for each in more.training}


def test_an_image_less_or_another_order_moves_no_other(tmp_path: Path) -> None:
    lines = [f"{n}.png,1,1,9,9,cat" for n in range(60)]
    (given,) = _csv(tmp_path, *lines, images=60)

    def held_out(lines: Sequence[str]) -> set[str]:
        Path(given).write_text("\n".join([HEAD, *lines]), encoding="utf-8")
        return {Path(each.path).name for each in read((given,)).held_out}

    whole = held_out(lines)
    assert len(whole) > 2
    assert held_out(lines[::-1]) == whole
    for line in lines:
        assert held_out([each for each in lines if each != line]) == whole - {line.split(",")[0]}


def test_a_class_that_is_only_held_out_is_an_error(tmp_path: Path) -> None:
    for part, line in (("train", "0.png,1,1,9,9,cat"), ("test", "1.png,1,1,9,9,dog")):
        _csv(tmp_path, line)
        (tmp_path / "a.csv").rename(tmp_path / f"{part}.csv")
    with pytest.raises(DataError, match=r"test\.csv:2: the label 'dog' is held out and has no box to learn from"):
        read((str(tmp_path),))


def test_what_is_held_out_has_boxes_and_leaves_some_of_each_class(tmp_path: Path) -> None:
    lines = [f"{n}.png,,,,," for n in range(20)] + ["20.png,1,1,9,9,cat", "21.png,1,1,9,9,cat", "22.png,1,1,9,9,dog"]
    found = read(_csv(tmp_path, *lines, images=23))
    assert [each.labels for each in found.held_out if each.boxes] == [[0]]
    assert found.classes == ["cat", "dog"]
    with pytest.raises(DataError, match="no held-out image has a box"):
        read(_csv(tmp_path, "0.png,1,1,9,9,cat", "1.png,1,1,9,9,dog"))


def test_coco_s_form_and_a_folder_with_parts(tmp_path: Path) -> None:
    """Boxes are x, y, width, height there; crowds are left out; images may lie in images/."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
    for part, name in (("train", "a.png"), ("test", "b.png")):
        held = {
            "categories": [{"id": 7, "name": "cat"}],
            "images": [{"id": 1, "file_name": name}],
            "annotations": [
                {"image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 20], "iscrowd": 0},
                {"image_id": 1, "category_id": 7, "bbox": [0, 0, 40, 30], "iscrowd": 1},
            ],
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(held), encoding="utf-8")
    found = read((str(tmp_path),))
    assert found.training[0].boxes == found.held_out[0].boxes == [(2, 3, 12, 23)]
    assert [Path(each.path).name for each in (*found.training, *found.held_out)] == ["a.png", "b.png"]


class _Part(Table):
    """Rows of images and the category of the only object in each."""

    category: ClassVar[Any] = {"category": types.SimpleNamespace(names=["cat", "dog"])}

    def __init__(self, rows: Sequence[tuple[bytes | None, int]], category: Any = None) -> None:
        boxes = [{"bbox": [[2, 3, 10, 20]], "category": [label]} for _, label in rows]
        images = [{"bytes": body, "path": None} for body, _ in rows]
        super().__init__(
            {"image": images, "objects": boxes}, {"image": hub.Image(), "objects": category or self.category}
        )


def _png(grey: int) -> bytes:
    held = io.BytesIO()
    Image.new("L", (40, 30), grey).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What stands for ``datasets``."""
    made: Any = types.ModuleType("datasets")
    made.Image = hub.Image
    monkeypatch.setitem(sys.modules, "datasets", made)
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    return made


def test_a_name_of_the_library_datasets(library: Any) -> None:
    parts = {"train": _Part([(_png(1), 0), (_png(2), 1)]), "test": _Part([(_png(3), 1)])}
    library.load_dataset = lambda *_: parts
    found = read(("owner/pets",))
    assert (found.classes, [each.labels for each in found.training]) == (["cat", "dog"], [[0], [1]])
    assert found.held_out[0].boxes == [(2, 3, 12, 23)]
    assert all(Path(each.path).is_file() for each in (*found.training, *found.held_out))
    for part in parts.values():
        part.features["objects"] = types.SimpleNamespace(feature=_Part.category)
    assert read(("owner/pets",)) == found
    for wrong in (5, -1):  # -1 is what the library writes where there is no label
        library.load_dataset = lambda *_, wrong=wrong: {"train": _Part([(_png(1), wrong)])}
        with pytest.raises(DataError, match=r"pets, train 0: the label -?\d is none of its 2 classes"):
            read(("owner/pets",))


def test_another_version_of_a_data_set_leaves_the_images_of_the_one_before(library: Any) -> None:
    library.load_dataset = lambda *_: {"train": _Part([(_png(1), 0), (_png(2), 0)])}
    found = read(("owner/pets",))
    before = {each.path: Path(each.path).read_bytes() for each in (*found.training, *found.held_out)}
    library.load_dataset = lambda *_: {"train": _Part([(_png(4), 0), (_png(5), 0)])}
    newer = read(("owner/pets",))
    assert {path: Path(path).read_bytes() for path in before} == before
    assert not set(before) & {each.path for each in (*newer.training, *newer.held_out)}


def test_an_image_of_a_data_set_that_cannot_be_read_is_skipped(library: Any) -> None:
    rows = [(_png(n), n % 2) for n in range(20)]
    library.load_dataset = lambda *_: {"train": _Part([*rows, (b"no image", 0)])}
    found = read(("owner/pets",))
    assert len(found.skipped) == 1
    assert found.skipped == ["owner/pets, train 20: not an image of a known format"]
    library.load_dataset = lambda *_: {"train": _Part([*rows, (None, 0), (None, 1), (None, 1)])}
    with pytest.raises(DataError, match="3 of 23 images cannot be read"):
        read(("owner/pets",))
    library.load_dataset = lambda *_: {"train": _Part([(b"no", 0), (_png(1), 1)])}
    with pytest.raises(DataError, match="1 of 2 images cannot be read"):
        read(("owner/pets",))
    bare = Table({"image": [{"bytes": _png(1), "path": None}]}, {"image": hub.Image()})
    library.load_dataset = lambda *_: {"train": bare}
    with pytest.raises(DataError, match="no column objects, but image"):
        read(("owner/pets",))


def test_an_image_that_two_files_name_is_one_and_none_is_on_both_sides(tmp_path: Path) -> None:
    (cats,) = _csv(tmp_path, *(f"{n}.png,1,1,9,9,cat" for n in range(12)), images=12)
    dogs = tmp_path / "dogs.csv"
    dogs.write_text("\n".join([HEAD, *(f"{n}.png,20,1,29,9,dog" for n in range(12))]), encoding="utf-8")
    assert read((cats, cats)) == read((cats,))
    (tmp_path / "again.csv").write_bytes(Path(cats).read_bytes())
    assert read((cats, str(tmp_path / "again.csv"))) == read((cats,))
    found = read((cats, str(dogs)))
    assert (len(found.training), len(found.held_out)) == (11, 1)
    assert all(each.labels == [0, 1] for each in (*found.training, *found.held_out))
    for part in ("train.csv", "test.csv"):
        (tmp_path / part).write_bytes(dogs.read_bytes())
    with pytest.raises(DataError, match=r"0\.png: this image is held out and learnt from as well, and 11 more"):
        read((str(tmp_path),))


def test_boxes_that_no_readable_image_has_to_learn_from_are_an_error(tmp_path: Path) -> None:
    lines = ["0.png,1,1,9,9,cat", "1.png,1,1,9,9,cat", *(f"{n}.png,,,,," for n in range(2, 12))]
    given = _csv(tmp_path, *lines, images=12)
    (learnt,) = (each for each in read(given).training if each.boxes)
    Path(learnt.path).write_bytes(b"no")
    with pytest.raises(DataError, match=r"no image to learn from that can be read has a box.*\d\.png"):
        read(given)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["0.png,1,1,50,9,cat", "1.png,1,1,9,9,cat"],
            r"a\.csv:2: the box .* is 10 pixels outside its image of 40 × 30",
        ),
        (["0.png,-9,1,20,9,cat", "1.png,1,1,9,9,cat"], "is 9 pixels outside"),
        (["0.png,9,1,9,9,cat", "1.png,1,1,9,9,cat"], "has no area"),
        (["0.png,9,9,1,1,cat", "1.png,1,1,9,9,cat"], "has no area"),
        (["0.png,nan,1,9,9,cat", "1.png,1,1,9,9,cat"], "has no place"),
        (["0.png,a,1,9,9,cat"], r"a\.csv:2: 'a, 1, 9, 9' are no four numbers"),
        (['0.png,1,1,9,9,"cat'], r"a\.csv:2: unexpected end of data"),
        (['0.png,1,1,9,9,"cat"x'], r"a\.csv:2: ',' expected after"),
        (["0.png,1,1,9,9,cat, big", "1.png,1,1,9,9,cat"], r"a\.csv:2: 7 fields, and the first line names 6"),
        (["0.png,1,1,9,9,"], r"a\.csv:2: no label"),
        (["0.png,1,1,9,9,cat", "9.png,1,1,9,9,cat"], r"a\.csv:3: no image .*9\.png"),
        (["0.png,1,1,9,9,cat", "1.png,1,1,9,9,dog"], "no held-out image has a box"),
        (["0.png,,,,,"], "no box to learn from"),
        (["0.png,1,1,9,9,cat"], "no held-out image has a box"),
    ],
)
def test_a_box_that_cannot_be_is_named_by_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(_csv(tmp_path, *lines))


def test_what_is_a_little_outside_is_clipped_and_an_image_may_be_empty(tmp_path: Path) -> None:
    found = read(_csv(tmp_path, "0.png,-1,0.5,41,31,cat", "1.png,1,1,9,9,cat", "2.png,,,,,", images=3))
    boxes_of = {Path(each.path).name: each.boxes for each in (*found.training, *found.held_out)}
    assert boxes_of == {"0.png": [(0, 0.5, 40, 30)], "1.png": [(1, 1, 9, 9)], "2.png": []}


def test_images_that_cannot_be_read_are_counted_and_many_are_an_error(tmp_path: Path) -> None:
    path = squares(tmp_path, 12)
    (tmp_path / "3.png").write_bytes(b"\x89PNG no")
    found = read((str(path),))
    assert [each.split(":")[0] for each in found.skipped] == [str(tmp_path / "3.png")]
    assert len(found.training) + len(found.held_out) == 11
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 12 images cannot be read, above 10%"):
        read((str(path),))


def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater_recipes.images.decode.MOST_PIXELS", 1000)
    with pytest.raises(DataError, match="40 × 30 pixels are above 1,000"):
        read(_csv(tmp_path, "0.png,1,1,9,9,cat", "1.png,1,1,9,9,cat"))


def test_an_annotation_of_no_category_is_named(tmp_path: Path) -> None:
    held = {"categories": [], "images": [], "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 1, 2, 2]}]}
    (tmp_path / "a.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(DataError, match=r"^[^(]*a\.json: annotation 0: its category or image is none of the file's"):
        read((str(tmp_path / "a.json"),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": [{}, 5]}, r"missing required field `image_id` - at `\$.annotations\[0\]`"),
        ({"annotations": [5]}, r"Expected `object`, got `int` - at `\$.annotations\[0\]`"),
        ({"annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3]}]}, r"at `\$.annotations\[0\].bbox`"),
        ({"annotations": [{"image_id": [], "category_id": 7, "bbox": [1, 2, 3, 4]}]}, r"\$.annotations\[0\].image_id"),
        ({"annotations": 5}, r"got `int` - at `\$.annotations`"),
        ({"images": [None]}, r"got `null` - at `\$.images\[0\]`"),
        ({"images": [{"id": 1, "file_name": 5}]}, r"at `\$.images\[0\].file_name`"),
        ({"categories": ["cat"]}, r"got `str` - at `\$.categories\[0\]`"),
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}]}, "two of its categories have the id 7"),
        ({"images": [{"id": 1, "file_name": n} for n in ("a", "b")]}, "two of its images have the id 1"),
    ],
)
def test_an_entry_of_coco_s_that_cannot_be_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    held: dict[str, Any] = {"categories": [], "images": [], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps({**held, **change}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.json: .*{said}"):
        read((str(tmp_path / "a.json"),))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ('image,"xmin', r"a\.csv:1: unexpected end of data"),
        ('"image"x,xmin', r"a\.csv:1: ',' expected"),
        (f"{HEAD},label", r"a\.csv: several columns 'label'"),
        (f"{HEAD},image_path", r"a\.csv: several columns 'image'"),
    ],
)
def test_a_first_line_that_cannot_be_is_named(tmp_path: Path, head: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(f"{head}\n0.png,1,1,9,9,cat,0.png\n", encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read((str(tmp_path / "a.csv"),))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    (tmp_path / "b.csv").write_text("image,label\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("x", encoding="utf-8")
    for name, said in (
        ("a.json", "not in COCO's form"),
        ("b.csv", "no column 'xmin'"),
        ("c.txt", "convert it"),
        ("d.csv", "cannot be read"),
    ):
        with pytest.raises(DataError, match=said):
            read((str(tmp_path / name),))
    with pytest.raises(DataError, match=r"no file train\.\*"):
        read((str(tmp_path),))


def test_a_run_whose_image_is_gone_says_so(tmp_path: Path) -> None:
    data.prepare(DetectionSettings(data=(str(squares(tmp_path, 10)),)), Console(quiet=True))(tmp_path)
    found = data.load(tmp_path).pictures
    assert data.load(tmp_path).measures == data.measure(found.training)  # to the last bit
    Path(found.training[0].path).unlink()
    with pytest.raises(DataError, match="is not where it was when the run began"):
        data.load(tmp_path)
    made = data.measure(found.training[1:])
    assert 10 < made.size[0] < 16
    sample = np.concatenate([np.asarray(Image.open(each.path))[::7, ::7].reshape(-1, 3) for each in found.training[1:]])
    assert np.allclose((made.mean, made.deviation), (sample.mean(0) / 255, sample.std(0) / 255))
    assert boxes.SLACK < 4


def test_workers_read_no_image_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is measured once, before there are workers."""
    settings = DetectionSettings(data=(str(squares(tmp_path, 10)),), tile=32, width=8)
    data.prepare(settings, Console(quiet=True))(tmp_path)
    monkeypatch.setattr("headwater_recipes.images.decode.read_image", None)
    monkeypatch.setattr("headwater_recipes.detection.tiles.read_image", None)
    monkeypatch.setattr("headwater_recipes.detection.data.read_image", None)
    network = Detection(settings, tmp_path).build()
    assert isinstance(network, Detector)
    assert network.settings.mean == data.load(tmp_path).measures.mean
