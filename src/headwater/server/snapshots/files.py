"""One shard's part of a snapshot: a safetensors file that any tool reads, with checksums for parts of it.

Names of tensors: ``t<table>.p<parameter>.<slot>.<start>:<stop>`` holds elements of a flattened parameter (slot
``value``) or of its optimizer state; ``t….p….<slot>.@<start>`` holds a slot that has no element per element (a step
count, a factored moment), of the part of the parameter that begins at ``start``.

SHA-256 says whose file it is, but it runs at 1.5 GB/s while a cached file is read at 10. So a restore checks XXH3
instead (17 GB/s): one checksum per 256 KiB of data, kept in the file's last tensor ``checksums``, so that a server that
reads a tenth of the file checks a tenth. The last entry of it covers the header and the other entries (the *seal*),
and the manifest repeats it, which ties the file to its snapshot.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import xxhash

from headwater.errors import SnapshotCorrupt
from headwater.server.snapshots.disk import DISK, Disk, Sink
from headwater.types import Hyper
from headwater.wire.tensors import DTYPES, dtype_name

CHUNK = 256 << 10
"""Bytes of data that share a checksum: they stay in a core's cache between read, check and copy."""

VALUE = "value"
COUNT = "count"
"""The slot of a segment's number of steps (int64), for the optimizers whose kernels are our own."""

FORMAT = "1"
_LARGEST_HEADER = 1 << 30
_SUMS, _PAD = "checksums", "padding"
_NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {name: DTYPES[ours] for ours, name in _NAMES.items()}


class Mark(msgspec.Struct, frozen=True):
    """What a table knows beside its tensors. ``clocks``: (rank, clock), under policies other than ``Bulk``."""

    table: int
    clock: int = 0
    version: int = 0
    clocks: tuple[tuple[int, int], ...] = ()
    groups: tuple[dict[str, Hyper], ...] | None = None  # the present hyperparameters


class ShardMark(msgspec.Struct, frozen=True):
    """Whose file it is, and the shard's own state. ``sessions``: (session, rank, last push applied)."""

    snapshot: int
    shard: int
    lsn: int
    sessions: tuple[tuple[int, int, int], ...] = ()
    tables: tuple[Mark, ...] = ()


class Piece(NamedTuple):
    """Elements from ``start`` on of a flattened parameter or slot (1-D), or a whole slot of another shape."""

    table: int
    parameter: int
    slot: str
    start: int
    tensor: torch.Tensor
    whole: bool = False

    @property
    def key(self) -> str:
        where = f"@{self.start}" if self.whole else f"{self.start}:{self.start + self.tensor.numel()}"
        return f"t{self.table}.p{self.parameter}.{self.slot}.{where}"


class Written(msgspec.Struct, frozen=True):
    """A file that is on disk."""

    name: str
    nbytes: int
    sha256: str


# ---- writing -------------------------------------------------------------------------------------


def file_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def write_shard(folder: Path, pieces: Iterable[Piece], mark: ShardMark, disk: Disk = DISK) -> Written:
    """Write a shard's file; when this returns it is on disk under its name. Raises ``OSError``."""
    # Wide elements first: then every tensor starts at a multiple of its element's size, as readers may expect.
    ordered = sorted(pieces, key=lambda piece: -piece.tensor.element_size())
    path = folder / file_name(mark.shard)
    beside = path.with_name(path.name + ".part")
    with disk.create(beside) as file:
        writer = _Writer(file)
        writer.header(ordered, mark)
        for piece in ordered:
            writer.data(tensor_bytes(piece.tensor))
        writer.finish()
        file.sync()
    disk.rename(beside, path)
    disk.sync_folder(folder)
    return Written(path.name, writer.nbytes, writer.sha256.hexdigest())


class _Writer:
    """Header, data in chunks, checksums."""

    def __init__(self, file: Sink) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.nbytes = 0
        self._seal = xxhash.xxh3_64()
        self._sums: list[int] = []
        self._chunk = bytearray(CHUNK)
        self._filled = 0

    def header(self, pieces: Sequence[Piece], mark: ShardMark) -> None:
        entries: dict[str, Any] = {"__metadata__": {"headwater": FORMAT, "mark": msgspec.json.encode(mark).decode()}}
        at = 0
        for piece in pieces:
            size = piece.tensor.nbytes
            entries[piece.key] = _entry(piece.tensor, at, at + size)
            at += size
        pad = -at % 8
        entries[_PAD] = {"dtype": "U8", "shape": [pad], "data_offsets": [at, at + pad]}
        at += pad
        count = -(-at // CHUNK) + 1
        entries[_SUMS] = {"dtype": "U64", "shape": [count], "data_offsets": [at, at + 8 * count]}
        text = msgspec.json.encode(entries)
        text += b" " * (-len(text) % 8)
        self._pad = pad
        self._put(struct.pack("<Q", len(text)) + text, sealed=True)

    def data(self, data: memoryview) -> None:
        while data:
            if not self._filled and len(data) >= CHUNK:
                self._sum(data[:CHUNK])
                data = data[CHUNK:]
                continue
            take = min(CHUNK - self._filled, len(data))
            self._chunk[self._filled : self._filled + take] = data[:take]
            self._filled += take
            data = data[take:]
            if self._filled == CHUNK:
                self._flush()

    def finish(self) -> None:
        self.data(memoryview(bytes(self._pad)))
        self._flush()
        self._put(struct.pack(f"<{len(self._sums)}Q", *self._sums), sealed=True)
        self._put(struct.pack("<Q", self._seal.intdigest()))

    def _flush(self) -> None:
        if self._filled:
            self._sum(memoryview(self._chunk)[: self._filled])
            self._filled = 0

    def _sum(self, data: memoryview) -> None:
        self._sums.append(xxhash.xxh3_64_intdigest(data))
        self._put(data)

    def _put(self, data: memoryview | bytes, sealed: bool = False) -> None:
        if sealed:
            self._seal.update(data)
        self.sha256.update(data)
        self._file.write(data)
        self.nbytes += len(data)


def _entry(tensor: torch.Tensor, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": type_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}


def type_name(dtype: torch.dtype) -> str:
    """As safetensors calls it."""
    return _NAMES[dtype_name(dtype)]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Its elements in C order; no copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: ``begin:end`` are bytes of its data."""

    table: int
    parameter: int
    slot: str
    start: int
    whole: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + (self.end - self.begin) // self.dtype.itemsize


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
            begin, end = header.pop(_SUMS)["data_offsets"]
            if metadata["headwater"] != FORMAT:
                raise self._corrupt(f"format {metadata['headwater']!r}, this Headwater reads {FORMAT!r}")
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
            if key == _PAD:
                continue
            table, parameter, slot, where = key.split(".")
            whole = where.startswith("@")
            start = int(where[1:] if whole else where.partition(":")[0])
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not 0 <= begin <= end <= self._size:
                raise self._corrupt(f"{key} lies outside its data")
            yield Entry(int(table[1:]), int(parameter[1:]), slot, start, whole, dtype, shape, begin, end)
