"""Data sets as the library ``datasets`` gives them: by itself where it is installed, and by what is asked of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

Rows = Sequence[tuple[bytes | None, str, int | None]]
"""A file's bytes, its name, and the number of its class."""

BY = [pytest.param("library", marks=pytest.mark.filterwarnings("ignore")), "stand-in"]
"""Warnings of the library are not ours."""


class Table:
    """Of ``datasets.Dataset`` what is asked for."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], features: Mapping[str, Any]) -> None:
        self.columns, self.features = columns, features
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return list(self.columns[key])
        assert not any(getattr(feature, "decode", False) for feature in self.features.values()), "it would decode"
        return {name: column[key] for name, column in self.columns.items()}

    def select_columns(self, names: Sequence[str]) -> Table:
        return Table({n: self.columns[n] for n in names}, {n: self.features[n] for n in names})

    def cast_column(self, name: str, feature: Any) -> Table:
        return Table(self.columns, {**self.features, name: feature})


class _Feature:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Image(_Feature):
    pass


class Audio(_Feature):
    pass


class ClassLabel:
    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)


def write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by: str, kind: str, names: Sequence[str], parts: Mapping[str, Rows],
    **columns: Mapping[str, Sequence[str]],
) -> str:  # fmt: skip
    """What ``DatasetDict.save_to_disk`` writes; the folder. ``columns`` are more, by part."""
    data = {
        part: {
            kind.lower(): [{"bytes": body, "path": name} for body, name, _ in rows],
            "label": [label for *_, label in rows],
            **{name: found[part] for name, found in columns.items()},
        }
        for part, rows in parts.items()
    }
    if by == "library":
        library = pytest.importorskip("datasets")
        arrow = pytest.importorskip("pyarrow")
        more = {name: library.Value("string") for name in columns}
        features = library.Features(
            {kind.lower(): getattr(library, kind)(), "label": library.ClassLabel(names=list(names)), **more}
        )
        tables = {part: arrow.table(found, schema=features.arrow_schema) for part, found in data.items()}
        # Of Arrow's tables, as the library encodes sounds by torchcodec only; it cannot hash them.
        made = {part: library.Dataset(library.table.InMemoryTable(t), fingerprint=part) for part, t in tables.items()}
        library.DatasetDict(made).save_to_disk(str(folder))
        return str(folder)
    features = {kind.lower(): {"Image": Image, "Audio": Audio}[kind](), "label": ClassLabel(names)}
    stand = {part: Table(found, {**features, **dict.fromkeys(columns)}) for part, found in data.items()}
    stand_in = type(sys)("datasets")
    vars(stand_in).update(load_from_disk=lambda place: stand, Image=Image, Audio=Audio)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    folder.mkdir()
    (folder / "dataset_dict.json").write_text("{}", encoding="utf-8")
    return str(folder)
