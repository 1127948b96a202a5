"""Data sets that the library ``datasets`` finds by a name: on the hub, in its cache, or in a folder that it wrote.

The library is imported here only; it is no dependency, as files and folders of one's own are read without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headwater.errors import DataError

HELD_OUT = ("test", "validation", "valid", "val", "dev")
"""Names of the parts that are held out: the first that has labels is."""

_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(?::[\w.-]+)?")
_SPEAKERS = ("speaker_id", "speaker", "client_id")


def is_name(word: str) -> bool:
    """Whether it can be ``name``, ``owner/name`` or ``owner/name:configuration``, and is no file or folder here."""
    return _NAME.fullmatch(word) is not None and not Path(word).exists()


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk``, or that of a ``DatasetDict``, wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def finds(source: str | Path) -> bool:
    """Whether ``--data`` is the library's to read: a name, or a folder that it wrote."""
    return is_name(str(source)) or is_saved(Path(source))


def load(name: str) -> Mapping[str, Any]:
    """The parts of a data set, ``train`` among them, each a ``datasets.Dataset``.

    Args:
        name: ``owner/name`` or ``owner/name:configuration``; or a folder, as ``load_dataset`` or ``load_from_disk``
            reads it.

    Raises:
        DataError: the library is not installed, does not find it, or there is no part ``train``.
    """
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(
            f"--data {name}: {_here(name)}the package datasets, which would read it, is not installed. Nothing was "
            f"started; check the path, or pip install datasets."
        ) from None
    try:
        if is_saved(Path(name)):
            found = datasets.load_from_disk(name)
        else:
            path, _, configuration = (name, "", "") if Path(name).exists() else name.partition(":")
            found = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of any kind: network, cache, format
        raise DataError(
            f"--data {name}: {_here(name)}the library datasets cannot read it ({_reason(error)}). Nothing was "
            f"started; check the name. Without a network give a folder of your own, or one that save_to_disk of the "
            f"library wrote where there is a network."
        ) from error
    parts: Mapping[str, Any] = found if isinstance(found, Mapping) else {"train": found}
    if "train" not in parts:
        raise DataError(f"--data {name}: no part 'train', but {', '.join(parts)}. Nothing was started; give another.")
    return parts


def _here(name: str) -> str:
    return "" if Path(name).exists() else "no such file or folder here, and "


def _reason(error: BaseException) -> str:
    """What it came from: the library wraps that twice, in words that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


def check_class(place: str, label: Any, names: Sequence[str]) -> int:
    """The number of a class. Raises ``DataError``: it is none of them."""
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise DataError(
            f"{place}: the label {label} is none of its {len(names)} classes. Nothing was started; mend the data set."
        )
    return label


@dataclass(frozen=True)
class File:
    """An image or a sound of a table, as the bytes of a file.

    Attributes:
        place: which it is, for messages and to draw by.
        label: its class.
        speaker: who speaks, if a column says so, else "".
    """

    place: str
    label: str
    speaker: str
    _rows: Any = field(repr=False, compare=False)
    _row: int = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.place

    def read_bytes(self) -> bytes:
        """The file's bytes, as they were before anything decoded them. Raises ``OSError``: there are none."""
        found = self._stored()
        body, path = found.get("bytes"), found.get("path")
        if body is not None:
            return bytes(body)
        if path is None:
            raise FileNotFoundError("the row is empty")
        return Path(path).read_bytes()

    def stem(self) -> str:
        """The file's name without its ending, if the data set keeps it, else ""."""
        return Path(self._stored().get("path") or "").stem

    def _stored(self) -> dict[str, Any]:
        return next(iter(self._rows[self._row].values())) or {}


@dataclass(frozen=True)
class Files:
    """``names`` of all classes; those to train on; those held out, none if no part of the data set says which."""

    names: tuple[str, ...]
    training: list[File]
    held_out: list[File]


def files(name: str, kind: Literal["Image", "Audio"]) -> Files:
    """The images or sounds of a data set, with their classes. They are read when they are asked for.

    Raises:
        DataError: as ``load``; or not one column of this kind, not one of classes, or a label that is none of them.
    """
    found = load(name)
    names = _classes(name, found["train"])
    training = _files(name, "train", found["train"], kind)
    held_out = (_files(name, part, found[part], kind) for part in HELD_OUT if part in found)
    return Files(names, training, next(filter(None, held_out), []))


def of_part(name: str, part: str, table: Any, kind: Literal["Image", "Audio"]) -> list[File]:
    """The images or sounds of a part, row by row, without classes. Raises ``DataError``: not one column of them."""
    bare = _bare(name, table, kind)
    return [File(f"{name}, {part} {row}", "", "", bare, row) for row in range(len(bare))]


def _bare(name: str, table: Any, kind: str) -> Any:
    """Only that column, not decoded."""
    import datasets

    column = _only(name, table, kind, f"no column of the feature {kind}")
    return table.select_columns([column]).cast_column(column, getattr(datasets, kind)(decode=False))


def _files(name: str, part: str, table: Any, kind: str) -> list[File]:
    wanted = _only(name, table, "ClassLabel", "no column of the feature ClassLabel")
    names, labels = _classes(name, table), list(table[wanted])
    if all(label in (None, -1) for label in labels):
        return []
    who = next((each for each in _SPEAKERS if each in table.column_names), None)
    speakers = [str(each) for each in table[who]] if who else [""] * len(labels)
    bare = _bare(name, table, kind)
    made = []
    for row, (label, speaker) in enumerate(zip(labels, speakers, strict=True)):
        place = f"{name}, {part} {row}"
        made.append(File(place, names[check_class(place, label, names)], speaker, bare, row))
    return made


def _classes(name: str, table: Any) -> tuple[str, ...]:
    return tuple(table.features[_only(name, table, "ClassLabel", "no column of the feature ClassLabel")].names)


def _only(name: str, table: Any, kind: str, missing: str) -> str:
    """The column of a feature; of several the one called ``label``, ``image`` or ``audio``."""
    found = [column for column, feature in table.features.items() if type(feature).__name__ == kind]
    usual = [column for column in found if column in ("label", kind.lower())]
    if len(found) != 1 and len(usual) != 1:
        there = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in table.features.items())
        told = missing if not found else f"several columns of the feature {kind}, none called as is usual"
        raise DataError(f"--data {name}: {told}; there are {there}. Nothing was started; give another data set.")
    return str(found[0] if len(found) == 1 else usual[0])
