"""A finished snapshot, open for reading, and which one to use. No tensors here: see ``restore``.

Which snapshot is used is decided once: ``newest`` reads all of it, refuses a damaged one by name, and takes the one
before it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, Self, TypeVar

from headwater.errors import SnapshotCorrupt, UnknownTable, UsageError
from headwater.layout import kinds
from headwater.layout.saved import Extent
from headwater.server.snapshots import manifest as manifests
from headwater.server.snapshots.format import Entry, SessionMark, ShardFile
from headwater.server.snapshots.manifest import Manifest, TableEntry

_AT_ONCE = 256
"""Chunks that a thread checks before it looks for more work."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a file."""

    entry: Entry
    file: ShardFile


Key = tuple[int, int, str]  # table, parameter, slot


class OpenedSnapshot:
    """A finished snapshot. ``close`` it; threads may share it.

    Raises ``SnapshotCorrupt``: a file is missing, has another size, is unreadable or not the manifest's, or elements
    of a parameter are missing. The data itself is checked by ``verify``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = manifests.read(folder)
        self._files: list[ShardFile] = []
        self._ranges: dict[Key, list[Place]] = {}
        self._wholes: dict[Key, list[Place]] = {}
        self._slots: dict[tuple[int, int], set[str]] = {}
        self._by_name = {entry.spec.name: entry for entry in self.manifest.tables}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def number(self) -> int:
        return self.manifest.number

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def verify(self, threads: int | None = None, *, sha256: bool = False) -> None:
        """Read all of it; with ``sha256`` by that too, which takes several times as long.

        Raises ``SnapshotCorrupt``.
        """
        work = [(f, lo, min(lo + _AT_ONCE, f.chunks)) for f in self._files for lo in range(0, f.chunks, _AT_ONCE)]
        with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), "headwater-verify") as pool:
            for _ in pool.map(lambda part: part[0].check(part[1], part[2]), work):
                pass
            if sha256:
                for entry, found in zip(self.manifest.files, pool.map(ShardFile.sha256, self._files), strict=True):
                    if entry.sha256 != found:
                        raise SnapshotCorrupt(f"{self.folder / entry.name}: SHA-256 {found}, not {entry.sha256}")

    def table(self, name: str) -> TableEntry:
        """Raises ``UnknownTable``."""
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise UnknownTable(f"no table {name!r} in {self.folder}; it has: {known}") from None

    def sessions(self, shard: int) -> tuple[SessionMark, ...]:
        """Of a shard of the cluster that was."""
        return self.manifest.files[shard].sessions

    def _open(self) -> None:
        for entry in self.manifest.files:
            if Path(entry.name).name != entry.name:
                raise SnapshotCorrupt(f"{self.folder}: its manifest names {entry.name!r}, which is outside of it")
            file = ShardFile(self.folder / entry.name)
            self._files.append(file)
            if file.nbytes != entry.nbytes:
                raise SnapshotCorrupt(f"{file.path}: {file.nbytes} bytes, not {entry.nbytes}")
            if file.seal != entry.seal:
                raise SnapshotCorrupt(f"{file.path}: it is another file than the manifest's")
            for tensor in file.entries:
                index = self._wholes if tensor.whole else self._ranges
                index.setdefault((tensor.table, tensor.parameter, tensor.slot), []).append(Place(tensor, file))
                self._slots.setdefault((tensor.table, tensor.parameter), set()).add(tensor.slot)
        for places in [*self._ranges.values(), *self._wholes.values()]:
            places.sort(key=start_of)
        self._check_complete()

    def _check_complete(self) -> None:
        """All values of every table are there, as its kind understands it."""
        for table in self.manifest.tables:
            missing = kinds.missing(table.spec, self.manifest.shards, partial(self._extents, table.table))
            if missing:
                raise SnapshotCorrupt(f"{self.folder}: {missing} of table {table.spec.name!r} is missing")

    def _extents(self, table: int, parameter: int, slot: str) -> list[Extent]:
        key = (table, parameter, slot)
        places = [*self._ranges.get(key, ()), *self._wholes.get(key, ())]
        return [Extent(e.start, e.stop, e.dtype, e.whole) for e in (place.entry for place in places)]


def start_of(place: Place) -> int:
    return place.entry.start


# ---- choosing ------------------------------------------------------------------------------------


S = TypeVar("S", bound=OpenedSnapshot)


class Found(NamedTuple, Generic[S]):
    """The snapshot to use, open; and the newer ones that were refused, each with the reason."""

    snapshot: S
    refused: tuple[SnapshotCorrupt, ...]


def newest(path: Path, threads: int | None = None) -> Found[OpenedSnapshot]:
    """The newest sound snapshot in a folder of them, or the one that ``path`` names. Close it.

    Raises ``SnapshotCorrupt`` if the named one, or all of them, are damaged; ``UsageError`` if there is none.
    """
    return choose(path, OpenedSnapshot, threads)


def choose(path: Path, opens: Callable[[Path], S], threads: int | None = None) -> Found[S]:
    """``newest``, opened as something else."""
    if path.exists() and not path.is_dir():
        raise UsageError(
            f"{path} is a file, and a snapshot is a folder: name it, or the folder of snapshots it lies in"
        )
    if (path / manifests.NAME).exists() or (path.name.isdigit() and manifests.finished(path.parent)):
        return Found(_sound(path, opens, threads), ())
    refused: list[SnapshotCorrupt] = []
    for number in reversed(manifests.finished(path)):
        try:
            return Found(_sound(manifests.folder_of(path, number), opens, threads), tuple(refused))
        except SnapshotCorrupt as error:
            refused.append(error)
    if refused:
        raise SnapshotCorrupt(f"no sound snapshot in {path}: " + "; ".join(map(str, refused)))
    raise UsageError(f"{path} holds no finished snapshot; name a folder of snapshots, or one of them")


def _sound(folder: Path, opens: Callable[[Path], S], threads: int | None) -> S:
    snapshot = opens(folder)
    try:
        snapshot.verify(threads)
    except BaseException:
        snapshot.close()
        raise
    return snapshot
