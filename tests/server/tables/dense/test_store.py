"""Where a dense table's bytes lie on a server."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from headwater.errors import NotEnoughMemory, UnknownOptimizer
from headwater.server.tables.dense import store as stores
from headwater.server.tables.dense.store import DenseStore, make
from headwater.transports import memory
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec

pytestmark = pytest.mark.skipif(not memory.AVAILABLE, reason="shared memory needs Linux")


def spec(lr: float | str = 0.1) -> DenseSpec:
    return DenseSpec("left over", (ParameterSpec("w", (1000,)),), OptimizerSpec("SGD", ({"lr": lr},)))


def left() -> int:
    """Descriptors of this table's memory that are open in this process."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found += "headwater:left over" in str(fd.readlink())
    return found


def make_shared(of: DenseSpec) -> DenseStore:
    return make(of, 1, 0, True, lambda start, stop: None)


@pytest.mark.parametrize("what", ["counters", "mapping", "optimizer", "optimizer state"])
def test_a_table_that_cannot_be_made_leaves_no_memory(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    made = make_shared(spec())
    assert left() == 2
    made.close()
    assert left() == 0

    create = memory.create

    def few(name: str, size: int) -> int:
        if name.endswith(".versions"):
            raise NotEnoughMemory("full")
        return create(name, size)

    def full(*args: object, **more: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate")

    if what == "counters":
        monkeypatch.setattr(memory, "create", few)
    elif what == "mapping":
        monkeypatch.setattr(memory, "Region", full)
    elif what == "optimizer state":
        monkeypatch.setattr(stores.DenseShard, "_bind", full)
    with pytest.raises((NotEnoughMemory, UnknownOptimizer, RuntimeError)):
        make_shared(spec("no number") if what == "optimizer" else spec())
    assert left() == 0
