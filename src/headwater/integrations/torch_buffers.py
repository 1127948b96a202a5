"""Module buffers (a BatchNorm's running statistics): a second, small table that servers only average or assign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from headwater.errors import UsageError
from headwater.types import Bulk, Init, OptimizerSpec, ParameterSpec, Sync, TableSpec
from headwater.wire.tensors import dtype_name

if TYPE_CHECKING:
    from headwater.client import Client, Table

Mode = Literal["mean", "rank0", "local"]


class Buffers:
    """The persistent float and integer buffers of a model, kept equal on all workers.

    Forward passes write buffers, so they stay the module's own tensors: after a step they are contributed,
    before the next forward the outcome is copied back. ``"mean"``: the mean over workers (integers rounded
    down); ``"rank0"``: rank 0's; ``"local"``: nothing is sent. Under stale and asynchronous policies the last
    writer's stay.
    """

    def __init__(self, model: torch.nn.Module, client: Client, name: str, sync: Sync, mode: Mode) -> None:
        if mode not in ("mean", "rank0", "local"):
            raise UsageError(f"buffers={mode!r}: must be 'mean', 'rank0' or 'local'")
        self._places = {} if mode == "local" else _persistent(model)
        self._owners = {id(module) for module, _ in self._places.values()}
        self._sends = mode == "mean" or client.rank == 0
        self._pending = False
        self._table: Table | None = None
        if not self._places:
            return
        if isinstance(sync, Bulk):
            sync = Bulk("mean" if mode == "mean" else "sum")  # a sum of rank 0's alone is rank 0's
        parameters = tuple(
            ParameterSpec(path, tuple(buffer.shape), dtype_name(buffer.dtype), init=Init("values"))
            for path, buffer in self.values().items()
        )
        spec = TableSpec(f"{name}.buffers", parameters, OptimizerSpec("Assign", ({},)), sync, nonfinite="allow")
        self._table = client.table(spec, values={path: b.detach() for path, b in self.values().items()})
        self._pending = True
        self.arrive()

    def owns(self, module: torch.nn.Module) -> bool:
        """Whether the module has buffers here."""
        return id(module) in self._owners

    @property
    def tables(self) -> tuple[Table, ...]:
        """The table that holds them, if there are any."""
        return () if self._table is None else (self._table,)

    def values(self) -> dict[str, torch.Tensor]:
        """The modules' present buffers by name."""
        return {path: module.get_buffer(key) for path, (module, key) in self._places.items()}

    def settle(self) -> None:
        """Until the servers have read the last contribution: then its memory is free again."""
        if self._table is not None:
            self._table.settle()

    def step(self, skip: bool) -> None:
        """Contribute the buffers to this step, or with ``skip`` give up this step's for all workers."""
        if self._table is None:
            return
        if self._sends and not skip:
            for path, buffer in self.values().items():
                self._table.gradients[path].copy_(buffer)
            self._table.push(list(self._places))
        self._table.step(skip=skip)
        self._pending = True

    def arrive(self) -> None:
        """Wait for the outcome of the last step, if there is one, and copy it into the modules."""
        if self._table is None or not self._pending:
            return
        self._table.wait()  # after a failure, the next one brings back the values before the step
        with torch.no_grad():
            for path, buffer in self.values().items():
                buffer.copy_(self._table.values[path])
        self._pending = False

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Make these the servers' and the module's values."""
        if self._table is not None and values:
            self._table.assign(values)
            self._pending = True
            self.arrive()


def _persistent(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Where each buffer lives that belongs to the model's state; masks (bool) and caches are left alone."""
    places: dict[str, tuple[torch.nn.Module, str]] = {}
    seen: set[int] = set()
    saved = model.state_dict(keep_vars=True)
    for path, buffer in model.named_buffers():
        if path not in saved or buffer.dtype is torch.bool or buffer.is_complex() or id(buffer) in seen:
            continue
        if buffer.is_meta:
            raise UsageError(
                f"buffer {path!r} is on the meta device and has no values: make the module's buffers on the CPU, or "
                "pass buffers='local' and fill them yourself"
            )
        seen.add(id(buffer))
        owner, _, key = path.rpartition(".")
        places[path] = (model.get_submodule(owner), key)
    return places
