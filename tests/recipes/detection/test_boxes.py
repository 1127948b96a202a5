"""Boxes of all forms, and what of them is refused."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headwater.errors import DataError
from headwater_recipes.detection import boxes, data
from headwater_recipes.detection.boxes import read
from tests.recipes import hub
from tests.recipes.data import need
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


def test_a_csv_file_holds_one_image_in_ten_out(tmp_path: Path) -> None:
    found = read((str(squares(tmp_path, 20)),))
    assert found.classes == ["round", "square"]
    assert (len(found.training), len(found.held_out)) == (18, 2)
    assert not {each.path for each in found.training} & {each.path for each in found.held_out}


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


class _Pets:
    """Of ``datasets`` what is asked for: "owner/pets" with one image to a row, of its file's bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
        self.objects: Any = {"category": types.SimpleNamespace(names=["cat", "dog"])}
        self.parts: dict[str, Any] = {}
        library = types.ModuleType("datasets")
        vars(library).update(load_dataset=lambda *_: self.parts, Image=hub.Image)
        monkeypatch.setitem(sys.modules, "datasets", library)
        monkeypatch.setenv("HEADWATER_CACHE", str(place))

    def part(self, name: str, *rows: tuple[bytes | None, int]) -> None:
        images = [{"bytes": body, "path": None} for body, _ in rows]
        objects = [{"bbox": [[2, 3, 10, 20]], "category": [label]} for _, label in rows]
        features = {"image": hub.Image(), "objects": self.objects}
        self.parts[name] = hub.Table({"image": images, "objects": objects}, features)


def _png(grey: int) -> bytes:
    body = io.BytesIO()
    Image.new("L", (40, 30), grey).save(body, "PNG")
    return body.getvalue()


def test_a_name_of_the_library_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pets = _Pets(monkeypatch, tmp_path)
    pets.part("train", (_png(1), 0), (_png(2), 1))
    pets.part("test", (_png(3), 1))
    found = read(("owner/pets",))
    assert (found.classes, [each.labels for each in found.training]) == (["cat", "dog"], [[0], [1]])
    assert found.held_out[0].boxes == [(2, 3, 12, 23)]
    every = [*found.training, *found.held_out]
    assert [Path(each.path).read_bytes() for each in every] == [_png(1), _png(2), _png(3)]
    assert not {each.path for each in found.training} & {each.path for each in read(("owner-pets",)).training}
    pets.objects = types.SimpleNamespace(feature=pets.objects)
    pets.part("train", (_png(1), 0), (_png(2), 1))
    assert read(("owner/pets",)) == found
    for wrong in (5, -1):  # -1 is what the library writes where there is no label
        pets.part("train", (_png(1), wrong))
        with pytest.raises(DataError, match=r"owner/pets, train 0: .*is none of its 2 classes"):
            read(("owner/pets",))
    pets.objects = None
    pets.part("train", (_png(1), 0))
    with pytest.raises(DataError, match="'train' has no column objects with bbox and category, but image, objects"):
        read(("owner/pets",))


def test_another_version_under_the_same_name_changes_no_image_of_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pets = _Pets(monkeypatch, tmp_path)
    pets.part("train", (_png(1), 0), (_png(2), 0))
    pets.part("test", (_png(3), 0))
    first = read(("owner/pets",))
    pets.part("train", (_png(4), 0), (_png(2), 0))
    second = read(("owner/pets",))
    bodies = [[Path(each.path).read_bytes() for each in found.training] for found in (first, second)]
    assert bodies == [[_png(1), _png(2)], [_png(4), _png(2)]]
    assert first.training[1] == second.training[1]
    assert len([each for each in (tmp_path / "images").rglob("*") if each.is_file()]) == 4  # nothing is left beside


def test_images_of_a_data_set_that_cannot_be_read_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pets = _Pets(monkeypatch, tmp_path)
    rows = [(_png(grey), 0) for grey in range(29)]
    pets.part("train", *rows, (_png(99)[:50], 0), (None, 0))
    pets.part("test", *[(_png(grey), 0) for grey in range(50, 53)])
    found = read(("owner/pets",))
    assert [each.split(":")[0] for each in found.skipped] == ["owner/pets, train 29", "owner/pets, train 30"]
    assert len(found.training) == 29
    pets.part("train", *rows[:5], (b"no", 0))
    pets.part("test", *rows[5:7])
    with pytest.raises(DataError, match=r"1 of 8 images cannot be read, above 10%; the first is owner/pets, train 5"):
        read(("owner/pets",))


def test_what_is_held_out_has_boxes_and_does_not_go_by_the_order(tmp_path: Path) -> None:
    lines = [f"{n}.png,1,1,9,9,cat" if n % 2 else f"{n}.png,,,,," for n in range(60)]
    (given,) = _csv(tmp_path, *lines, images=60)

    def held_out(*lines: str) -> set[str]:
        Path(given).write_text("\n".join([HEAD, *lines]), encoding="utf-8")
        found = read((given,))
        assert all(each.boxes for each in found.held_out)
        assert len(found.training) + len(found.held_out) == len(lines)
        return {Path(each.path).name for each in found.held_out}

    whole = held_out(*lines)
    assert 1 < len(whole) < 8
    assert held_out(*reversed(lines)) == whole
    for fewer in range(1, 6):
        some = held_out(*lines[fewer:])
        assert some == {name for name in whole if int(name.removesuffix(".png")) >= fewer}
    assert all(len(held_out(*lines[at : at + 4])) == 1 for at in range(56))  # two have boxes


def test_an_image_that_two_files_name_is_one_and_none_is_on_both_sides(tmp_path: Path) -> None:
    (cats,) = _csv(tmp_path, *(f"{n}.png,1,1,9,9,cat" for n in range(12)), images=12)
    dogs = tmp_path / "dogs.csv"
    dogs.write_text("\n".join([HEAD, *(f"{n}.png,20,1,29,9,dog" for n in range(12))]), encoding="utf-8")
    assert read((cats, cats)) == read((cats,))
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
    (tmp_path / "1.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"no held-out image has a box.*cannot be read: .*1\.png"):
        read(given)
    Path(given[0]).write_text("\n".join([HEAD, *lines[1:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"no box to learn from.*cannot be read: .*1\.png"):
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
        (["0.png,1,1,9,9,cat", "1.png,1,1,9,9,dog"], "is held out and has no box to learn from"),
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
    found = read((str(squares(tmp_path, 10)),))
    import msgspec

    (tmp_path / data.FILE).write_bytes(msgspec.json.encode(found))
    assert data.load(tmp_path) == found
    Path(found.training[0].path).unlink()
    with pytest.raises(DataError, match="is not where it was when the run began"):
        data.load(tmp_path)
    made = data.measures(found.training[1:], lambda path: np.asarray(Image.open(path)))
    assert 10 < made["size"][0] < 16
    assert boxes.SLACK < 4
