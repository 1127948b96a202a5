"""Back from a snapshot, onto any number of shards.

A shard reads the elements that it will hold, wherever they lie in the files, and every byte that it uses is checked.
Which snapshot is used is decided once, before: ``newest`` reads all of it, refuses a damaged one by name, and takes the
one before it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from headwater.errors import SnapshotCorrupt, TableConflict, UnknownTable, UsageError
from headwater.server.snapshots import manifest as manifests
from headwater.server.snapshots.files import COUNT, VALUE, Entry, ShardFile
from headwater.server.snapshots.manifest import Manifest, TableEntry
from headwater.server.tables.dense import DenseShard
from headwater.types import Segment, TableSpec
from headwater.wire.tensors import DTYPES

_AT_ONCE = 256
"""Chunks that a thread checks before it looks for more work."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of a file."""

    entry: Entry
    file: ShardFile


_Key = tuple[int, int, str]  # table, parameter, slot


class Snapshot:
    """A finished snapshot, open for reading. ``close`` it; threads may share it.

    Raises ``SnapshotCorrupt``: a file is missing, has another size, is unreadable or not the manifest's. Its data is
    checked when it is read, or by ``verify``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = manifests.read(folder)
        self._files: list[ShardFile] = []
        self._ranges: dict[_Key, list[_Place]] = {}
        self._wholes: dict[_Key, list[_Place]] = {}
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

    def __enter__(self) -> Snapshot:
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

    def sessions(self, shard: int) -> tuple[tuple[int, int, int], ...]:
        """(session, rank, last push applied) of a shard of the cluster that was."""
        return self.manifest.files[shard].sessions

    # ---- reading ---------------------------------------------------------------------------------

    def slots(self, name: str, parameter: int) -> tuple[str, ...]:
        """The slots that hold something for a parameter, ``value`` and ``count`` among them."""
        table = self.table(name).table
        return tuple(sorted(self._slots.get((table, parameter), ())))

    def dtype(self, name: str, parameter: int, slot: str) -> torch.dtype:
        """Of a slot's elements; the parameter's own where nothing was stored."""
        table = self.table(name)
        places = self._ranges.get((table.table, parameter, slot), [])
        return places[0].entry.dtype if places else DTYPES[table.spec.parameters[parameter].dtype]

    def read(self, name: str, parameter: int, slot: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` of a flattened parameter or slot. Where nothing was stored, zero."""
        out = torch.zeros(stop - start, dtype=self.dtype(name, parameter, slot))
        self.read_into(name, parameter, slot, start, out)
        return out

    def read_into(self, name: str, parameter: int, slot: str, start: int, out: torch.Tensor) -> int:
        """The same into ``out`` (1-D, contiguous), which keeps what it holds where nothing was stored.

        Returns how many elements were there.
        """
        places = self._ranges.get((self.table(name).table, parameter, slot), [])
        stop, found = start + len(out), 0
        first = max(0, bisect_right(places, start, key=_start) - 1)
        for place in places[first:]:
            entry = place.entry
            lo, hi = max(start, entry.start), min(stop, entry.stop)
            if entry.start >= stop:
                break
            if lo < hi:
                self._read_part(place, lo, out[lo - start : hi - start])
                found += hi - lo
        return found

    def whole(self, name: str, parameter: int, slot: str, start: int = 0, stop: int = 1) -> torch.Tensor | None:
        """A slot that has no element per element: of the parts in ``start:stop``, the one that has stepped most.

        They differ only where shards were cut in the middle of an asynchronous step.
        """
        table = self.table(name).table
        places = self._wholes.get((table, parameter, slot), [])
        if not places:
            return None
        inside = _inside(places, start, stop)
        if slot in ("step", COUNT):
            return max((self._load(p) for p in inside), key=float)
        if len(inside) == 1:
            return self._load(inside[0])
        counts = _inside(self._wholes.get((table, parameter, "step"), []), start, stop)
        steps = {p.entry.start: float(self._load(p)) for p in counts}
        return self._load(max(inside, key=lambda p: steps.get(p.entry.start, 0.0)))

    def _read_part(self, place: _Place, start: int, out: torch.Tensor) -> None:
        entry = place.entry
        if entry.dtype is not out.dtype:
            raise SnapshotCorrupt(f"{place.file.path}: {entry.slot} holds {entry.dtype}, not {out.dtype}")
        size = entry.dtype.itemsize
        begin = entry.begin + (start - entry.start) * size
        place.file.read(begin, begin + len(out) * size, _memory(out))

    def _load(self, place: _Place) -> torch.Tensor:
        out = torch.empty(place.entry.shape, dtype=place.entry.dtype)
        place.file.read(place.entry.begin, place.entry.end, _memory(out.view(-1)))
        return out

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
                index.setdefault((tensor.table, tensor.parameter, tensor.slot), []).append(_Place(tensor, file))
                self._slots.setdefault((tensor.table, tensor.parameter), set()).add(tensor.slot)
        for places in [*self._ranges.values(), *self._wholes.values()]:
            places.sort(key=_start)
        self._check_complete()

    def _check_complete(self) -> None:
        """Every element of every table is there, once."""
        for table in self.manifest.tables:
            for index, parameter in enumerate(table.spec.parameters):
                at = 0
                for place in self._ranges.get((table.table, index, VALUE), []):
                    if place.entry.start != at or place.entry.dtype is not DTYPES[parameter.dtype]:
                        break
                    at = place.entry.stop
                if at != parameter.numel:
                    raise SnapshotCorrupt(
                        f"{self.folder}: element {at} of parameter {parameter.name!r} of table "
                        f"{table.spec.name!r} is missing"
                    )


# ---- choosing ------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The snapshot to use, open; and the newer ones that were refused, each with the reason."""

    snapshot: Snapshot
    refused: tuple[SnapshotCorrupt, ...]


def newest(path: Path, threads: int | None = None) -> Found:
    """The newest sound snapshot in a folder of them, or the one that ``path`` names. Close it.

    Raises ``SnapshotCorrupt`` if the named one, or all of them, are damaged; ``UsageError`` if there is none.
    """
    if (path / manifests.NAME).exists() or (path.name.isdigit() and manifests.finished(path.parent)):
        return Found(_sound(path, threads), ())
    refused: list[SnapshotCorrupt] = []
    for number in reversed(manifests.finished(path)):
        try:
            return Found(_sound(manifests.folder_of(path, number), threads), tuple(refused))
        except SnapshotCorrupt as error:
            refused.append(error)
    if refused:
        raise SnapshotCorrupt(f"no sound snapshot in {path}: " + "; ".join(map(str, refused)))
    raise UsageError(f"{path} holds no finished snapshot; name a folder of snapshots, or one of them")


def _sound(folder: Path, threads: int | None) -> Snapshot:
    snapshot = Snapshot(folder)
    try:
        snapshot.verify(threads)
    except BaseException:
        snapshot.close()
        raise
    return snapshot


# ---- a shard -------------------------------------------------------------------------------------


def load(snapshot: Snapshot, dense: DenseShard, threads: int | None = None) -> None:
    """Values, optimizer state and hyperparameters of one shard of a table, which was just made.

    Raises ``UnknownTable``, ``TableConflict`` (nothing was read) or ``SnapshotCorrupt`` (the shard is of no use then).
    """
    entry = snapshot.table(dense.spec.name)
    _check_same(snapshot, entry.spec, dense.spec)
    if entry.mark.groups is not None:
        dense.set_groups(entry.mark.groups)
    held = [segment for segment in dense.segments if segment.nbytes]
    regions = dense.regions()
    parts = [(segment, slot, memory) for slot, memory in regions.items() for segment in held]

    def read(part: tuple[Segment, str, torch.Tensor]) -> None:
        segment, slot, memory = part
        dtype = DTYPES[entry.spec.parameters[segment.parameter].dtype]
        out = memory[segment.offset : segment.end].view(dtype)
        snapshot.read_into(entry.spec.name, segment.parameter, slot, segment.start, out)

    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), "headwater-restore") as pool:
        for _ in pool.map(read, parts):
            pass
    counts = [snapshot.whole(entry.spec.name, s.parameter, COUNT, s.start, s.stop) for s in held]
    if any(count is not None for count in counts):
        dense.write_block(0, dense.size, [0 if count is None else int(count) for count in counts], [])
    for segment in held:
        _load_own(snapshot, dense, segment, {COUNT, *regions})


def _load_own(snapshot: Snapshot, dense: DenseShard, segment: Segment, known: set[str]) -> None:
    """What torch's own optimizers keep of a segment."""
    name = dense.spec.name
    for slot in snapshot.slots(name, segment.parameter):
        if slot in known:
            continue
        tensor = snapshot.whole(name, segment.parameter, slot, segment.start, segment.stop)
        if tensor is None:
            tensor = snapshot.read(name, segment.parameter, slot, segment.start, segment.stop)
        dense.write_slot(segment.parameter, slot, segment.start, tensor)


def _check_same(snapshot: Snapshot, was: TableSpec, now: TableSpec) -> None:
    old = [(p.name, p.shape, p.dtype) for p in was.parameters]
    new = [(p.name, p.shape, p.dtype) for p in now.parameters]
    if old != new or was.optimizer.name != now.optimizer.name:
        raise TableConflict(
            f"table {now.name!r} has other parameters or another optimizer than in {snapshot.folder}; nothing was read"
        )


def _start(place: _Place) -> int:
    return place.entry.start


def _inside(places: list[_Place], start: int, stop: int) -> list[_Place]:
    """Those that begin in ``start:stop``, and the one that ``start`` lies in."""
    first = max(0, bisect_right(places, start, key=_start) - 1)
    return [place for i, place in enumerate(places[first:]) if i == 0 or place.entry.start < stop]


def _memory(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
