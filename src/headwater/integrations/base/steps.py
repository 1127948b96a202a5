"""The life of a step: begin, gradients leave, what the script wrote goes first or along, end, arrive.

A framework's shell does this, in this order (``tests/integrations/base/numpy_optimizer.py`` is a whole one)::

    steps.begin()                          # the last step's values are here
    ... write gradients into p.gradient, set p.changed, steps.gradients.ready(p)
    steps.write_first(writes)              # values that the script wrote into the model since, by name
    steps.gradients.finish(present)        # what has not left
    steps.end(writes)
    steps.arrive()                         # now, or when somebody wants the values
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from headwater.errors import HeadwaterError, ParameterModified
from headwater.integrations.base.gradients import Groups, Nonfinite, StepGradients
from headwater.integrations.base.notices import Notices
from headwater.integrations.base.parameter import TableParameter
from headwater.integrations.base.values import Shell, StepValues
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec, Sync
from headwater.wire import optimizers

if TYPE_CHECKING:
    from torch import Tensor

    from headwater.client import Client, DenseTable, StepResult, Ticket

P = TypeVar("P", bound=TableParameter)
PresentGroups = Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a table is trained: the arguments of ``headwater.Optimizer`` that say so, for any framework."""

    kind: str  # of the servers' optimizers; "" if it runs at the worker
    sync: Sync
    max_grad_norm: float | None = None
    nonfinite: Nonfinite = "error"
    bucket_bytes: int = 4 << 20
    seed: int = 0
    overlap: bool = False

    def spec(self, name: str, parameters: Sequence[ParameterSpec], groups: Sequence[Mapping[str, Any]]) -> DenseSpec:
        """The table to declare."""
        if self.kind:
            how = OptimizerSpec(self.kind, tuple(optimizers.select(self.kind, group) for group in groups))
            return DenseSpec(name, tuple(parameters), how, self.sync, self.max_grad_norm, self.nonfinite, self.seed)
        # The worker's optimizer makes values: they are assigned under ``Bulk``, else what they moved by is subtracted.
        how = OptimizerSpec("Assign", ({},)) if self.sync.collective else OptimizerSpec("SGD", ({"lr": 1.0},))
        plain = tuple(msgspec.structs.replace(p, group=0) for p in parameters)
        return DenseSpec(name, plain, how, self.sync, None, "allow", self.seed)


class Hyperparameters:
    """Those of all groups: sent with the first step, and then when they changed or what was sent may be lost."""

    def __init__(self, table: DenseTable, kind: str, groups: PresentGroups) -> None:
        self.sent: Groups = None
        self._table = table
        self._kind = kind
        self._groups = groups
        self._failures = 0  # the table's, when groups were sent last

    def changed(self) -> Groups:
        """All groups' if they are to be sent now. Raises ``UnknownOptimizer`` for a value that servers would refuse."""
        kind = self._kind
        if not kind:
            return None
        groups = [optimizers.select(kind, group) for group in self._groups()]
        if groups == self.sent and self._failures == self._table.failures:
            return None
        for group in groups:
            optimizers.complete(kind, group)
        self.sent, self._failures = groups, self._table.failures
        return groups


class Steps(Generic[P]):
    """One table's steps at a worker. ``groups``: the present parameter groups, each a mapping of hyperparameters."""

    def __init__(
        self,
        client: Client,
        table: DenseTable,
        parameters: Sequence[P],
        shell: Shell[P],
        groups: PresentGroups,
        options: TrainOptions,
    ) -> None:
        self.table = table
        self._client = client
        self._collective = collective = options.sync.collective
        self._members = client.members
        self._hyper = Hyperparameters(table, options.kind, groups)
        self._ticket: Ticket | None = None
        self._ended_with: Groups = None  # the hyperparameters of the last step that was ended
        self._notices = Notices(client, table.spec.name)
        self.values = StepValues(table, parameters, shell, self.alone)
        here = not options.kind
        self.gradients = StepGradients(
            table, parameters, client.rank, options.nonfinite, options.bucket_bytes, self._hyper.changed,
            early=(collective or options.overlap) and not (here and not self.several()),
            final=not collective and options.overlap,
        )  # fmt: skip

    def several(self) -> bool:
        """Whether a step is that of several workers, or may be."""
        return self._collective and not (self._client.alone and self._client.members == self._members)

    def alone(self) -> bool:
        """Whether no other worker trains this table."""
        return self._client.alone and self._client.members == self._members

    def begin(self) -> None:
        """Before a step is put together: the last one's values are here."""
        self.arrive()

    def write_first(self, writes: Mapping[str, Tensor]) -> None:
        """Without steps of all workers what was written must be there before the gradient is applied to it.

        Raises ``ParameterModified`` if gradients of this step have left already.
        """
        if not writes or self._collective:
            return
        if self.gradients.have_left():
            raise ParameterModified(
                f"{min(writes)!r} was written on rank {self._client.rank}, and gradients of this step have left "
                "already (overlap=True), which this policy applies as they arrive. Write by opt.assign(), or leave "
                "overlap out"
            )
        self.table.write(writes)

    def end(
        self, writes: Mapping[str, Tensor] | None = None, *, skip: bool = False, merged: bool = False, based: int = 0
    ) -> None:
        """Send the step off; its values are on their way. See ``DenseTable.step`` for the arguments."""
        groups = self._hyper.changed()
        with_it = writes if self._collective else None
        self._ticket = self.table.step(groups=groups, skip=skip, merged=merged, based=based, writes=with_it)
        self._ended_with = self._hyper.sent
        self.values.next_step(wrote=bool(writes))
        self.gradients.next_step()

    def arrive(self) -> StepResult | None:
        """Wait until every parameter shows the outcome of the last step; what ``completed`` returns."""
        pending = self.values.pending()
        if pending:
            self.values.wait(pending)
        return self.completed()

    def completed(self) -> StepResult | None:
        """The outcome of the last step, once, when it is complete: the worker was told what there is to say of it."""
        if self._ticket is None or not self._ticket.done():
            return None
        ticket, self._ticket = self._ticket, None
        self.table.settle()  # raises what nobody has heard yet
        try:
            found = ticket.wait()
        except HeadwaterError:
            return None
        self._notices.hear(found, self._ended_with)
        return found
