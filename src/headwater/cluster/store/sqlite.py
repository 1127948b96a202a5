"""A store in one SQLite file of a local folder: what a coordinator with ``--state`` uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from headwater.errors import ClusterError, StateCorrupt, StateInUse, UsageError, other_format

FILE = "coordinator.sqlite"
LOCK = "coordinator.lock"
_APPLICATION = 0x48574B56  # "HWKV", in the header of the file: says whose it is
_FORMAT = 2  # 1: tables had no kinds
_LOG_PAGES = 128  # the log is moved into the database when it is this long: half a megabyte


class SqliteStore:
    """One SQLite file in ``folder``, which is made if need be: write-ahead log, fsync at each ``put``.

    ``folder`` must be on a local disk (neither ``flock`` nor SQLite keeps its word on every network file system). Each
    value has a checksum, and the file is checked as a whole when it is opened. A write-ahead log that ends in a torn
    record has lost only what ``put`` never returned for.

    Raises ``StateInUse`` naming the holder's process, ``StateCorrupt`` for a damaged or foreign file (which is left as
    it is), ``UsageError`` if the folder cannot be written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._path = self.folder / FILE
        self._guard = threading.Lock()
        self._broken = ""
        self._db: sqlite3.Connection | None = None
        self._lock = _hold(self.folder)
        try:
            self._open()
            self.items()  # refuses a damaged value now, not when it is too late
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        log = self._path.with_name(FILE + "-wal")
        empty = not self._path.exists() or self._path.stat().st_size == 0
        if empty and log.exists() and log.stat().st_size:
            raise StateCorrupt(f"{log} has no {FILE} beside it; put that back, or move the log away to begin anew")
        with self._reading():
            # Autocommit: transactions begin and end where this file says so.
            db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0.0)
            self._db = db
            db.execute("PRAGMA locking_mode=EXCLUSIVE")  # no shared-memory file, and no other reader
            db.execute("PRAGMA synchronous=FULL")
            if _number(db, "page_count") == 0:
                _create(db)
                _sync(self.folder)
            self._identify(db)
            (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise UsageError(f"SQLite cannot keep a write-ahead log in {self.folder} (it says {mode!r})")
            (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            if verdict != "ok":
                raise StateCorrupt(f"{self._path} is damaged ({verdict}); it was left as it is")
            db.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
            _shorten(db)

    def _identify(self, db: sqlite3.Connection) -> None:
        """Before anything is written to a file that may be another program's."""
        if _number(db, "application_id") != _APPLICATION:
            raise StateCorrupt(f"{self._path} is a database of another program; it was left as it is")
        version = _number(db, "user_version")
        if version != _FORMAT:
            raise StateCorrupt(other_format(self._path, version, _FORMAT))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What SQLite says of a file, in our words."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if _is(error, "SQLITE_CORRUPT"):
                raise StateCorrupt(f"{self._path} is damaged ({error}); it was left as it is") from None
            raise UsageError(
                f"the state in {self.folder} cannot be opened: {error}; "
                "its folder must be writable, and its disk not full"
            ) from None
        except sqlite3.DatabaseError as error:
            raise StateCorrupt(f"{self._path} cannot be read ({error}); it was left as it is") from None

    # ---- the three promises ----------------------------------------------------------------------

    def items(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        with self._guard, self._reading():
            for key, value, check in self._opened().execute("SELECT key, value, checksum FROM state ORDER BY key"):
                if not isinstance(key, str) or not isinstance(value, bytes) or check != _checksum(key, value):
                    raise StateCorrupt(f"the value of {key!r} in {self._path} is damaged; the file was left as it is")
                found[key] = value
        return found

    def put(self, changes: Mapping[str, bytes | None]) -> None:
        if not changes:
            return
        with self._guard:
            db = self._opened()
            try:
                self._put_with_room(db, changes)
            except sqlite3.Error as error:
                self._fail(db, error)

    def _put_with_room(self, db: sqlite3.Connection, changes: Mapping[str, bytes | None]) -> None:
        """On a full disk the log gives up its room, and the change is tried once more."""
        try:
            self._put(db, changes)
        except sqlite3.OperationalError as error:
            if not _is(error, "SQLITE_FULL"):
                raise
            _undo(db)
            _shorten(db)
            self._put(db, changes)

    def _put(self, db: sqlite3.Connection, changes: Mapping[str, bytes | None]) -> None:
        kept = [(key, value, _checksum(key, value)) for key, value in changes.items() if value is not None]
        gone = [(key,) for key, value in changes.items() if value is None]
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT OR REPLACE INTO state(key, value, checksum) VALUES (?, ?, ?)", kept)
        db.executemany("DELETE FROM state WHERE key = ?", gone)
        db.execute("COMMIT")

    def _fail(self, db: sqlite3.Connection, error: sqlite3.Error) -> None:
        """A full disk is told and may be tried again. After any other failure nobody knows what the disk holds."""
        _undo(db)
        if _is(error, "SQLITE_FULL"):
            raise ClusterError(
                f"the disk of the coordinator's state ({self.folder}) is full; nothing of this change was kept"
            ) from error
        self._broken = f"the disk of the coordinator's state ({self.folder}) failed: {error}"
        raise ClusterError(
            f"{self._broken}; whether this change was kept is unknown. Restart the coordinator: it reads what is there"
        ) from error

    def _opened(self) -> sqlite3.Connection:
        if self._broken:
            raise ClusterError(f"{self._broken}; it takes nothing more until it is opened again")
        if self._db is None:
            raise UsageError(f"the state in {self.folder} is closed")
        return self._db

    def close(self) -> None:
        with self._guard:
            db, self._db = self._db, None
            if db is not None:
                with contextlib.suppress(sqlite3.Error):
                    db.close()
            lock, self._lock = self._lock, -1
            if lock >= 0:
                os.close(lock)


def _hold(folder: Path) -> int:
    """The lock that goes with the process: a file descriptor. The file stays, it only names the holder."""
    path = folder / LOCK
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"the coordinator's state cannot be kept in {folder}: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise StateInUse(
            f"process {holder or '?'} is the coordinator of the state in {folder}; nothing was read or changed. "
            "Stop that one first, or name another folder"
        ) from None
    except OSError as error:
        os.close(lock)
        raise UsageError(f"{path} cannot be locked: {error}; name a folder on a local disk with room") from None
    return lock


def _create(db: sqlite3.Connection) -> None:
    """In one transaction, so that a crash leaves an empty file or a whole one."""
    db.execute("BEGIN IMMEDIATE")
    db.execute(f"PRAGMA application_id={_APPLICATION}")
    db.execute(f"PRAGMA user_version={_FORMAT}")
    db.execute("CREATE TABLE state(key TEXT PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID")
    db.execute("COMMIT")


def _undo(db: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        if db.in_transaction:
            db.execute("ROLLBACK")


def _shorten(db: sqlite3.Connection) -> None:
    """Move what the log holds into the database, and cut the log to nothing."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _number(db: sqlite3.Connection, pragma: str) -> int:
    (found,) = db.execute(f"PRAGMA {pragma}").fetchone()
    return int(found)


def _checksum(key: str, value: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key.encode() + b"\0" + value)


def _sync(folder: Path) -> None:
    """So that the folder's entry of a new file is on disk as well."""
    found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(found)
    finally:
        os.close(found)


def _is(error: sqlite3.Error, name: str) -> bool:
    """Whether SQLite gave this code or an extended form of it (``SQLITE_IOERR`` covers ``SQLITE_IOERR_FSYNC``)."""
    found = getattr(error, "sqlite_errorname", "")
    return bool(found == name or found.startswith(name + "_"))
