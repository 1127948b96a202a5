"""Where `headwater status` finds the clusters of this user on this host: one private file per launcher.

``$XDG_RUNTIME_DIR/headwater/PID-….json``, or where that folder is not this user's to write in (a ``sudo`` keeps the
variable of somebody else) ``/run/user/UID/headwater/``, or ``headwater-UID/`` in the folder for temporary files; mode
0600 in a folder of mode 0700, as it holds the token. Who looks for clusters looks in the same places.

The launcher removes its file, and holds a lock on it until then. The kernel lets go of a lock when its holder ends,
however it ends: so a file without a lock is one that a kill left behind, and the next one who looks removes it. A
process number would not do: it is used again, in a container by the very next launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

import msgspec

_KINDS = (".json", ".token", ".state")
_UNBORN = 3600.0
"""Seconds after which what has no lock and no name yet is nobody's."""

_held: dict[Path, int] = {}


class Record(msgspec.Struct, frozen=True):
    """A running cluster: its address and token, who launched it and when (seconds since 1970)."""

    address: str
    token: str
    pid: int
    started: float
    command: str = ""

    def __repr__(self) -> str:
        return f"Record(address={self.address!r}, pid={self.pid}, command={self.command!r})"


# ---- folders -----------------------------------------------------------------------------------------


def folder() -> Path:
    """The private folder that this process writes in, made if it is missing. Raises ``PermissionError``."""
    tried = []
    for path in _places():
        try:
            return _private(path)
        except OSError as error:
            tried.append(f"{path}: {error.strerror or error}")
    raise PermissionError("; ".join(tried))


def complaint() -> str:
    """Why ``XDG_RUNTIME_DIR``, if it is set, is not used, and what is used instead; or nothing."""
    asked = os.environ.get("XDG_RUNTIME_DIR")
    why = _refused(asked) if asked else ""
    if not why:
        return ""
    try:
        return f"XDG_RUNTIME_DIR={asked} cannot be used ({why}); the cluster's private files are in {folder()}"
    except OSError as error:
        return f"no folder for the cluster's private files ({error}): headwater status needs --address and the token"


def _refused(base: str) -> str:
    try:
        # Root may write into the folder of another user, who could not remove what it left there.
        if Path(base).stat().st_uid != os.getuid():
            return "it is another user's"
        _private(Path(base) / "headwater")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _places() -> list[Path]:
    """The folders that may be the one, the best first."""
    asked, usual = os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.getuid()}"
    if asked and asked != usual and not _refused(asked):
        return [Path(asked) / "headwater"]
    return [Path(usual) / "headwater", *(Path(base) / f"headwater-{os.getuid()}" for base in _shared())]


def _shared() -> list[str]:
    """Folders for temporary files: a batch job may have one of its own, which a shell beside it does not know."""
    return list(dict.fromkeys([tempfile.gettempdir(), "/tmp"]))


def _private(path: Path) -> Path:
    """Raises ``OSError`` where it cannot be made or written, and when others could read or own it."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not a folder that only this user can read")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    return path


# ---- what a launcher leaves --------------------------------------------------------------------------


def write_private(path: Path, text: str) -> None:
    """Create a file of mode 0600. Raises ``FileExistsError`` rather than write into a file of somebody else."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def advertise(address: str, token: str, command: str = "") -> Path | None:
    """Leave a record of this process's cluster until ``withdraw``; ``None`` where no private folder can be had."""
    command = command.encode("utf-8", "backslashreplace").decode()  # arguments may be bytes that are no text
    record = Record(address, token, os.getpid(), time.time(), command)
    try:
        return _leave(folder(), ".json", msgspec.json.encode(record).decode())
    except OSError:
        return None


def keep_token(token: str) -> Path:
    """A private file of the token, until ``withdraw``. Raises ``OSError``."""
    return _leave(_any_folder(), ".token", token + "\n")


def private_state() -> Path:
    """A private folder for what this process's cluster must remember, until ``withdraw``. Raises ``OSError``."""
    return _leave(_any_folder(), ".state", None)


def withdraw(path: Path | None) -> None:
    """Remove what one of the above has left, with all that is in it. Safe to call twice."""
    if path is None:
        return
    _remove(path)
    fd = _held.pop(path, -1)
    if fd >= 0:
        os.close(fd)


def _any_folder() -> Path:
    """Nobody else has to find it there."""
    try:
        return folder()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="headwater-"))


def _leave(base: Path, kind: str, text: str | None) -> Path:
    """A file of ``text``, or a folder, under a lock. It has its lock before it has its name."""
    _sweep(base)
    name = f"{os.getpid()}-{secrets.token_hex(4)}{kind}"
    unborn, path = base / f".{name}", base / name
    if text is None:
        unborn.mkdir(mode=0o700)
    else:
        write_private(unborn, text)
    fd = os.open(unborn, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a disk without locks: the process number must do
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _held[path] = fd
    unborn.rename(path)
    return path


def _let_go_in_a_child() -> None:
    """A forked child is not the launcher: what it holds open would outlive it."""
    for fd in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_a_child)


# ---- who looks ---------------------------------------------------------------------------------------


def running() -> list[Record]:
    """The records whose launcher is alive, oldest first."""
    found = []
    for base in _places():
        with contextlib.suppress(OSError):
            if not base.is_dir():
                continue
            _sweep(_private(base))
            for path in base.glob("[!.]*.json"):
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    found.append(msgspec.json.decode(path.read_bytes(), type=Record))
    return sorted(found, key=lambda record: record.started)


def find(address: str) -> Record | None:
    """The record of the running cluster at ``address``, if a launcher of this user on this host left one."""
    return next((record for record in running() if record.address == address), None)


def _sweep(base: Path) -> None:
    """Remove what launchers that were killed have left."""
    for path in base.iterdir():
        if path.suffix not in _KINDS or _alive(path):
            continue
        with contextlib.suppress(OSError):
            if path.name.startswith(".") and time.time() - path.lstat().st_mtime < _UNBORN:
                continue
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(path: Path) -> bool:
    """Whether the launcher that left this still holds it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pid = path.name.lstrip(".").partition("-")[0]
        return pid.isdecimal() and Path(f"/proc/{pid}").exists()
    finally:
        os.close(fd)
    return False
