"""The file operations that snapshots are made of, and nothing else of theirs touches the disk to change it.

A crash can fall between any two of them and into the middle of a write: tests record the operations of a run, replay
every beginning of the record, and look what ``restore`` makes of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: memoryview | bytes) -> None: ...
    def sync(self) -> None: ...


class Disk:
    """The real one. Everything raises ``OSError``."""

    def make_folder(self, path: Path) -> None:
        """The folder's entry is on disk when this returns."""
        path.mkdir(exist_ok=True)
        self.sync_folder(path.parent)

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Sink]:
        """A new file, or an old one from its beginning."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            yield _File(fd)
        finally:
            os.close(fd)

    def rename(self, path: Path, to: Path) -> None:
        """In one folder, over what is there."""
        path.rename(to)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """It must be empty."""
        path.rmdir()

    def sync_folder(self, path: Path) -> None:
        """So that names that came, went or changed in it are on disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def sync(self) -> None:
        os.fsync(self._fd)


DISK = Disk()


def replace(disk: Disk, path: Path, data: bytes) -> None:
    """A file that is there with all of ``data``, or as it was before."""
    beside = path.with_name(path.name + ".part")
    with disk.create(beside) as file:
        file.write(data)
        file.sync()
    disk.rename(beside, path)
    disk.sync_folder(path.parent)
