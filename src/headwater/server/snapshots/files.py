"""Writing a shard's file (``format.py`` says what is in it)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import xxhash

from headwater.errors import ClusterError
from headwater.server.snapshots.disk import DISK, Disk, Sink, whole
from headwater.server.snapshots.format import CHUNK, FORMAT, NAMES, PAD, SUMS, ShardMark, Written, file_name
from headwater.wire.tensors import dtype_name


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


def write_shard(
    folder: Path,
    pieces: Iterable[Piece],
    mark: ShardMark,
    disk: Disk = DISK,
    wanted: Callable[[], bool] = lambda: True,
) -> Written:
    """Write a shard's file; when this returns it is on disk under its name. If it raises nothing is left of it.

    ``wanted``: asked again and again; once it says no the file is given up.

    Raises ``OSError``, or ``ClusterError`` when it was given up.
    """
    # Wide elements first: then every tensor starts at a multiple of its element's size, as readers may expect.
    ordered = sorted(pieces, key=lambda piece: -piece.tensor.element_size())
    path = folder / file_name(mark.shard)
    with whole(disk, path) as file:
        writer = _Writer(file, wanted)
        writer.header(ordered, mark)
        for piece in ordered:
            writer.data(tensor_bytes(piece.tensor))
        writer.finish()
    return Written(path.name, writer.nbytes, writer.sha256.hexdigest())


class _Writer:
    """Header, data in chunks, checksums."""

    def __init__(self, file: Sink, wanted: Callable[[], bool]) -> None:
        self._file = file
        self._wanted = wanted
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
        entries[PAD] = {"dtype": "U8", "shape": [pad], "data_offsets": [at, at + pad]}
        at += pad
        count = -(-at // CHUNK) + 1
        entries[SUMS] = {"dtype": "U64", "shape": [count], "data_offsets": [at, at + 8 * count]}
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
        if not self._wanted():
            raise ClusterError("it was given up")
        if sealed:
            self._seal.update(data)
        self.sha256.update(data)
        self._file.write(data)
        self.nbytes += len(data)


def _entry(tensor: torch.Tensor, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": type_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}


def type_name(dtype: torch.dtype) -> str:
    """As safetensors calls it."""
    return NAMES[dtype_name(dtype)]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Its elements in C order; no copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
