"""Shared memory: sealed, of the agreed size, side by side, and gone with its last user."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headwater.errors import NotEnoughMemory, ProtocolError
from headwater.transports import memory
from headwater.transports.memory import Piece, Region
from tests.patience import PATIENCE

PAGE = 4096

pytestmark = pytest.mark.skipif(not memory.AVAILABLE, reason="shared memory needs Linux")


def tensor(region: Region) -> torch.Tensor:
    return torch.frombuffer(region.buffer, dtype=torch.uint8)[: region.size]


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"memfd:headwater:{name}")


def test_two_mappings_see_the_same_bytes_and_a_private_one_keeps_its_own() -> None:
    fd = memory.create("seen", 2 * PAGE)
    writer, reader = Region([Piece(fd, 0, 2 * PAGE)]), Region([Piece(fd, 0, 2 * PAGE)], writable=False)
    private = Region([Piece(fd, 0, 2 * PAGE)], private=True)
    os.close(fd)
    tensor(writer)[:] = 7
    assert tensor(reader).eq(7).all()
    tensor(private)[5] = 99
    assert tensor(reader)[5] == 7
    tensor(writer)[5] = 8
    assert tensor(private)[5] == 99
    private.drop(0, private.size)
    assert tensor(private)[5] == 8


def test_pieces_of_several_files_lie_side_by_side() -> None:
    first, second = memory.create("first", 2 * PAGE), memory.create("second", PAGE)
    tensor(Region([Piece(first, 0, 2 * PAGE)]))[:] = torch.arange(2).repeat_interleave(PAGE)
    tensor(Region([Piece(second, 0, PAGE)]))[:] = 2
    whole = Region([Piece(first, PAGE, PAGE), Piece(second, 0, PAGE), Piece(first, 0, PAGE)])
    memory.close_all((first, second))
    assert tensor(whole).view(3, PAGE).float().mean(1).tolist() == [1.0, 2.0, 0.0]


def test_the_mapping_ends_with_its_last_view() -> None:
    fd = memory.create("ending", PAGE)
    region = Region([Piece(fd, 0, PAGE)])
    os.close(fd)
    view = tensor(region)[10:20]
    del region
    gc.collect()
    assert mappings("ending")
    view.fill_(1)
    del view
    gc.collect()
    assert not mappings("ending")


def test_a_sealed_file_can_neither_shrink_nor_grow() -> None:
    fd = memory.create("sealed", PAGE)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    memory.verify(fd, PAGE)
    os.close(fd)


def test_descriptors_that_could_hurt_are_refused(tmp_path: Path) -> None:
    small = memory.create("small", PAGE)
    with pytest.raises(ProtocolError, match="instead of 8192"):
        memory.verify(small, 2 * PAGE)
    open_ended = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(open_ended, PAGE)
    with pytest.raises(ProtocolError, match="seals 0x0"):
        memory.verify(open_ended, PAGE)
    fcntl.fcntl(open_ended, fcntl.F_ADD_SEALS, 0x4)
    with pytest.raises(ProtocolError, match="seals 0x4"):
        memory.verify(open_ended, PAGE)
    read, write = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, PAGE)
    for fd in (read, write, file):
        with pytest.raises(ProtocolError):
            memory.verify(fd, 1)
    memory.close_all((small, open_ended, read, write, file))


@pytest.mark.parametrize("name", ["ünïcode" * 20, "a\0b", "x" * 4000, "", "\n\x1b[31m"])
def test_any_table_name_will_do(name: str) -> None:
    fd = memory.create(name, PAGE)
    assert str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:headwater:")
    os.close(fd)


def test_too_much_is_refused_at_once_and_leaves_no_descriptor() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotEnoughMemory, match="are free on this machine; nothing was created"):
        memory.create("huge", 1 << 44)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_empty_region_has_no_bytes() -> None:
    assert len(Region([]).view) == 0


EXITS_WHILE_A_THREAD_WRITES = """
import threading
import numpy as np
from headwater.transports.memory import Sealed

sealed = Sealed("version", 64 << 20)
into = np.frombuffer(memoryview(sealed.region.buffer).cast("B"), dtype=np.uint8)
source = np.ones_like(into)
begun = threading.Event()


def copy():
    while True:
        np.copyto(into, source)
        begun.set()


threading.Thread(target=copy, daemon=True).start()
begun.wait()
"""


def test_a_process_may_end_while_a_thread_writes_into_shared_memory() -> None:
    """As a server's copying thread does: the kernel unmaps, after the last thread; whoever did before crashed it."""
    ended = subprocess.run(
        [sys.executable, "-c", EXITS_WHILE_A_THREAD_WRITES], capture_output=True, timeout=PATIENCE, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
