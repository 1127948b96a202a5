"""A replica's log on its own disk (``ack="disk"``): the disk is one more follower.

A file holds the frames that a learner would get: where the log stands, the state, then the records. So reading it
back is what a learner does. The last frame may be torn or damaged where the power failed; it and what is behind it
were never acknowledged. A log that has grown long is written anew beside the old one, block by block while the
shard goes on, and takes its name when it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from headwater.errors import (
    ClusterError,
    Halt,
    HeadwaterError,
    ProtocolError,
    StateCorrupt,
    StateInUse,
    UsageError,
    other_format,
)
from headwater.server.replication import records as r
from headwater.server.replication import state as s
from headwater.server.replication.followers import Follower, Followers
from headwater.server.replication.lending import Lending
from headwater.server.replication.records import Record
from headwater.server.replication.upstream import Upstream
from headwater.server.shard import Shard
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind, check_payload, encode, parse
from headwater.wire.outgoing import Outgoing

DISK = -1  # the server number under which a primary waits for its own disk
LEAST = 64 << 20  # bytes of log from which it is written anew, if it is also
TIMES = 4  # times as long as the shard's state
STEPS = 4  # blocks of a new file per turn
FILE = "identity"
FORMAT = 2  # 1: frames of wire version 1, tables without kinds


class Identity(msgspec.Struct, frozen=True):
    """Which server of which cluster a folder belongs to; ``session``: the incarnation that it joined with.

    ``format``: of the logs beside it.
    """

    session: int
    welcome: m.Welcome
    format: int = FORMAT


class _Format(msgspec.Struct):
    format: int = 1  # the first one did not say so


class Folder:
    """A server's folder, held by one process at a time. Raises ``UsageError`` or ``StateInUse``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateInUse(f"another server keeps its log in {path}; nothing was read or changed") from None
        except OSError as error:
            raise UsageError(f"the log cannot be kept in {path}: {error}") from None

    def identity(self) -> Identity | None:
        """Who wrote here before, if anybody did. Raises ``StateCorrupt``."""
        try:
            data = (self.path / FILE).read_bytes()
            found = msgspec.msgpack.decode(data, type=_Format).format
            if found == FORMAT:
                return msgspec.msgpack.decode(data, type=Identity)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StateCorrupt(f"{self.path / FILE} cannot be read ({error}); it was left as it is") from None
        raise StateCorrupt(other_format(self.path, found, FORMAT))

    def claim(self, identity: Identity) -> None:
        """This folder belongs to a server that has just joined; logs of another are put into ``before/``."""
        with _writing(self.path):
            before = self.path / "before"
            old = [*self.path.glob("shard-*.log"), *self.path.glob(FILE)]
            if old:
                before.mkdir(exist_ok=True)
                for path in before.iterdir():
                    path.unlink()
            for path in old:
                path.rename(before / path.name)
            fresh = self.path / f"{FILE}.new"
            fd = os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, msgspec.msgpack.encode(identity))
                os.fsync(fd)
            finally:
                os.close(fd)
            fresh.rename(self.path / FILE)
            _sync_folder(self.path)

    def shards(self) -> list[int]:
        """The shards that have a log here."""
        return sorted(int(path.stem.removeprefix("shard-")) for path in self.path.glob("shard-*.log"))

    def close(self) -> None:
        os.close(self._lock)


class DiskLog:
    """The log of one replica. Whatever fails raises ``Halt``: what the disk does not take is not acknowledged."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / f"shard-{shard.number:05d}.log"
        self._shard = shard
        self._reader = Followers(shard, Lending(False), checked=True)
        self._follower = Follower(DISK, 0)
        self._file: _File | None = None
        self._next: _File | None = None  # the file that is being written anew
        self._due: list[Record] = []
        self._restored = False  # a record refers to a snapshot, which does not stay for ever
        self.written = shard.lsn  # the last record that was handed over

    @property
    def whole(self) -> bool:
        """Whether there is a log that this replica could come back from."""
        return self._file is not None

    @property
    def dirty(self) -> bool:
        """Whether something waits for ``sync``."""
        return bool(self._due) or (self._file is not None and self._file.dirty)

    # ---- writing ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write the shard as it is into a new file, all at once: for one that is empty."""
        self.renew()
        while self._next is not None:
            self.step()

    def append(self, record: Record) -> None:
        """The next record; its gradient stays as it is until ``sync``, or ``write``."""
        self._due.append(record)

    def write(self) -> None:
        """Hand over what was appended, so that the gradients may go."""
        due, self._due = self._due, []
        for record in due:
            self._write_frames(self._record(record))
            self.written = record.lsn
            self._restored = self._restored or (isinstance(record.body, r.Begin) and bool(record.body.restore))

    def mark(self) -> None:
        """From here on the log is of another reign; records above this replica's LSN that came before are void."""
        self.write()
        self._write_frames([Outgoing(0, self._reader.standing(False, self._shard.lsn))])

    def sync(self) -> None:
        """Everything that was appended is on the disk when this returns."""
        self.write()
        if self._file is not None and self._file.dirty:
            with _writing(self.path):
                self._file.sync()

    def step(self) -> None:
        """Go on with the new file, if there is one or should be; called once per turn, after ``sync``."""
        if self._next is None:
            if self._file is not None and (self._restored or self._file.size > self._limit()):
                self.renew()
            return
        self._follower.arrived = self._follower.sent
        frames = self._reader.more(self._follower)
        with _writing(self.path):
            self._next.append_frames(frames)
            self._next.sync()
            if self._follower.state is None:
                self._finish(self._next)

    def abandon(self) -> None:
        """The state of another replica follows: there is no log until that is complete and written."""
        for file in (self._file, self._next):
            _close(file)
        self._due, self._file, self._next = [], None, None

    def close(self) -> None:
        self.abandon()

    def remove(self) -> None:
        """This server has no part in the shard any more."""
        self.abandon()
        with _writing(self.path):
            for path in (self.path, self._fresh):
                path.unlink(missing_ok=True)
            _sync_folder(self.path.parent)

    @property
    def _fresh(self) -> Path:
        return self.path.with_suffix(".new")

    def _limit(self) -> int:
        return max(LEAST, TIMES * sum(table.store.nbytes for table in self._shard.tables.values()))

    def renew(self) -> None:
        """Begin a new file with the state as it is; ``step`` goes on with it."""
        self.write()
        _close(self._next)
        self._restored = False
        self._follower = self._reader.by_peer[0] = Follower(DISK, 0)
        with _writing(self.path):
            self._next = _File(self._fresh, os.O_TRUNC)
            self._next.append_frames([Outgoing(0, self._reader.standing(True, self._shard.lsn))])
            self._next.append_frames(self._reader.state(self._follower))
            for record in self._shard.ahead:
                self._next.append_frames(self._record(record))
            self._next.sync()

    def _finish(self, fresh: _File) -> None:
        """The new file is whole and on the disk; from here on it is the log."""
        self._fresh.rename(self.path)
        _sync_folder(self.path.parent)
        _close(self._file)
        self._file, self._next = fresh, None

    def _record(self, record: Record) -> list[Outgoing]:
        self._reader.by_peer[0] = self._follower
        return self._reader.record(0, record)

    def _write_frames(self, frames: list[Outgoing]) -> None:
        with _writing(self.path):
            for file in (self._file, self._next):
                if file is not None:
                    file.append_frames(frames)

    # ---- reading ---------------------------------------------------------------------------------

    def replay(self) -> bool:
        """Bring the replica to where the log ends; whether it is the whole of one. Raises ``StateCorrupt``."""
        self._fresh.unlink(missing_ok=True)
        with _writing(self.path), _mapped(self.path) as view:
            end, voided, whole = _scan(view)
            if not whole:
                return False
            try:
                self._feed(view[:end], voided)
            except (HeadwaterError, RuntimeError) as error:
                raise StateCorrupt(f"{self.path} cannot be replayed: {error}; it was left as it is") from error
        with _writing(self.path):
            os.truncate(self.path, end)
            self._file = _File(self.path, 0, end)
            self._file.sync()
        self.written = self._shard.lsn
        return True

    def _feed(self, view: memoryview, voided: set[int]) -> None:
        """Everything that counts, to an ``Upstream`` as if a primary had sent it."""
        upstream = Upstream(self._shard, 0, DISK, 0)
        for at, _, frame in frames_of(view):
            if frame.kind == Kind.REPLY and at:
                self._shard.reign = m.unpack(frame.body, m.Following).since
            elif at not in voided:
                if frame.payload is not None:
                    target = upstream.landing(frame)
                    target[:] = frame.payload
                    frame.payload = target
                upstream.receive(frame)
                upstream.work()
                if upstream.broken is not None:
                    raise upstream.broken


class _File:
    """A file that only grows."""

    def __init__(self, path: Path, flags: int, size: int = 0) -> None:
        self.fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)
        self.size = size
        self.dirty = True

    def append_frames(self, frames: list[Outgoing]) -> None:
        for out in frames:
            parts = [memoryview(encode(out.frame))]
            if out.frame.payload is not None:
                parts.append(out.frame.payload)
            while parts:
                count = os.writev(self.fd, parts)
                self.size += count
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][count:]
            self.dirty = True

    def sync(self) -> None:
        os.fdatasync(self.fd)
        self.dirty = False


def frames_of(view: memoryview) -> Iterator[tuple[int, int, Frame]]:
    """(begin, end, frame) of every sound frame from the beginning on; the first that is torn or damaged ends it."""
    at = 0
    while True:
        try:
            frame, stop = parse(view, at, len(view))
            if frame is None:
                return
            end = stop + frame.payload_length
            if end > len(view) or (frame.payload_length and not frame.flags & Flag.CHECKED):
                return
            if frame.payload_length:
                frame.payload = view[stop:end]
                check_payload(frame)
        except ProtocolError:
            return
        yield at, end, frame
        at = end


def _scan(view: memoryview) -> tuple[int, set[int], bool]:
    """Where the last complete entry ends, which frames are void, and whether all of a state is there."""
    end, whole = 0, False
    voided: set[int] = set()
    records: list[tuple[int, int]] = []  # (LSN, begin) since the last that a new reign cut off
    for at, stop, frame in frames_of(view):
        if not at and frame.kind != Kind.REPLY:
            break
        if frame.kind == Kind.RECORD:
            records.append((frame.lsn, at))
        elif frame.kind == Kind.REPLY and at:
            while records and records[-1][0] > frame.lsn:
                voided.add(records.pop()[1])
        elif frame.kind == Kind.STATE and not frame.flags & Flag.WANT and frame.flags & Flag.END:
            whole = whole or isinstance(s.unpack(frame.body), s.Finished)
        parted = frame.kind == Kind.RECORD or frame.flags & Flag.WANT
        if not parted or frame.flags & Flag.END:
            end = stop
    return end, voided, whole


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield memoryview(b"")
            return
        view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        yield view  # unmapped with the last frame that refers to it


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that fails ends the server: what it was to keep is not acknowledged, and nobody may go on."""
    try:
        yield
    except OSError as error:
        failed = ClusterError(f"the log {path} cannot be kept ({error}); what it lacks was not acknowledged")
        raise Halt(str(failed)) from failed


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _close(file: _File | None) -> None:
    if file is not None:
        os.close(file.fd)
