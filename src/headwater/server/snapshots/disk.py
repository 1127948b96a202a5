"""The file operations that snapshots are made of, and nothing else of theirs touches the disk to change it.

A crash can fall between any two of them and into the middle of a write: tests record the operations of a run, replay
every beginning of the record, and look what ``restore`` makes of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

PART = ".part"
"""What a file's name ends with until all of it is there."""


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
        """A new file, or an old one from its beginning; one that another process writes is busy (``OSError``)."""
        fd = _alone(path)
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


@contextlib.contextmanager
def whole(disk: Disk, path: Path) -> Iterator[Sink]:
    """A file that is there with all that the block writes, and on disk, or as it was before.

    If the block, or the disk, raises, nothing is left of the attempt: on a full disk the next one would fail for it.
    """
    beside = path.with_name(path.name + PART)
    with disk.create(beside) as file:
        try:
            yield file
            file.sync()
            disk.rename(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.unlink(beside)
            raise
    disk.sync_folder(path.parent)


def replace(disk: Disk, path: Path, data: bytes) -> None:
    """``whole``, of ``data``."""
    with whole(disk, path) as file:
        file.write(data)


def held(path: Path) -> bool | None:
    """Whether a process holds a lock on this file or folder; ``None``: nobody knows, as on a disk without locks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _alone(path: Path) -> int:
    """An empty file under a lock, which goes with the process; a descriptor to write with."""
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(fd)
            if _is(fd, path):
                os.ftruncate(fd, 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it has got its name, or was removed, just before it could be locked


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another process writes it just now") from None
    except OSError:  # a disk without locks
        pass


def _is(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
