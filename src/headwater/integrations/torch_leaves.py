"""The parameters of one model that live in one table, and the step that they are at."""

# ruff: noqa: SLF001 -- torch documents a tensor's version counter as `_version`; it has no other name

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from headwater.errors import GradientModified, ParameterModified

if TYPE_CHECKING:
    from headwater.client import Table
    from headwater.integrations.torch_departures import Bucket


def shares_memory(parameter: torch.Tensor) -> bool:
    """Whether a parameter can be the table's own memory: only on the CPU. Others are copied there and back."""
    return parameter.device.type in ("cpu", "meta")


class Leaf:
    """One parameter (a leaf of autograd's graph), its place in the table, and what was last seen of it.

    ``gradient`` and ``values`` are the table's memory, in the parameter's shape and dtype, on the CPU.
    ``left``: the step in which its gradient last left; ``fresh``: the step at which its values are; ``stamp``:
    the parameter's version counter then. ``grad`` and ``version``: the gradient that left, and its counter.
    """

    __slots__ = (
        "bucket",
        "copies",
        "fresh",
        "grad",
        "gradient",
        "left",
        "name",
        "parameter",
        "stamp",
        "values",
        "version",
    )

    bucket: Bucket

    def __init__(self, name: str, parameter: torch.nn.Parameter, table: Table) -> None:
        self.name = name
        self.parameter = parameter
        self.gradient = table.gradients[name]
        self.values = table.values[name]
        self.copies = not shares_memory(parameter)
        self.left = -1
        self.fresh = 0
        self.stamp = parameter._version
        self.grad: torch.Tensor | None = None
        self.version = 0

    @property
    def nbytes(self) -> int:
        return self.gradient.nbytes

    def changed(self) -> bool:
        """Whether the gradient that left in this step is no longer what autograd's gradient field holds."""
        grad = self.parameter.grad
        return grad is not self.grad or grad is None or grad._version != self.version

    def written_in_flight(self, step: int) -> bool:
        """Whether the table's gradient memory, which left in ``step``, was written since."""
        return self.left == step and self.gradient._version != self.version and not self.copies


class Held:
    """The leaves of one optimizer and its clock: the number of the step being collected, from 0."""

    def __init__(self, table: Table, parameters: Mapping[str, torch.nn.Parameter], rank: int) -> None:
        self.table = table
        self.rank = rank
        self.clock = 0
        self.leaves = tuple(Leaf(name, parameter, table) for name, parameter in parameters.items())
        self.parameters = [leaf.parameter for leaf in self.leaves]
        self.shared = [leaf.parameter for leaf in self.leaves if not leaf.copies]
        self._addresses = [leaf.values.data_ptr() for leaf in self.leaves if not leaf.copies]

    def check_parameters(self) -> None:
        """Raises ``ParameterModified`` if someone wrote into a parameter since its values arrived."""
        if [p.data_ptr() for p in self.shared] != self._addresses:
            raise self.moved()
        if [p._version for p in self.parameters] == [leaf.stamp for leaf in self.leaves]:
            return
        names = [leaf.name for leaf in self.leaves if leaf.parameter._version != leaf.stamp]
        raise ParameterModified(
            f"{_some(names)} changed in place on rank {self.rank} since the last step, outside the optimizer; the "
            "servers do not know the new values and the step was not taken. To keep them, call opt.assign() "
            "(on every rank, or on one that the others wait for) and step() again; load_state_dict() needs it too"
        )

    def moved(self) -> ParameterModified:
        """What to say when parameters are not the table's memory any more."""
        shared = [leaf for leaf in self.leaves if not leaf.copies]
        moved = [leaf.name for leaf in shared if leaf.parameter.data_ptr() != leaf.values.data_ptr()]
        return ParameterModified(
            f"{_some(moved)} no longer lie in the table's memory on rank {self.rank}: the model was moved or "
            "converted (model.to(), .half(), p.data = …) and the step was not taken. Do that first and make the "
            "optimizer after it"
        )

    def wait(self, leaves: Sequence[Leaf]) -> None:
        """Wait until these leaves hold the values of the last step; the caller picked those that do not yet."""
        if any(leaf.written_in_flight(self.clock - 1) for leaf in leaves):
            raise self._written_in_flight()
        self.table.wait([leaf.name for leaf in leaves])
        self.arrived(leaves)

    def _written_in_flight(self) -> GradientModified:
        """Said once for all of them."""
        written = [leaf for leaf in self.leaves if leaf.written_in_flight(self.clock - 1)]
        for leaf in written:
            leaf.version = leaf.gradient._version
        return GradientModified(
            f"the gradient of {_some([leaf.name for leaf in written])} was written on rank {self.rank} after step() "
            "and before its new values arrived, while the servers may have been reading it; the step may have used "
            "either. Use zero_grad() of the optimizer, or set_to_none=True"
        )

    def arrived(self, leaves: Sequence[Leaf]) -> None:
        """These leaves' values are here: show them to autograd, and remember how they look."""
        for leaf in leaves:
            if leaf.copies:
                # The only copy back to another device: one per parameter and step.
                with torch.no_grad():
                    leaf.parameter.copy_(leaf.values)
        # Memory changed under these tensors: a graph that saved them before must refuse to run backward.
        torch.autograd.graph.increment_version([leaf.parameter for leaf in leaves])
        for leaf in leaves:
            leaf.fresh = self.clock
            leaf.stamp = leaf.parameter._version

    def renewed(self) -> None:
        """After a rest the table has the values of later steps: copies of the last one's on other devices are old.

        Parameters that somebody wrote into stay, and the next step says so.
        """
        here = [leaf for leaf in self.leaves if leaf.copies and leaf.fresh == self.clock]
        self.arrived([leaf for leaf in here if leaf.stamp == leaf.parameter._version])

    def next_step(self, skipped: bool) -> None:
        """A step was sent off: no leaf is fresh any more, and graphs built on the old values are void.

        Of a ``skipped`` step nobody reads the gradients.
        """
        self.clock += 1
        torch.autograd.graph.increment_version(self.shared)
        for leaf in self.leaves:
            leaf.stamp = leaf.parameter._version
            if skipped:
                leaf.left = -1
            if leaf.copies:
                leaf.grad = None


def _some(names: Sequence[str]) -> str:
    """At most three names, for a message."""
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
