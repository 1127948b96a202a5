"""A plain safetensors file, written piece by piece: under its name it is there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from headwater.errors import DiskFull, UsageError
from headwater.server.snapshots.disk import DISK, Disk, Sink, whole
from headwater.server.snapshots.files import tensor_bytes, type_name

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Tensor(NamedTuple):
    """A tensor of a plain file. ``parts``: its elements in C order, in pieces that are made when they are written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write(path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None, disk: Disk = DISK) -> Path:
    """Write ``path`` through a temporary name beside it; it is on disk when this returns, with all of its bytes.

    ``metadata``: text by name, which goes into the file's header.

    Raises:
        DiskFull: no room for it; what was there under this name is as it was, and nothing else is left.
        UsageError: it cannot be written there for another reason; likewise.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    with told(path, sum(tensor.nbytes for tensor in ordered)):
        path.parent.mkdir(exist_ok=True)
        with whole(disk, path) as file:
            _fill(file, ordered, {"format": "pt"} | dict(metadata or {}))
    return path


@contextlib.contextmanager
def told(path: Path, nbytes: int) -> Iterator[None]:
    """``OSError``\\ s of who writes ``path`` become ``DiskFull`` or ``UsageError``."""
    try:
        yield
    except OSError as error:
        raise _told(path, error, nbytes) from None


def _fill(file: Sink, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": type_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]
        }  # fmt: skip
        at += tensor.nbytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        for part in tensor.parts():
            file.write(tensor_bytes(part))


def _told(path: Path, error: OSError, nbytes: int) -> DiskFull | UsageError:
    there = f"{path} is as it was before" if path.exists() else f"there is no {path}"
    if error.errno in _FULL:
        return DiskFull(
            f"{path}: {error.strerror}, and about {nbytes:,} bytes are needed; {there}, and nothing is left of the "
            "attempt. Make room, or name another folder"
        )
    return UsageError(f"{path}: {error.strerror}; {there}, and nothing is left of the attempt")
