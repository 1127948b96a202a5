"""One process at a time works in a run's folder.

It holds a lock on a file there, which goes with the process, however that ends. The file stays: it only names the
holder, and who removed it would let two in.
"""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path

from headwater.errors import DataError, RunInUse

LOCK = ".lock"

_held: dict[Path, int] = {}


def claim(folder: Path) -> bool:
    """Work in this folder until ``release``, or until this process ends. Whether it did not already.

    Raises:
        RunInUse: another process does. DataError: the folder cannot be written.
    """
    place = folder.resolve()
    if place in _held:
        return False
    try:
        fd = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Nothing was changed.") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 256, 0).decode(errors="replace").strip() or "another process"
        os.close(fd)
        raise RunInUse(
            f"{holder} works in {folder}. Nothing was changed; wait for it, end it, or train in another folder (--run)."
        ) from None
    except OSError:  # a disk without locks: as before there were any
        pass
    _held[place] = fd
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    except OSError:  # no room for the name of the holder; the lock holds all the same
        pass
    return True


def release(folder: Path) -> None:
    """Safe to call twice."""
    fd = _held.pop(folder.resolve(), -1)
    if fd >= 0:
        os.close(fd)
