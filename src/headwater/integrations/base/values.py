"""Which parameters show the values of the last step, and which must still be waited for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from headwater.integrations.base.parameter import TableParameter

if TYPE_CHECKING:
    from headwater.client import DenseTable

P = TypeVar("P", bound=TableParameter)
P_contra = TypeVar("P_contra", bound=TableParameter, contravariant=True)


class Shell(Protocol[P_contra]):
    """What a framework does with values."""

    def show(self, parameters: Sequence[P_contra], same: Collection[P_contra]) -> None:
        """These have new values in the table's memory, all but those in ``same``: let the model have them."""
        ...

    def keep(self, parameters: Sequence[P_contra]) -> None:
        """The step was refused: what the script wrote into these stays, to be said with the next one."""
        ...


class StepValues(Generic[P]):
    """``clock``: number of the step being collected, from 0. ``alone``: whether no other worker trains the table."""

    def __init__(self, table: DenseTable, parameters: Sequence[P], shell: Shell[P], alone: Callable[[], bool]) -> None:
        self.clock = 0
        self._table = table
        self._parameters = parameters
        self._shell = shell
        self._alone = alone
        self._wrote = 0  # the table's step that took along what the script wrote: what arrives takes its place

    def pending(self) -> list[P]:
        """The parameters whose values of the last step are still to come."""
        return [p for p in self._parameters if p.fresh != self.clock]

    def wait(self, parameters: Sequence[P]) -> None:
        """Wait until these have the values of the last step; the caller picked those that do not yet."""
        self._table.wait([p.name for p in parameters])
        if self._wrote > self._table.clock:  # that step was refused: what was written is still to be said
            self._shell.keep(parameters)
            for p in parameters:
                p.fresh = self.clock
            return
        if self._wrote:
            self._table.refresh()
            self._wrote = 0
        # A worker that is alone knows that a parameter which took no part in the step is as it was.
        self.arrived(parameters, {p for p in parameters if not p.stepped} if self._alone() else ())

    def arrived(self, parameters: Sequence[P], same: Collection[P] = ()) -> None:
        """The table's memory holds these values; in ``same`` are those that it held before."""
        self._shell.show(parameters, same)
        for p in parameters:
            p.fresh, p.stepped = self.clock, False

    def take_back(self) -> None:
        """The parameters are those that arrived last, whatever was written since."""
        self._wrote = 0
        self._table.refresh()
        self.arrived(self._parameters)

    def next_step(self, *, wrote: bool) -> None:
        """A step was sent off: no values are fresh any more. ``wrote``: it took along what the script wrote."""
        self._wrote = self._table.clock if wrote else 0
        self.clock += 1
