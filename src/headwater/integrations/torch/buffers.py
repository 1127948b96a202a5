"""Module buffers (a BatchNorm's running statistics): a second, small table that servers only average or assign."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Literal

import torch

from headwater.errors import UsageError
from headwater.integrations.base.notices import warn
from headwater.integrations.torch.buffer_kinds import Kept, digest, same_bits, sort, write
from headwater.types import Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Sync
from headwater.wire.tensors import dtype_name

if TYPE_CHECKING:
    from headwater.client import Client, DenseTable

Mode = Literal["mean", "rank0", "local"]


class Buffers:
    """The persistent float and integer buffers of a model, kept equal on all workers.

    Forward passes write buffers, so they stay the module's own tensors: after a step they are contributed,
    before the next forward the outcome is copied back, where it differs from what is there. ``"mean"``: the mean over
    workers (integers rounded down; what is equal on all of them stays as it is, to the bit); ``"rank0"``: those of
    the lowest rank that is there; ``"local"``: nothing is sent. Under stale and asynchronous policies the last
    writer's stay.

    Persistent buffers of kinds that have no mean (bool, sparse, …; see ``buffer_kinds``) stay this worker's. They
    are watched: constants are no matter, and one that workers change differently is an error (``apart``).
    """

    def __init__(self, model: torch.nn.Module, client: Client, name: str, sync: Sync, mode: Mode) -> None:
        if mode not in ("mean", "rank0", "local"):
            raise UsageError(f"buffers={mode!r}: must be 'mean', 'rank0' or 'local'")
        self._model = model
        self._mode = mode
        self._sizes = _sizes(model)
        self._count = self._counted()
        found = sort(model, told=mode != "local")
        self._ties = found.ties
        self._places = {} if mode == "local" else found.places
        self._kept = {} if mode == "local" else {place.path: Kept(place) for place in found.kept}
        self._owners = {id(place.module) for place in self._places.values()}
        self._sends = mode == "mean" or sync.collective or client.rank == 0
        self._blind = not sync.collective and client.world not in (None, 1)  # no step that all take together
        self._pending = False
        self._table: DenseTable | None = None
        if not self._places:
            return
        if sync.collective:
            sync = Bulk("mean" if mode == "mean" else "lowest")  # rank 0 may leave, and another be the lowest
        values = self.values()
        parameters = tuple(
            ParameterSpec(path, tuple(buffer.shape), dtype_name(buffer.dtype), init=Init("values"))
            for path, buffer in values.items()
        )
        spec = DenseSpec(f"{name}.buffers", parameters, OptimizerSpec("Assign", ({},)), sync, nonfinite="allow")
        self._shapes = {p.name: torch.Size(p.shape) for p in parameters}
        self._table = client.table(spec, values={path: _dense(b, b.dtype) for path, b in values.items()})
        self._pending = True
        self.arrive()

    def owns(self, module: torch.nn.Module) -> bool:
        """Whether the module has buffers here."""
        return id(module) in self._owners

    @property
    def tables(self) -> tuple[DenseTable, ...]:
        """The table that holds them, if there are any."""
        return () if self._table is None else (self._table,)

    def values(self) -> dict[str, torch.Tensor]:
        """The modules' present buffers by name; one that a module has given up is left out."""
        present = {path: place.buffer for path, place in self._places.items()}
        return {path: buffer for path, buffer in present.items() if buffer is not None}

    def retie(self) -> None:
        """The parameters lie elsewhere now: buffers that are views of them go along."""
        for tie in self._ties:
            tie.follow()

    def settle(self) -> None:
        """Until the servers have read the last contribution: then its memory is free again."""
        if self._table is not None:
            self._table.settle()

    # ---- steps -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ``UsageError`` if a buffer has another shape than the table; then the step must not be taken."""
        for path, buffer in self.values().items():
            if buffer.shape != self._shapes[path]:
                raise UsageError(
                    f"buffer {path!r} has shape {tuple(buffer.shape)} now, and had {tuple(self._shapes[path])} when "
                    "the optimizer was made, so workers cannot average it; the step was not taken. Give it its shape "
                    f"before that, or pass buffers='local': {_LOCAL}"
                )

    def digest(self) -> int:
        """Of the buffers that stay here, as far as they changed since the beginning; 0: none has."""
        if self._mode != "local" and self._counted() != self._count:
            self._registered_later()
        found = digest(self._kept.values())
        if found and self._blind:
            self._blind = False
            warn(
                f"{self._changed()} changed, and under this policy nobody sees whether workers keep them alike. They "
                "stay each worker's own; buffers='local' says so. Said once"
            )
        return found

    def step(self, skip: bool) -> None:
        """Contribute the buffers to this step, or with ``skip`` give up this step's for all workers."""
        if self._table is None:
            return
        if self._sends and not skip:
            present = self.values()
            for path, given in self._table.gradients.items():
                buffer = present.get(path)  # for one that was given up: what it was
                given.copy_(self._table.values[path] if buffer is None else _dense(buffer, given.dtype))
            self._table.push(list(self._places))
        self._table.step(skip=skip)
        self._pending = True

    def arrive(self) -> None:
        """Wait for the outcome of the last step, if there is one, and copy it into the modules."""
        if self._table is None or not self._pending:
            return
        self._table.wait()  # after a failure, the next one brings back the values before the step
        for path, buffer in self.values().items():
            value = self._table.values[path]
            if buffer.shape == self._shapes[path] and not same_bits(buffer, value):
                write(buffer, value)
        self._pending = False

    def apart(self, clock: int) -> UsageError:
        """What to say when the workers' digests differ."""
        return UsageError(
            f"{self._changed()} changed, and differ between workers after step {clock}, which was taken: so the "
            "workers train different models. Keep in them what is the same on all workers (buffers that can be "
            "averaged: registered before the optimizer is made, float or integer), or pass buffers='local': "
            f"{_LOCAL}"
        )

    def _changed(self) -> str:
        found = [each for each in self._kept.values() if each.changed()] or list(self._kept.values())
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        names = ", ".join(f"{each.path!r} ({each.kind})" for each in found[:3])
        return f"buffers that cannot be averaged, {names}{more},"

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Make these the servers' and the module's values."""
        if self._table is not None and values:
            own, held = self.values(), self._table.values
            dtypes = {p: held[p].dtype if own.get(p) is value else value.dtype for p, value in values.items()}
            self._table.assign({path: _dense(value, dtypes[path]) for path, value in values.items()})
            self._pending = True
            self.arrive()

    # ---- registered later ------------------------------------------------------------------------

    def _counted(self) -> int:
        """Changes when a buffer or a module is registered."""
        return sum(map(len, self._sizes))

    def _registered_later(self) -> None:
        """A table cannot grow: buffers that came after it stay here, and are watched."""
        self._sizes = _sizes(self._model)
        self._count = self._counted()
        found = sort(self._model, told=True)
        for place in [*found.places.values(), *found.kept]:
            if place.path not in self._places and place.path not in self._kept:
                self._kept[place.path] = Kept(place, late=True)


def _sizes(model: torch.nn.Module) -> list[Sized]:
    """What grows when a buffer or a module is registered. Torch has no public way that is cheap."""
    return [kept for module in model.modules() for kept in (module._buffers, module._modules)]  # noqa: SLF001


_LOCAL = "each worker then has its own, as without Headwater, and a saved or published model has none of them"


def _dense(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, and not made in inference mode."""
    with torch.no_grad():
        plain = buffer.detach().to("cpu", dtype)
        return plain.clone() if plain.is_inference() else plain
