"""What asynchronous calls return."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from headwater import interrupts
from headwater.errors import HeadwaterError
from headwater.types import Hyper


class StepResult(msgspec.Struct, frozen=True):
    """What became of one step.

    ``clock``: the worker's step number. ``applied``: False if the step was skipped for a gradient that was not
    finite. ``grad_norm``: the global norm before clipping, if the table has ``max_grad_norm``. ``staleness``:
    steps of others that were applied between this worker's last read and its push (0 under Bulk).
    ``lsn``: the highest log sequence number that acknowledged it. ``skipped_by``: the ranks for whose sake it was
    skipped. ``groups``: under ``Bulk``, the hyperparameters that it was taken with, where those of this worker are
    others; None where they are the same, or nobody's have changed.
    """

    clock: int
    applied: bool
    grad_norm: float | None
    staleness: int
    lsn: int
    skipped_by: tuple[int, ...] = ()
    groups: tuple[dict[str, Hyper], ...] | None = None
    alike: Alike | None = None
    apart: bool = False
    differ: bool = False


class Alike(msgspec.Struct, frozen=True):
    """While the servers look: the other ranks whose contribution to a step had the same bits, and a hash of it."""

    ranks: frozenset[int]
    mark: tuple[int, ...]


class Ticket:
    """The future of a push, pull or step. Waiting twice gives the same answer."""

    def __init__(self, done: Callable[[], bool], wait: Callable[[float | None], StepResult]) -> None:
        self._done = done
        self._wait = wait
        self._result: StepResult | None = None
        self._error: HeadwaterError | None = None

    def resolve(self, result: StepResult) -> None:
        """The answer, however it was waited for: a later step does not change it."""
        self._result = result

    def reject(self, error: HeadwaterError) -> None:
        """The step failed; every ``wait`` says so."""
        self._error = error

    def done(self) -> bool:
        """Whether ``wait`` would return at once. Receives nothing by itself."""
        return self._result is not None or self._error is not None or self._done()

    @interrupts.deferred
    def wait(self, timeout: float | None = None) -> StepResult:
        """Block until the servers have answered; ``timeout`` in seconds, default the client's.

        Raises a typed error: ``WorkerLost``, ``LinkBroken``, ``DeadlineExceeded``, …
        """
        if self._error is not None:
            raise self._error
        if self._result is None:
            self._result = self._wait(timeout)
        return self._result
