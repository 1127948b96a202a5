"""Text files to documents, and which of them are held out for validation."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from headwater.errors import DataError

HELD_OUT = 20
"""One file in this many is held out; of a corpus of fewer files, this part of each file's end."""

_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"})
# encodings holds a hundred generated tables of hexadecimal numbers: an eighth of the bytes, and not prose or code.
_LEFT_OUT_OF_STDLIB = _LEFT_OUT | {"encodings", "__pycache__"}
_LEAST_BYTES = 2_000


class Document(NamedTuple):
    """One text. ``name`` is its path relative to the folder that was given, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out. ``skipped`` counts binary files inside folders."""

    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    skipped: int = 0

    @property
    def nbytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(document.text.encode()) for document in (*self.training, *self.validation))


def standard_library() -> Corpus:
    """The Python standard library of the running interpreter, tests and generated tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in _files(root, _LEFT_OUT_OF_STDLIB):
        # _sysconfigdata holds the paths of the machine that built the interpreter.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            text = _text(path)
            if text:
                documents.append(Document(path.relative_to(root).as_posix(), text))
    return _split(documents, 0, f"the standard library in {root}")


def from_paths(paths: Sequence[Path]) -> Corpus:
    """Every text file named in ``paths`` or found in a folder named there, in a fixed order.

    Raises:
        DataError: a path that is missing, or a named file that is empty, unreadable or not UTF-8 text.
            Inside folders binary and empty files are skipped, hidden ones too, and binary ones counted.
    """
    documents: list[Document] = []
    skipped = 0
    for path in paths:
        if path.is_dir():
            found, binary = _folder(path)
            documents += found
            skipped += binary
        else:
            documents.append(_named_file(path))
    return _split(documents, skipped, ", ".join(map(str, paths)))


def _folder(root: Path) -> tuple[list[Document], int]:
    documents, binary = [], 0
    for path in _files(root, frozenset({"__pycache__"})):
        text = _text(path)
        if text is None:
            binary += 1
        elif text:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return documents, binary


def _files(root: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in left_out and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _named_file(path: Path) -> Document:
    return Document(path.name, read_named(path))


def read_named(path: Path) -> str:
    """The text of a file that the user named.

    Raises:
        DataError: it is missing, unreadable, empty or not UTF-8 text.
    """
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder. Nothing was started; check the path.")
    text = _text(path)
    if text is None:
        raise DataError(
            f"--data {path}: not UTF-8 text (a binary file, or another encoding). Nothing was started; "
            f"convert it, for example with `iconv -t utf-8`, or name other files."
        )
    if not text.strip():
        raise DataError(f"--data {path}: the file is empty. Nothing was started; name a file that holds text.")
    return text


def _text(path: Path) -> str | None:
    """The file's text, or None if it is not text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Nothing was started; "
            f"make it readable for this user or leave it out of --data."
        ) from error
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _split(documents: list[Document], skipped: int, source: str) -> Corpus:
    total = sum(len(document.text) for document in documents)
    if total < _LEAST_BYTES:
        beside = f" ({skipped} binary files were skipped)" if skipped else ""
        raise DataError(
            f"{source}: {total} characters of text in {len(documents)} files{beside}; a model needs at least "
            f"{_LEAST_BYTES} to train on and to hold some out. Nothing was started; give --data more text."
        )
    if len(documents) >= HELD_OUT:
        held = [document for document in documents if _held_out(document.name)]
        rest = [document for document in documents if not _held_out(document.name)]
        if held and len(held) < len(rest):
            return Corpus(tuple(rest), tuple(held), skipped)
    return _split_each(documents, skipped)


def _held_out(name: str) -> bool:
    # Not hash(): that differs from process to process.
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % HELD_OUT == 0


def _split_each(documents: list[Document], skipped: int) -> Corpus:
    """Few files: the end of each is held out, cut at a line where there is one near."""
    training, validation = [], []
    for name, text in documents:
        cut = len(text) - max(1, len(text) // HELD_OUT)
        line_end = text.rfind("\n", cut // 2, cut)
        cut = line_end + 1 if line_end >= 0 else cut
        training.append(Document(name, text[:cut]))
        validation.append(Document(name, text[cut:]))
    return Corpus(tuple(training), tuple(validation), skipped)
