"""Folders of classes, MNIST's files, and what is wrong with them."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwater.errors import DataError
from headwater_recipes.images.folder import read_classes, read_folder
from headwater_recipes.images.idx import read_idx
from headwater_recipes.images.store import Images, Scale, Split
from tests.recipes.hub import BY, write


def write_classes(folder: Path, count: int = 10, **colours: str) -> Path:
    """``count`` images of one colour for each class."""
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 5 + index), colour).save(folder / name / f"{index}.png")
    return folder


def test_a_tenth_of_each_class_is_held_out(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", 50, cat="red", dog="blue")
    (folder / "cat" / "notes.txt").write_text("no image", encoding="utf-8")
    (folder / ".git").mkdir()
    found = read_folder(folder, 8)
    images = found.images
    assert images.classes == ("cat", "dog")
    assert found.skipped == []
    assert len(images.training.labels) + len(images.held_out.labels) == 100
    assert 4 <= len(images.held_out.labels) <= 20
    for split in (images.training, images.held_out):
        assert set(split.labels) == {0, 1}
        assert split.pixels.shape[1:] == (8, 8, 3)
        assert (split.pixels[split.labels == 0] == [255, 0, 0]).all()
        assert (split.pixels[split.labels == 1] == [0, 0, 255]).all()


def test_what_is_held_out_stays_so_when_images_are_added(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", 40, cat="red", dog="blue")
    before = len(read_folder(folder, 8).images.held_out.labels)
    Image.new("RGB", (3, 3)).save(folder / "cat" / "another.png")
    assert len(read_folder(folder, 8).images.held_out.labels) in (before, before + 1)


def test_train_and_test_are_taken_as_they_are(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 3, cat="red", dog="blue")
    write_classes(tmp_path / "test", 2, dog="blue")
    images = read_folder(tmp_path, 8).images
    assert images.training.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.held_out.labels.tolist() == [1, 1]
    assert (images.held_out.pixels == [0, 0, 255]).all()
    write_classes(tmp_path / "test", 1, emu="green")
    with pytest.raises(DataError, match="'emu' is held out and has no images to train on"):
        read_folder(tmp_path, 8)


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "x", 20, cat="red", dog="blue")
    (folder / "cat" / "3.png").write_bytes(b"not at all")
    (folder / "dog" / "7.png").write_bytes((folder / "dog" / "7.png").read_bytes()[:50])
    found = read_folder(folder, 8)
    assert len(found.skipped) == 2
    assert "3.png: not an image of a known format" in " ".join(found.skipped)
    assert len(found.images.training.labels) + len(found.images.held_out.labels) == 38
    for index in range(4):
        (folder / "dog" / f"{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match="6 of 40 images cannot be read, above 10%"):
        read_folder(folder, 8)


@pytest.mark.parametrize("made", ["missing", "file", "empty", "flat"])
def test_a_folder_of_the_wrong_kind_is_refused(tmp_path: Path, made: str) -> None:
    place = tmp_path / "x"
    if made == "file":
        place.write_text("x", encoding="utf-8")
    elif made != "missing":
        place.mkdir()
        if made == "flat":
            Image.new("RGB", (3, 3)).save(place / "a.png")
    with pytest.raises(DataError, match="give a folder that holds a subfolder of images for each class"):
        read_folder(place, 8)


def _split(*labels: int) -> Split:
    return Split(np.zeros((len(labels), 4, 4, 1), np.uint8), np.array(labels, np.int64))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (Images(("a",), _split(0, 0), _split(0)), "to tell classes apart takes two or more"),
        (Images(("a", "b"), _split(0, 1, 2), _split(0)), "label 2 of image 2 .training. is out of range"),
        (Images(("a", "b"), _split(0, 1), _split(-1)), "label -1 of image 0 .held out. is out of range"),
        (Images(("a", "b"), _split(1), _split(0)), "fewer than the 2 workers"),
        (Images(("a", "b"), _split(0, 1), _split()), "no image is held out"),
    ],
)
def test_images_that_nothing_can_be_learnt_from_are_refused(images: Images, words: str) -> None:
    with pytest.raises(DataError, match=words):
        images.check(workers=2)


def test_what_a_run_folder_keeps_comes_back(tmp_path: Path) -> None:
    images = Images(("ä", "b"), _split(0, 1), _split(1))
    images.save(tmp_path)
    found = Images.load(tmp_path)
    assert found.classes == images.classes
    assert found.held_out.labels.tolist() == [1]
    (tmp_path / "training-images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        Images.load(tmp_path)


def test_the_scale_of_pixels() -> None:
    pixels = np.zeros((2, 4, 4, 1), np.uint8)
    pixels[0] = 255
    scale = Scale.of(pixels)
    assert scale.mean == (0.5,) * 3
    assert scale.deviation == (0.5,) * 3
    assert scale.tensor(pixels)[:, :, 0, 0].tolist() == [[1.0] * 3, [-1.0] * 3]


def _idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + data


def test_an_idx_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(_idx((2, 1, 3), bytes(range(6)))))
    assert read_idx(path, 3).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    whole = path.read_bytes()
    for bad in (b"", whole[:-9], gzip.compress(_idx((2, 1, 3), bytes(5))), gzip.compress(_idx((6,), bytes(6)))):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.gz: "):
            read_idx(path, 3)


def _png(colour: str, side: int) -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (side, 5), colour).save(body, "PNG")
    return body.getvalue()


@pytest.mark.parametrize("by", BY)
def test_a_data_set_of_the_library_is_read_as_a_folder_is(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(_png(colour, 4 + i), f"{i}.png", label) for i in range(20) for label, colour in enumerate(("red", "blue"))]
    rows[5] = (b"no image", "5.png", 1)
    name = write(tmp_path / "given", monkeypatch, by, "Image", ["cat", "dog", "emu"], {"train": rows, "test": rows[:2]})
    found = read_folder(name, 8)
    assert found.images.classes == ("cat", "dog")  # nothing is there of the third
    assert found.images.training.labels.tolist() == [0] * 20 + [1] * 19
    assert (found.images.training.pixels[-1] == [0, 0, 255]).all()
    assert found.images.held_out.labels.tolist() == [0, 1]
    assert found.skipped == [f"{name}, train 5: not an image of a known format"]
    people, split, skipped = read_classes(name, 8)
    assert (people, len(split.labels), len(skipped)) == (("cat", "dog"), 41, 1)

    name = write(tmp_path / "drawn", monkeypatch, by, "Image", ["cat", "dog"], {"train": rows})
    images = read_folder(name, 8).images
    assert len(images.training.labels) + len(images.held_out.labels) == 39
    assert set(images.held_out.labels) == {0, 1}


def test_a_file_that_must_not_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(_png("red", 4), "a.png", n % 2) for n in range(20)]
    name = write(
        tmp_path / "x", monkeypatch, "stand-in", "Image", ["a", "b"], {"train": [*rows, (None, "gone.png", 0)]}
    )
    assert "gone.png" in read_folder(name, 8).skipped[0]
