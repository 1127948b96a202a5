"""Where `headwater status` finds the clusters of this user on this host: one private file per launcher.

``$XDG_RUNTIME_DIR/headwater/PID.json``, or ``headwater-UID/PID.json`` in the folder for temporary files; mode 0600 in a
folder of mode 0700, as it holds the token. The launcher removes its file; one that a kill left behind is removed by
the next reader.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import msgspec


class Record(msgspec.Struct, frozen=True):
    """A running cluster: its address and token, who launched it and when (seconds since 1970)."""

    address: str
    token: str
    pid: int
    started: float
    command: str = ""

    def __repr__(self) -> str:
        return f"Record(address={self.address!r}, pid={self.pid}, command={self.command!r})"


def folder() -> Path:
    """The private folder, made if it is missing. Raises ``PermissionError`` when others could read or own it."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "headwater" if base else Path(tempfile.gettempdir()) / f"headwater-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not a folder that only this user can read")
    return path


def write_private(path: Path, text: str) -> None:
    """Create a file of mode 0600. Raises ``FileExistsError`` rather than write into a file of somebody else."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def advertise(address: str, token: str, command: str = "") -> Path | None:
    """Leave a record of this process's cluster; ``None`` where no private folder can be had."""
    record = Record(address, token, os.getpid(), time.time(), command)
    try:
        path = folder() / f"{os.getpid()}-{address.rpartition(':')[2]}.json"
        path.unlink(missing_ok=True)
        write_private(path, msgspec.json.encode(record).decode())
    except OSError:
        return None
    return path


def private_state() -> Path:
    """A private folder for what this process's cluster must remember, to be removed by who asked for it.

    Raises ``OSError``.
    """
    try:
        base = folder()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="headwater-state-"))
    _sweep(base)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", suffix=".state", dir=base))


def running() -> list[Record]:
    """The records whose launcher is alive, oldest first."""
    found = []
    with contextlib.suppress(OSError):
        _sweep(folder())
        for path in sorted(folder().glob("*.json")):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
            except (OSError, msgspec.MsgspecError):
                continue
            if _alive(record.pid):
                found.append(record)
            else:
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda record: record.started)


def _sweep(base: Path) -> None:
    """Remove what launchers that were killed have left."""
    for path in base.glob("*.state"):
        pid = path.name.partition("-")[0]
        if not (pid.isdecimal() and _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def find(address: str) -> Record | None:
    """The record of the running cluster at ``address``, if a launcher of this user on this host left one."""
    return next((record for record in running() if record.address == address), None)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
