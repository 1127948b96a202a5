"""What makes a folder of files a snapshot, and when the ones before it may go.

The order is the whole of it: every shard's file is on disk, then the manifest is written beside its place, synced and
renamed into it, and the folder is synced: from here on the snapshot exists. Only then are older ones deleted, manifest
first. A crash anywhere in this leaves the newest finished snapshot whole.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import xxhash

from headwater.errors import SnapshotCorrupt, other_format
from headwater.layout.dense import only
from headwater.server.snapshots.disk import DISK, Disk, held, replace
from headwater.server.snapshots.format import Mark, SessionMark, ShardFile, ShardMark, Written
from headwater.types import DenseSpec, TableSpec, read_spec

NAME = "manifest.json"
FORMAT = 2  # 1: tables had no kinds
KEEP = 2


class TableEntry(msgspec.Struct, frozen=True):
    """A table at the cut; what differs from shard to shard is merged (``merge``).

    ``packed``: the spec again, exactly; JSON has no infinity, which is a good ``max_grad_norm``.
    """

    table: int
    spec: TableSpec
    mark: Mark
    packed: bytes = b""

    @property
    def dense(self) -> DenseSpec:
        """The spec, where only a dense table makes sense. Raises ``UsageError``."""
        return only(self.spec)


class FileEntry(msgspec.Struct, frozen=True):
    """A shard's file, and the state of the shard that it is the file of."""

    shard: int
    name: str
    nbytes: int
    sha256: str
    seal: int
    lsn: int
    sessions: tuple[SessionMark, ...]


class Manifest(msgspec.Struct, frozen=True):
    """``plan``: the data plan's state, opaque. ``check``: XXH3 of the manifest without it."""

    format: int
    number: int
    created: str
    shards: int
    tables: tuple[TableEntry, ...]
    files: tuple[FileEntry, ...]
    plan: bytes = b""
    check: str = ""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def folder_of(root: Path, number: int) -> Path:
    return root / f"{number:08d}"


def numbers(root: Path) -> list[int]:
    """Of all snapshots there, finished or not, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit() and path.is_dir())
    return []


def finished(root: Path) -> list[int]:
    return [number for number in numbers(root) if (folder_of(root, number) / NAME).is_file()]


def start(root: Path, disk: Disk = DISK, after: int = 0) -> tuple[int, Path]:
    """The number and the folder of a new snapshot; the folder is on disk when this returns. Raises ``OSError``.

    ``after``: the number is greater; one that was given up is not used again, as somebody may still be writing it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    disk.make_folder(root)
    number = max([*numbers(root), after]) + 1
    disk.make_folder(folder_of(root, number))
    return number, folder_of(root, number)


def publish(
    root: Path,
    number: int,
    files: Sequence[Written],
    tables: Mapping[int, TableSpec],
    shards: int,
    *,
    plan: bytes = b"",
    now: float = 0.0,
    disk: Disk = DISK,
) -> Manifest:
    """Make snapshot ``number`` exist. Its shards' files are on disk; ``tables`` by number; ``now``: seconds since 1970.

    Raises ``SnapshotCorrupt`` (a file is not what it should be, or a bulk table was not cut at one clock) or
    ``OSError``; the snapshot does not exist then, and the ones before are as they were.
    """
    folder = folder_of(root, number)
    marks: list[ShardMark] = []
    entries: list[FileEntry] = []
    for each in files:
        entry, mark = _look(folder, number, each)
        entries.append(entry)
        marks.append(mark)
    if sorted(entry.shard for entry in entries) != list(range(shards)):
        raise SnapshotCorrupt(f"{folder}: files of shards {[entry.shard for entry in entries]}, not of all {shards}")
    entries.sort(key=lambda entry: entry.shard)
    merged = tuple(
        TableEntry(table, spec, merge(folder, table, spec, marks), msgspec.msgpack.encode(spec))
        for table, spec in sorted(tables.items())
    )
    created = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    manifest = Manifest(FORMAT, number, created, shards, merged, tuple(entries), plan)
    manifest = msgspec.structs.replace(manifest, check=_check(manifest))
    replace(disk, folder / NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest


def _look(folder: Path, number: int, written: Written) -> tuple[FileEntry, ShardMark]:
    """A file as its writer described it; its header and checksums are read, its data is not."""
    with contextlib.closing(ShardFile(folder / written.name)) as file:
        mark = file.mark
        if mark.snapshot != number or file.nbytes != written.nbytes:
            raise SnapshotCorrupt(
                f"{file.path}: {file.nbytes} bytes of snapshot {mark.snapshot}, not {written.nbytes} of {number}"
            )
        entry = FileEntry(
            mark.shard, written.name, written.nbytes, written.sha256, file.seal, mark.lsn, mark.sessions
        )  # fmt: skip
        return entry, mark


def merge(folder: Path, table: int, spec: TableSpec, marks: Sequence[ShardMark]) -> Mark:
    """What the shards say of one table, as one: the highest clocks. Raises ``SnapshotCorrupt``."""
    found = [mark for shard in marks for mark in shard.tables if mark.table == table]
    if not found:
        return Mark(table)
    clocks = {mark.clock for mark in found}
    if spec.sync.collective and len(clocks) > 1:
        raise SnapshotCorrupt(f"{folder}: table {spec.name!r} was cut at clocks {sorted(clocks)}, not at one")
    ranks: dict[int, int] = {}
    for rank, clock in itertools.chain.from_iterable(mark.clocks for mark in found):
        ranks[rank] = max(ranks.get(rank, 0), clock)
    newest = max(found, key=lambda mark: (mark.clock, mark.applied))
    return Mark(table, newest.clock, max(m.applied for m in found), tuple(sorted(ranks.items())), newest.groups)


def prune(root: Path, keep: int = KEEP, disk: Disk = DISK) -> None:
    """Delete all but the ``keep`` newest finished snapshots, and unfinished ones that are older than the newest.

    One that another process still works at is left alone.
    Only after ``publish`` has returned. What cannot be deleted is left for the next time.
    """
    done = finished(root)
    kept = set(done[-keep:])
    for number in numbers(root):
        if done and number < done[-1] and number not in kept and not held(folder_of(root, number)):
            with contextlib.suppress(OSError):
                _delete(folder_of(root, number), disk)


def discard(root: Path, number: int, disk: Disk = DISK) -> bool:
    """Delete a snapshot that will not be finished; the disk may be full because of it. Whether nothing is left."""
    folder = folder_of(root, number)
    if (folder / NAME).exists():
        return True
    with contextlib.suppress(OSError):
        _delete(folder, disk)
    return not folder.exists()


def sweep(root: Path, disk: Disk = DISK) -> None:
    """Delete snapshots that were never finished, except those that somebody holds: see ``Keeper``."""
    done = set(finished(root))
    for number in numbers(root):
        if number not in done and held(folder_of(root, number)) is False:
            discard(root, number, disk)


def _delete(folder: Path, disk: Disk) -> None:
    """The manifest goes first and for good: what a crash leaves of the rest is no snapshot."""
    disk.unlink(folder / NAME)
    disk.sync_folder(folder)
    for path in sorted(folder.iterdir()):
        disk.unlink(path)
    disk.remove_folder(folder)
    disk.sync_folder(folder.parent)


def read(folder: Path) -> Manifest:
    """Raises ``SnapshotCorrupt``."""
    path = folder / NAME
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Format).format
        if version != FORMAT:
            raise SnapshotCorrupt(other_format(path, version, FORMAT))
        manifest = msgspec.json.decode(data, type=Manifest, dec_hook=read_spec)
        exact = [msgspec.msgpack.decode(table.packed, type=TableSpec, dec_hook=read_spec) for table in manifest.tables]
    except OSError as error:
        raise SnapshotCorrupt(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SnapshotCorrupt(f"{path}: {error}") from None
    if manifest.check != _check(manifest):
        raise SnapshotCorrupt(f"{path}: it fails its checksum")
    replaced = [msgspec.structs.replace(t, spec=spec) for t, spec in zip(manifest.tables, exact, strict=True)]
    return msgspec.structs.replace(manifest, tables=tuple(replaced))


def _check(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(manifest, check="")))


class _Format(msgspec.Struct):
    format: int
