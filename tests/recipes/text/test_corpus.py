from __future__ import annotations

from pathlib import Path

import pytest

from headwater.errors import DataError
from headwater_recipes.text import corpus
from tests.recipes.conftest import write_corpus


def _names(documents: tuple[corpus.Document, ...]) -> list[str]:
    return [document.name for document in documents]


def test_the_standard_library_leaves_tests_out_and_holds_files_out() -> None:
    found = corpus.standard_library()
    names = _names(found.training) + _names(found.validation)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [n for n in names if "/tests/" in n or n.startswith(("test/", "idlelib/", "lib2to3/", "site-packages/"))]
    held = sum(len(d.text) for d in found.validation)
    assert 0.02 < held / found.nbytes < 0.10
    assert found == corpus.standard_library()


def test_many_files_are_split_by_name_so_a_new_file_moves_no_other(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "texts", files=60)
    before = corpus.from_paths([folder])
    (folder / "another.txt").write_text("more text " * 50, encoding="utf-8")
    after = corpus.from_paths([folder])
    assert before.validation
    assert set(_names(before.validation)) <= set(_names(after.validation))
    assert set(_names(before.training)) <= set(_names(after.training))


def test_few_files_hold_out_their_ends(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "texts", files=2)
    found = corpus.from_paths([folder])
    assert _names(found.training) == _names(found.validation) == ["text0.txt", "text1.txt"]
    for start, end in zip(found.training, found.validation, strict=True):
        assert start.text + end.text == (folder / start.name).read_text(encoding="utf-8")


def test_a_single_line_is_split_too(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("x y " * 2000, encoding="utf-8")
    found = corpus.from_paths([path])
    assert len(found.validation[0].text) == 8000 // corpus.HELD_OUT


def test_binary_files_in_a_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "texts")
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\1")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"\0")
    found = corpus.from_paths([folder])
    assert found.skipped == 2
    assert len(found.training) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x00\x01binary", "not UTF-8 text"),
        ("é".encode("latin-1") * 2000, "not UTF-8 text"),
        (b"", "empty"),
        (b"  \n\n ", "empty"),
        (b"short", "at least 2000"),
        (None, "no such file"),
    ],
)
def test_a_named_file_that_cannot_be_used_is_refused_by_name(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        corpus.from_paths([path])
    assert "given.txt" in str(caught.value)
    assert "Nothing was started" in str(caught.value)


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_corpus(tmp_path / "texts")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, who runs some test suites, may read everything
    with pytest.raises(DataError, match=r"text0\.txt: cannot be read \(Permission denied\)"):
        corpus.from_paths([folder])


def test_a_folder_without_text_says_how_many_binaries_it_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="1 binary files were skipped"):
        corpus.from_paths([tmp_path])
