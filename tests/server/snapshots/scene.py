"""A small cluster's tables, stepped by hand, snapshotted and restored: for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from headwater.server.snapshots import manifest as manifests
from headwater.server.snapshots import restore
from headwater.server.snapshots.capture import Capture
from headwater.server.snapshots.disk import DISK, Disk
from headwater.server.snapshots.files import Piece, write_shard
from headwater.server.snapshots.format import Mark, SessionMark, ShardMark, Written
from headwater.server.snapshots.manifest import Manifest
from headwater.server.tables.dense.saved import load
from headwater.types import Async, DenseSpec, OptimizerSpec, ParameterSpec
from tests.server.tables.dense.tools import Sharded, gradients

SIZES = (1, 7, 100, 4097, 40000)


class Stepper:
    """Steps tables with the same gradients each time it is made."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, *tables: Sharded) -> None:
        """One step of one worker; all tables get the same gradients."""
        made = gradients(tables[0].spec, self._generator)
        for table in tables:
            table.step([made])


def filled(spec: DenseSpec, shards: int, seed: int = 0) -> Sharded:
    """A table with values that are not zero."""
    table = Sharded(spec, shards, seed=seed)
    values = gradients(spec, torch.Generator().manual_seed(99))
    table.scatter(table.memories, values)
    return table


def take(root: Path, tables: Mapping[int, Sharded], clock: int = 0, disk: Disk = DISK, plan: bytes = b"") -> Manifest:
    """A whole snapshot, without threads."""
    number, folder = manifests.start(root, disk)
    shards = len(next(iter(tables.values())).shards)
    files: list[Written] = []
    for shard in range(shards):
        capture = Capture(folder, number, shard, disk=disk, threads=False)
        for index, table in tables.items():
            capture.begin(Mark(index, clock=clock), table.shards[shard])
        capture.seal(lsn=10 * clock + shard, sessions=(SessionMark(1000 + shard, 0, ((0, clock),)),))
        while not capture.advance(7):
            assert not capture.error, capture.error
        files.append(capture.result() or Written("", 0, ""))
    specs = {index: table.spec for index, table in tables.items()}
    return manifests.publish(root, number, files, specs, shards, plan=plan, now=1_000_000_000.0, disk=disk)


def back(path: Path, spec: DenseSpec, shards: int, seed: int = 0) -> Sharded:
    """The table on other shards, as the newest sound snapshot has it."""
    table = Sharded(spec, shards, seed=seed)
    with restore.newest(path).snapshot as snapshot:
        for dense in table.shards:
            load(snapshot, dense)
    return table


SMALL = DenseSpec(
    "small",
    (ParameterSpec("w", (300,), "float64"), ParameterSpec("b", (3,), "float64")),
    OptimizerSpec("SGD", ({"lr": 1.0},)),
    Async(),
)


def small(root: Path, value: float, clock: int, disk: Disk = DISK) -> Manifest:
    """A snapshot of ``SMALL`` whose every element is ``value``, from two shards."""
    number, folder = manifests.start(root, disk)
    files = []
    for shard, (lo, hi) in enumerate(((0, 200), (200, 300))):
        pieces = [Piece(0, 0, "value", lo, torch.full((hi - lo,), value, dtype=torch.float64))]
        if shard:
            pieces.append(Piece(0, 1, "value", 0, torch.full((3,), value, dtype=torch.float64)))
        mark = ShardMark(number, shard, clock, (SessionMark(7, 0, ((0, clock),)),), (Mark(0, clock),))
        files.append(write_shard(folder, pieces, mark, disk))
    return manifests.publish(root, number, files, {0: SMALL}, 2, disk=disk)


def values_of(snapshot: restore.Snapshot) -> set[float]:
    """Every element of a snapshot of ``SMALL``."""
    w, b = snapshot.read("small", 0, "value", 0, 300), snapshot.read("small", 1, "value", 0, 3)
    return set(w.tolist()) | set(b.tolist())


def states(table: Sharded) -> dict[tuple[int, str], torch.Tensor]:
    """Optimizer state, joined over the shards."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for dense in table.shards:
        for parameter, name, start, tensor in dense.read_slots():
            p = table.spec.parameters[parameter]
            if tensor.dim() == 1 and name != "step":
                whole = found.setdefault((parameter, name), torch.zeros(p.numel, dtype=tensor.dtype))
                whole[start : start + tensor.numel()] = tensor
            else:
                found[parameter, name] = tensor.reshape(-1) if tensor.shape == p.shape else tensor
    return found


def assert_same(a: Sharded, b: Sharded) -> None:
    """Values and optimizer state, to the last bit."""
    _equal(a.values(), b.values())
    old, new = states(a), states(b)
    assert old.keys() == new.keys()
    _equal([old[key] for key in old], [new[key] for key in old])


def _equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.float(), y.float())
