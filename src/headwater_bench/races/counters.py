"""What a process has counted, in memory that outlives it: it may be killed at any moment."""

from __future__ import annotations

import mmap
from collections import Counter
from pathlib import Path
from typing import Self

NAMES = (
    "reads", "torn", "mixed", "mislabelled", "changed", "rechecks", "afterwards", "fetched",
    "shared", "whole", "deltas", "damaged", "published", "steps",
    "UnknownVersion", "VersionExpired", "LinkBroken", "Unreachable", "DeadlineExceeded", "DeltaCorrupt", "other",
)  # fmt: skip
"""The counters. ``rechecks``: looks at a version that was held; ``afterwards``: those of them whose lease had ended;
``changed``: of which found something else than before; ``fetched``: reads of a version that was not here yet."""

ERRORS = NAMES[NAMES.index("UnknownVersion") :]
_WIDTH = 8


class Counters:
    """Counters in a file. ``words`` gets a line per thing that must not happen, and the last error of each kind."""

    def __init__(self, path: Path) -> None:
        self._words = path.with_suffix(".words")
        with path.open("a+b") as file:
            file.truncate(len(NAMES) * _WIDTH)
            self._map = mmap.mmap(file.fileno(), 0)
        self._view = memoryview(self._map).cast("Q")
        self._at = {name: i for i, name in enumerate(NAMES)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()
        self._map.close()

    def add(self, name: str, by: int = 1) -> None:
        self._view[self._at[name]] += by

    def put(self, name: str, value: int) -> None:
        self._view[self._at[name]] = value

    def failed(self, code: str, text: str) -> None:
        """A typed error, counted apart."""
        self.add(code if code in ERRORS else "other")
        if code not in ERRORS:
            self.say(f"{code}: {text}")

    def say(self, text: str) -> None:
        with self._words.open("a", encoding="utf-8") as file:
            file.write(text.replace("\n", " ") + "\n")


def read(path: Path) -> Counter[str]:
    """The counters of a process, alive or dead."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) < len(NAMES) * _WIDTH:
        return Counter()
    return Counter(dict(zip(NAMES, memoryview(data).cast("Q").tolist(), strict=True)))


def said(path: Path) -> list[str]:
    words = path.with_suffix(".words")
    return words.read_text(encoding="utf-8").splitlines() if words.exists() else []
