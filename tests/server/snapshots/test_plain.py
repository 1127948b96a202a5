"""A plain file is there whole or not at all, whatever the disk does."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headwater.errors import DiskFull, HeadwaterError, UsageError
from headwater.server.snapshots.disk import Disk, Sink
from headwater.server.snapshots.plain import Tensor, write

TENSORS = [Tensor(name, torch.float32, (4, 8), lambda: (torch.ones(16), torch.zeros(16))) for name in ("a", "b")]


class _Failing(Disk):
    """One operation fails with ``code``: the ``after``-th write, or the one that is named."""

    def __init__(self, code: int, operation: str, after: int = 0) -> None:
        self._code, self._operation, self._left = code, operation, after

    def fail(self, operation: str) -> None:
        if operation == self._operation:
            self._left -= 1
            if self._left < 0:
                raise OSError(self._code, "the disk says no")

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Sink]:
        self.fail("create")
        with super().create(path) as file:
            yield _File(self, file)

    def rename(self, path: Path, to: Path) -> None:
        self.fail("rename")
        super().rename(path, to)


class _File:
    def __init__(self, disk: _Failing, file: Sink) -> None:
        self._disk, self._file = disk, file

    def write(self, data: memoryview | bytes) -> None:
        self._disk.fail("write")
        self._file.write(data)

    def sync(self) -> None:
        self._disk.fail("sync")
        self._file.sync()


def test_pieces_and_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "folder" / "x.safetensors", TENSORS, {"step": "3"})
    found = load_file(path)
    assert sorted(found) == ["a", "b"]
    assert torch.equal(found["b"], torch.cat([torch.ones(16), torch.zeros(16)]).view(4, 8))


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EFBIG, DiskFull), (errno.EIO, UsageError)],
)
@pytest.mark.parametrize(
    ("operation", "after"), [("create", 0), ("write", 0), ("write", 3), ("sync", 0), ("rename", 0)]
)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_at_any_point(
    tmp_path: Path, code: int, error: type[HeadwaterError], operation: str, after: int, old: bytes | None
) -> None:
    path = tmp_path / "x.safetensors"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error, match="nothing is left of the attempt") as told:
        write(path, TENSORS, disk=_Failing(code, operation, after))
    assert ("as it was before" in str(told.value)) == (old is not None)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == ({} if old is None else {path.name: old})


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> Iterator[torch.Tensor]:
        yield torch.ones(16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x.safetensors", [Tensor("a", torch.float32, (4, 8), stopped)])
    assert list(tmp_path.iterdir()) == []
