"""What a worker contributes to the step under way: gradients leave in buckets, as early as they are ready.

A bucket of neighbours leaves when its last gradient is ready. At the end of a step leaves what has not, and what
changed since it left: nothing in a script that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from headwater.errors import GradientModified, NonFiniteGradient
from headwater.integrations.base.parameter import TableParameter
from headwater.types import Hyper
from headwater.wire.tensors import finite

if TYPE_CHECKING:
    from headwater.client import DenseTable

P = TypeVar("P", bound=TableParameter)
Nonfinite = Literal["error", "skip", "allow"]
Groups = list[dict[str, Hyper]] | None
"""Hyperparameters of all groups if they changed since they were last sent, else None."""


class Bucket:
    """Gradients that leave together. ``missing``: how many are not ready in this step."""

    __slots__ = ("missing", "names", "parameters")

    def __init__(self, parameters: Sequence[TableParameter]) -> None:
        self.parameters = tuple(parameters)
        self.names = tuple(p.name for p in parameters)
        self.missing = len(self.parameters)
        for p in self.parameters:
            p.bucket = self


def pack(parameters: Sequence[TableParameter], limit: int) -> list[Bucket]:
    """Buckets of neighbours, each closed by the parameter that brings it to ``limit`` bytes."""
    buckets, some, size = [], [], 0
    for p in parameters:
        some.append(p)
        size += p.nbytes
        if size >= limit:
            buckets.append(Bucket(some))
            some, size = [], 0
    return [*buckets, Bucket(some)] if some else buckets


class StepGradients(Generic[P]):
    """The gradients of one table's step under way.

    ``groups``: the hyperparameters to send along with a push. ``early``: a bucket leaves as soon as it is ready.
    ``final``: what has left is applied as it arrives and cannot be taken back.
    """

    def __init__(
        self,
        table: DenseTable,
        parameters: Sequence[P],
        rank: int,
        nonfinite: Nonfinite,
        bucket_bytes: int,
        groups: Callable[[], Groups],
        *,
        early: bool,
        final: bool,
    ) -> None:
        self.skip = False  # this step holds a gradient that is not finite, and the policy is to skip
        self.void = False  # what was pushed last is no part of the step under way
        self.early = early
        self.final = final
        self._table = table
        self._parameters = parameters
        self._rank = rank
        self._nonfinite = nonfinite
        self._groups = groups
        self._bucket_bytes = bucket_bytes
        self._order: list[P] | None = []  # as gradients became ready, until the buckets follow it
        self._buckets = pack(parameters[::-1], bucket_bytes)  # a backward pass goes the other way

    @property
    def buckets(self) -> list[tuple[str, ...]]:
        """The names in each bucket, in the order in which they are expected to leave."""
        return [bucket.names for bucket in self._buckets]

    def ready(self, parameter: P) -> None:
        """The gradient is as this step will have it. With the last one of a bucket all leave, if they may."""
        if self._order is not None:
            self._order.append(parameter)
        bucket = parameter.bucket
        bucket.missing -= 1
        if bucket.missing or not all(p.changed and not p.copies for p in bucket.parameters):
            return
        if self._nonfinite == "allow" or all(map(finite, self._table.gradient_runs(bucket.names))):
            self.push(bucket.parameters, bucket.names)

    def push(self, parameters: Sequence[TableParameter], names: Sequence[str], *, anew: bool = False) -> None:
        """These leave now, and the hyperparameters if they changed. ``anew``: what left of this step before is void."""
        self._table.push(names, groups=self._groups(), anew=anew or self.void)
        self.void = False
        for p in parameters:
            p.left, p.changed = True, False

    def have_left(self) -> bool:
        """Whether some gradient of this step has."""
        return any(p.left for p in self._parameters)

    def finish(self, present: Sequence[P], *, gone: bool = False, checked: bool = True) -> None:
        """Let leave what has not, and what changed since it left.

        ``present``: all that have a gradient in this step. ``gone``: one that left is no part of it any more.
        ``checked``: the policy on NaN and Inf is asked.

        Raises:
            NonFiniteGradient: NaN or Inf, and the policy is "error". The step is not taken.
            GradientModified: a gradient that was applied already changed since (``final``).
        """
        gone = gone or self.void
        if self.final and (gone or any(p.left and p.changed for p in present)):
            raise self._too_late()
        if checked and not self.may_leave([p for p in present if not p.left or p.changed]):
            return
        again = self._table.by_bytes  # where the servers read the memory itself, they read it as it is at the end
        leaving = present if gone else [p for p in present if not p.left or (p.changed and again)]
        if leaving or gone:
            self.push(leaving, [p.name for p in leaving], anew=gone)

    def may_leave(self, parameters: Sequence[P]) -> bool:
        """Whether the gradients may leave: the policy on NaN and Inf. Raises ``NonFiniteGradient``."""
        if self._nonfinite == "allow" or self.skip:
            return not self.skip
        bad = next((p for p in parameters if not finite(p.gradient)), None)
        if bad is None:
            return True
        if self._nonfinite == "skip":
            self.skip = True
            return False
        raise NonFiniteGradient(
            f"the gradient of {bad.name!r} on rank {self._rank} holds NaN or Inf; it was not applied and the "
            "step was not taken. nonfinite='skip' passes over such steps on all workers, opt.skip_step() over this one"
        )

    def _too_late(self) -> GradientModified:
        return GradientModified(
            f"gradients changed on rank {self._rank} after they had left for the servers, which apply them as "
            "they arrive under this policy; a part of the step may be applied. With overlap=False gradients leave at "
            "step()"
        )

    def next_step(self) -> None:
        """The step was sent off: every gradient is missing again. Buckets follow the order of the first step, once."""
        self.skip = False
        for p in self._parameters:
            p.stepped = p.stepped or p.left
            p.left = p.changed = False
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        if self._order:
            seen = {p.name for p in self._order}
            rest = [p for p in self._parameters[::-1] if p.name not in seen]
            self._buckets = pack([*self._order, *rest], self._bucket_bytes)
            self._order = None
