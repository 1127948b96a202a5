"""A snapshot as plain files: for ``transformers``, for a plain torch optimizer, for anything that reads safetensors.

    model.safetensors        every table's values by parameter name, joined
    optimizer.safetensors    optimizer state, as ``<index>.<slot>`` of a torch optimizer's ``state_dict()``
    optimizer.json           the rest of that ``state_dict()``

``headwater.integrations.torch.export.load_optimizer_state`` reads the last two. Files are written piece by piece: a
model need not fit into memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from headwater.errors import UsageError
from headwater.layout.saved import VALUE
from headwater.server.snapshots.disk import DISK, PART, held, replace
from headwater.server.snapshots.format import COUNT
from headwater.server.snapshots.manifest import TableEntry
from headwater.server.snapshots.plain import Tensor, told, write
from headwater.server.snapshots.restore import Snapshot
from headwater.server.tables.dense.kernels import FLAT, kernel
from headwater.wire import optimizers
from headwater.wire.tensors import DTYPES

_FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json")
_PIECE = 1 << 20
"""Elements that are read and written at a time."""


class _Tensor(NamedTuple):
    """A tensor of a plain file: elements of a slot of a parameter, or all of a small one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    table: str = ""
    parameter: int = 0
    slot: str = ""
    whole: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


def export(snapshot: Snapshot, out: Path) -> list[Path]:
    """Write the files into ``out``, a new or empty folder, and return them.

    Where tables hold parameters of one name, or several have optimizer state, each gets a folder of its own name.

    Raises:
        UsageError: ``out`` cannot be written, or holds something; nothing was written then.
        DiskFull: no room for a file; those before it are there, whole.
        SnapshotCorrupt: the snapshot is damaged; files that are there are whole, others are missing.
    """
    tables = snapshot.manifest.tables
    folders = _folders(out, tables)
    written = []
    for folder, model in _models(out, tables, folders).items():
        written.append(_write(folder / "model.safetensors", [t for table in model for t in _values(table)], snapshot))
    trained = [table for table in tables if table.spec.optimizer.name != "Assign"]
    for table in trained:
        folder = out if len(trained) == 1 else folders[table.table]
        written.append(_write(folder / "optimizer.safetensors", list(_state(snapshot, table)), snapshot))
        written.append(folder / "optimizer.json")
        rest = msgspec.json.format(msgspec.json.encode(_rest(table)), indent=2) + b"\n"
        with told(written[-1], len(rest)):
            replace(DISK, written[-1], rest)
    return written


def _folders(out: Path, tables: Sequence[TableEntry]) -> dict[int, Path]:
    """A place for each table's own files; made when they are needed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        if any(out.iterdir()):
            raise UsageError(f"{out} is not empty; nothing was written. Name a new folder")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}; nothing was written") from None
    names = {table.table: re.sub(r"[^\w.-]", "_", table.spec.name) for table in tables}
    taken = Counter(names.values())
    return {t: out / (name if taken[name] == 1 and name.strip(".") else f"{name}-{t}") for t, name in names.items()}


def _sweep(out: Path) -> None:
    """What an export that was killed has left half written does not make the folder a full one."""
    for name in _FILES:
        half = out / (name + PART)
        if held(half) is False:
            half.unlink(missing_ok=True)


def _models(out: Path, tables: Sequence[TableEntry], folders: dict[int, Path]) -> dict[Path, list[TableEntry]]:
    names = Counter(parameter.name for table in tables for parameter in table.dense.parameters)
    if max(names.values(), default=1) == 1:
        return {out: list(tables)}
    return {folders[table.table]: [table] for table in tables}


def _values(table: TableEntry) -> Iterator[_Tensor]:
    for index, p in enumerate(table.dense.parameters):
        yield _Tensor(p.name, DTYPES[p.dtype], p.shape, table.spec.name, index, VALUE)


# ---- optimizer state -----------------------------------------------------------------------------


def _order(table: TableEntry) -> list[list[int]]:
    """Parameters of each group, in the order in which torch numbers them."""
    groups: list[list[int]] = [[] for _ in table.spec.optimizer.groups]
    for index, parameter in enumerate(table.dense.parameters):
        groups[parameter.group].append(index)
    return groups


def _state(snapshot: Snapshot, table: TableEntry) -> Iterator[_Tensor]:
    name, spec = table.spec.name, table.dense
    numbered = [parameter for group in _order(table) for parameter in group]
    for number, index in enumerate(numbered):
        p = spec.parameters[index]
        for slot in snapshot.slots(name, index):
            if slot == VALUE:
                continue
            whole = snapshot.whole(name, index, slot, 0, p.numel)
            if slot == COUNT:
                if whole is not None and _has_step(table, index):
                    yield _Tensor(f"{number}.step", torch.float32, (), whole=whole.to(torch.float32))
            elif whole is not None:
                yield _Tensor(f"{number}.{slot}", whole.dtype, tuple(whole.shape), whole=whole)
            else:
                dtype = snapshot.dtype(name, index, slot)
                yield _Tensor(f"{number}.{slot}", dtype, p.shape, name, index, slot)


def _has_step(table: TableEntry, index: int) -> bool:
    p, name = table.dense.parameters[index], table.spec.optimizer.name
    return name in FLAT and kernel(name, _groups(table)[p.group], DTYPES[p.dtype]).has_step


def _groups(table: TableEntry) -> list[dict[str, Any]]:
    name = table.spec.optimizer.name
    present = table.mark.groups if table.mark.groups is not None else table.spec.optimizer.groups
    return [dict(optimizers.complete(name, group)) for group in present]


def _rest(table: TableEntry) -> dict[str, Any]:
    """``state_dict()`` without the tensors; ``names`` says which parameter has which number."""
    order = _order(table)
    names = [[table.dense.parameters[index].name for index in group] for group in order]
    return {
        "optimizer": table.spec.optimizer.name,
        "table": table.spec.name,
        "names": names,
        "param_groups": torch_groups(table.spec.optimizer.name, _groups(table), [len(group) for group in order]),
    }


def torch_groups(name: str, groups: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """``state_dict()["param_groups"]`` of the torch optimizer with these groups: with every key that torch has."""
    given = []
    for group, size in zip(groups, sizes, strict=True):
        # Meta tensors have no fused kernels: torch would refuse.
        hyper = {key: value for key, value in group.items() if key != "fused"}
        if name == "Adafactor" and len(hyper["eps"]) == 1:
            hyper["eps"] = (None, *hyper["eps"])
        shape = (1, 1) if name == "Muon" else (1,)
        shells = [torch.nn.Parameter(torch.empty(shape, device="meta")) for _ in range(size)]
        given.append({"params": shells, **hyper})
    made: list[dict[str, Any]] = getattr(torch.optim, name)(given).state_dict()["param_groups"]
    for full, group in zip(made, groups, strict=True):
        if "fused" in full:
            full["fused"] = group["fused"]
    return made


# ---- a plain file --------------------------------------------------------------------------------


def _write(path: Path, tensors: Iterable[_Tensor], snapshot: Snapshot) -> Path:
    return write(path, [Tensor(t.name, t.dtype, t.shape, partial(_parts, t, snapshot)) for t in tensors])


def _parts(tensor: _Tensor, snapshot: Snapshot) -> Iterator[torch.Tensor]:
    if tensor.whole is not None:
        yield tensor.whole
        return
    for start in range(0, tensor.numel, _PIECE):
        stop = min(start + _PIECE, tensor.numel)
        yield snapshot.read(tensor.table, tensor.parameter, tensor.slot, start, stop)
