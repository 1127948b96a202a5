"""Back from a snapshot, onto any number of shards.

A shard reads the elements that it will hold, wherever they lie in the files, and every byte that it uses is checked
again, whatever ``newest`` has found before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import torch

from headwater.errors import SnapshotCorrupt
from headwater.server.snapshots.format import COUNT
from headwater.server.snapshots.opened import Found, OpenedSnapshot, Place, choose, start_of
from headwater.types import ITEMSIZE
from headwater.wire.tensors import DTYPES


class Snapshot(OpenedSnapshot):
    """A finished snapshot whose tensors can be read. Raises ``SnapshotCorrupt`` where what is read is damaged."""

    def slots(self, name: str, parameter: int) -> tuple[str, ...]:
        """The slots that hold something for a parameter, ``value`` and ``count`` among them."""
        table = self.table(name).table
        return tuple(sorted(self._slots.get((table, parameter), ())))

    def dtype(self, name: str, parameter: int, slot: str) -> torch.dtype:
        """Of a slot's elements; the parameter's own where nothing was stored."""
        table = self.table(name)
        places = self._ranges.get((table.table, parameter, slot), [])
        return DTYPES[places[0].entry.dtype if places else table.dense.parameters[parameter].dtype]

    def read(self, name: str, parameter: int, slot: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` of a flattened parameter or slot. Where nothing was stored, zero."""
        out = torch.zeros(stop - start, dtype=self.dtype(name, parameter, slot), device="cpu")
        self.read_into(name, parameter, slot, start, out)
        return out

    def read_into(self, name: str, parameter: int, slot: str, start: int, out: torch.Tensor) -> int:
        """The same into ``out`` (1-D, contiguous), which keeps what it holds where nothing was stored.

        Returns how many elements were there.
        """
        places = self._ranges.get((self.table(name).table, parameter, slot), [])
        stop, found = start + len(out), 0
        first = max(0, bisect_right(places, start, key=start_of) - 1)
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

    def every(self, name: str, parameter: int, slot: str) -> Iterator[torch.Tensor]:
        """A slot that has no element per element, of every shard of the cluster that was: for kinds that cut by key."""
        for place in self._wholes.get((self.table(name).table, parameter, slot), []):
            yield self._load(place)

    def _read_part(self, place: Place, start: int, out: torch.Tensor) -> None:
        entry = place.entry
        if DTYPES[entry.dtype] is not out.dtype:
            raise SnapshotCorrupt(f"{place.file.path}: {entry.slot} holds {entry.dtype}, not {out.dtype}")
        size = ITEMSIZE[entry.dtype]
        begin = entry.begin + (start - entry.start) * size
        place.file.read(begin, begin + len(out) * size, _memory(out))

    def _load(self, place: Place) -> torch.Tensor:
        out = torch.empty(place.entry.shape, dtype=DTYPES[place.entry.dtype], device="cpu")
        place.file.read(place.entry.begin, place.entry.end, _memory(out.view(-1)))
        return out


def newest(path: Path, threads: int | None = None) -> Found[Snapshot]:
    """See ``opened.newest``."""
    return choose(path, Snapshot, threads)


def _inside(places: list[Place], start: int, stop: int) -> list[Place]:
    """Those that begin in ``start:stop``, and the one that ``start`` lies in."""
    first = max(0, bisect_right(places, start, key=start_of) - 1)
    return [place for i, place in enumerate(places[first:]) if i == 0 or place.entry.start < stop]


def _memory(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
