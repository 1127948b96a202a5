"""One shard's part of a snapshot: a safetensors file that any tool reads, with checksums for parts of it.

Names of tensors: ``t<table>.p<parameter>.<slot>.<start>:<stop>`` holds elements of a flattened parameter (slot
``value``) or of its optimizer state; ``t….p….<slot>.@<start>`` holds a slot that has no element per element (a step
count, a factored moment), of the part of the parameter that begins at ``start``.

SHA-256 says whose file it is, but it runs at 1.5 GB/s while a cached file is read at 10. So a restore checks XXH3
instead (17 GB/s): one checksum per 256 KiB of data, kept in the file's last tensor ``checksums``, so that a server that
reads a tenth of the file checks a tenth. The last entry of it covers the header and the other entries (the *seal*),
and the manifest repeats it, which ties the file to its snapshot.

Neither this file nor ``manifest`` and ``opened`` load torch: a coordinator needs them and holds no tensors.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from headwater.errors import SnapshotCorrupt, other_format
from headwater.types import ITEMSIZE, Hyper

CHUNK = 256 << 10
"""Bytes of data that share a checksum: they stay in a core's cache between read, check and copy."""

COUNT = "count"
"""The slot of a segment's number of steps (int64), for the optimizers whose kernels are our own."""

FORMAT = "2"
_LARGEST_HEADER = 1 << 30
SUMS, PAD = "checksums", "padding"
NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_OURS = {name: ours for ours, name in NAMES.items()}


class Mark(msgspec.Struct, frozen=True):
    """What a table knows beside its tensors. ``applied``: steps that the shard has applied. ``clocks``: (rank, clock),
    under policies that are not collective."""

    table: int
    clock: int = 0
    applied: int = 0
    clocks: tuple[tuple[int, int], ...] = ()
    groups: tuple[dict[str, Hyper], ...] | None = None  # the present hyperparameters


class SessionMark(msgspec.Struct, frozen=True, array_like=True):
    """A worker's session. ``done``: (table, last push applied)."""

    session: int
    rank: int
    done: tuple[tuple[int, int], ...]


class ShardMark(msgspec.Struct, frozen=True):
    """Whose file it is, and the shard's own state."""

    snapshot: int
    shard: int
    lsn: int
    sessions: tuple[SessionMark, ...] = ()
    tables: tuple[Mark, ...] = ()


class Written(msgspec.Struct, frozen=True):
    """A file that is on disk."""

    name: str
    nbytes: int
    sha256: str


def file_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: ``begin:end`` are bytes of its data."""

    table: int
    parameter: int
    slot: str
    start: int
    whole: bool
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + (self.end - self.begin) // ITEMSIZE[self.dtype]


class ShardFile:
    """A shard's file, open for reading. What is read is checked; the rest is not touched. Thread-safe.

    Raises ``SnapshotCorrupt``, here and in every method, naming the file: it is not there, cannot be read, is not
    one of ours, or a checksum is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotCorrupt(f"{path}: {error.strerror}") from None
        self._scratch = threading.local()
        try:
            self.nbytes = os.fstat(self._fd).st_size
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, begin: int, end: int, out: memoryview) -> None:
        """Bytes ``begin:end`` of the data."""
        for chunk in range(begin // CHUNK, -(-end // CHUNK)):
            lo, hi = chunk * CHUNK, min((chunk + 1) * CHUNK, self._size)
            if begin <= lo and hi <= end:
                self._read_chunk(chunk, lo, out[lo - begin : hi - begin])
            else:
                a, b = max(lo, begin), min(hi, end)
                out[a - begin : b - begin] = self._kept(chunk, lo, hi)[a - lo : b - lo]

    @property
    def chunks(self) -> int:
        return len(self._sums)

    def check(self, first: int, last: int) -> None:
        """Read chunks ``first:last`` for nothing but their checksums."""
        for chunk in range(first, last):
            self._kept(chunk, chunk * CHUNK, min((chunk + 1) * CHUNK, self._size))

    def sha256(self) -> str:
        """Of the whole file. Slow: see the top."""
        found = hashlib.sha256()
        room = memoryview(bytearray(CHUNK))
        for at in range(0, self.nbytes, CHUNK):
            part = room[: min(CHUNK, self.nbytes - at)]
            self._pread(part, at)
            found.update(part)
        return found.hexdigest()

    def _kept(self, chunk: int, lo: int, hi: int) -> memoryview:
        """A chunk in memory of this thread's: small tensors lie many to a chunk."""
        kept = self._scratch.__dict__
        room: memoryview = kept.setdefault("room", memoryview(bytearray(CHUNK)))[: hi - lo]
        if kept.get("chunk") != chunk:
            kept["chunk"] = None
            self._read_chunk(chunk, lo, room)
            kept["chunk"] = chunk
        return room

    def _read_chunk(self, chunk: int, lo: int, out: memoryview) -> None:
        self._pread(out, self._data + lo)
        if xxhash.xxh3_64_intdigest(out) != self._sums[chunk]:
            raise self._corrupt(f"bytes {self._data + lo}:{self._data + lo + len(out)} fail their checksum")

    def _pread(self, out: memoryview, at: int) -> None:
        # Not a mapping: a disk that fails, or a file that is cut short, would end this process by a signal.
        while out:
            try:
                count = os.preadv(self._fd, [out], at)
            except OSError as error:
                raise self._corrupt(f"cannot be read at byte {at}: {error.strerror}") from None
            if not count:
                raise self._corrupt(f"ends at byte {at}")
            out, at = out[count:], at + count

    def _corrupt(self, why: str) -> SnapshotCorrupt:
        return SnapshotCorrupt(f"{self.path}: {why}")

    def _read_header(self) -> None:
        size = bytearray(8)
        self._pread(memoryview(size), 0)
        (length,) = struct.unpack("<Q", size)
        if length > min(_LARGEST_HEADER, self.nbytes):
            raise self._corrupt(f"a header of {length} bytes in a file of {self.nbytes}")
        text = bytearray(length)
        self._pread(memoryview(text), 8)
        self._data = 8 + length
        try:
            header = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
            metadata = header.pop("__metadata__")
            begin, end = header.pop(SUMS)["data_offsets"]
            if metadata["headwater"] != FORMAT:
                raise SnapshotCorrupt(other_format(self.path, metadata["headwater"], FORMAT))
            self._read_sums(begin, end, bytes(size) + bytes(text))
            self.mark = msgspec.json.decode(metadata["mark"], type=ShardMark)
            self.entries = list(self._entries(header))
        except (KeyError, ValueError, TypeError, msgspec.MsgspecError) as error:
            raise self._corrupt(f"not a shard of a snapshot ({type(error).__name__}: {error})") from None

    def _read_sums(self, begin: int, end: int, header: bytes) -> None:
        count = (end - begin) // 8
        if begin < 0 or self._data + end != self.nbytes or count != -(-begin // CHUNK) + 1:
            raise self._corrupt(f"{self.nbytes} bytes are not what its header says")
        raw = bytearray(end - begin)
        self._pread(memoryview(raw), self._data + begin)
        *sums, self.seal = struct.unpack(f"<{count}Q", raw)
        if xxhash.xxh3_64_intdigest(header + bytes(raw[:-8])) != self.seal:
            raise self._corrupt("its header or its checksums are damaged")
        self._size, self._sums = begin, sums

    def _entries(self, header: dict[str, dict[str, Any]]) -> Iterator[Entry]:
        for key, entry in header.items():
            if key == PAD:
                continue
            table, parameter, slot, where = key.split(".")
            whole = where.startswith("@")
            start = int(where[1:] if whole else where.partition(":")[0])
            begin, end = entry["data_offsets"]
            dtype, shape = _OURS[entry["dtype"]], tuple(entry["shape"])
            if not 0 <= begin <= end <= self._size:
                raise self._corrupt(f"{key} lies outside its data")
            yield Entry(int(table[1:]), int(parameter[1:]), slot, start, whole, dtype, shape, begin, end)
