"""Names of data sets: which they are, what is said where they cannot be had, and their rows as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pytest

from headwater.errors import DataError
from headwater_recipes.common import hub
from headwater_recipes.common.options import Option, make_changes
from headwater_recipes.common.settings import Training
from headwater_recipes.common.unreadable import check_unreadable
from tests.recipes.hub import BY, ClassLabel, Table, write

ROWS = [(b"one", "ann_1.wav", 0), (b"two", "bob_1.wav", 1)]


@pytest.mark.parametrize("word", ["mnist", "owner/name", "owner/name:one-1.0", "ylecun/mnist"])
def test_what_can_be_a_name(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.finds(word)
    (tmp_path / word).mkdir(parents=True)
    assert not hub.finds(word)


@pytest.mark.parametrize("word", ["/data/cats", "./cats", "../cats", "~/cats", "a/b/c", "cats/", "", "a b"])
def test_what_can_be_none(word: str) -> None:
    assert not hub.is_name(word)


def test_on_the_command_line_a_name_stays_and_a_path_becomes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(Training, frozen=True, kw_only=True):
        data: Annotated[tuple[str, ...], Option("", path=True, named=True)] = ()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    given = [Path("owner/name:one"), Path("cats"), Path("../dogs")]
    wanted = ("owner/name:one", str(tmp_path / "cats"), str(tmp_path.parent / "dogs"))
    assert make_changes(Named, {"data": given}) == {"data": wanted}
    assert make_changes(Training, {"data": given[:1]}) == {"data": (str(tmp_path / "owner/name:one"),)}


def test_without_the_library_or_the_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no such file or folder here, .*not installed\. .* pip install datasets"):
        hub.load("owner/name")

    def unreachable(path: str, configuration: str | None) -> None:
        try:
            raise ConnectionError(f"Couldn't reach '{path}' ({configuration})\nmore")
        except ConnectionError as error:
            raise RuntimeError("it failed") from error

    monkeypatch.setitem(sys.modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(unreachable)}))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"read it \(Couldn't reach 'owner/name' \(one\)\)\. .* network give a folder"):
        hub.load("owner/name:one")


@pytest.mark.parametrize("by", BY)
def test_rows_are_files_that_nobody_decodes(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlabelled = [(b"x", "x.wav", -1 if by == "stand-in" else None)]
    parts = {"train": ROWS, "test": unlabelled, "validation": ROWS[1:]}
    name = write(tmp_path / "set", monkeypatch, by, "Audio", ["no", "yes"], parts)
    assert hub.finds(name)
    found = hub.files(name, "Audio")
    assert found.names == ("no", "yes")
    assert [(file.label, file.read_bytes(), file.stem()) for file in found.training] == [
        ("no", b"one", "ann_1"),
        ("yes", b"two", "bob_1"),
    ]
    assert [str(file) for file in found.held_out] == [f"{name}, validation 0"]  # no label in the part test
    with pytest.raises(DataError, match=r"no column of the feature Image; there are audio \(Audio\), label \(ClassLab"):
        hub.files(name, "Image")


def test_a_label_of_no_class_and_a_set_without_train_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(tmp_path / "a", monkeypatch, "stand-in", "Image", ["no"], {"train": ROWS})
    with pytest.raises(DataError, match="train 1: the label 1 is none of its 1 classes"):
        hub.files(name, "Image")
    name = write(tmp_path / "b", monkeypatch, "stand-in", "Image", ["no"], {"trial": ROWS})
    with pytest.raises(DataError, match="no part 'train', but trial"):
        hub.files(name, "Image")
    table = Table({"a": [0], "b": [0]}, {"a": ClassLabel(["x"]), "b": ClassLabel(["x"])})
    with pytest.raises(DataError, match="several columns of the feature ClassLabel"):
        hub._classes(name, table)


def test_a_row_without_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(None, str(tmp_path / "beside.png"), 0), (None, None, 0)]
    name = write(tmp_path / "a", monkeypatch, "stand-in", "Image", ["no"], {"train": rows})  # type: ignore[dict-item]
    (tmp_path / "beside.png").write_bytes(b"beside")
    first, second = hub.files(name, "Image").training
    assert first.read_bytes() == b"beside"
    with pytest.raises(FileNotFoundError, match="the row is empty"):
        second.read_bytes()


def test_a_few_unreadable_files_are_left_out_and_more_are_an_error() -> None:
    check_unreadable("images", 10, ["a.png: cut off"])
    with pytest.raises(DataError, match=r"2 of 19 images cannot be read, above 10%; the first is a\.png: cut off\. "):
        check_unreadable("images", 19, ["a.png: cut off", "b.png: too"])
