"""What a worker is told of a step beside its values, each thing once: learning rates that differ, data not shared."""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headwater.types import Hyper

if TYPE_CHECKING:
    from headwater.client import Client, StepResult
    from headwater.client.tickets import Alike

log = logging.getLogger("headwater")

_SHARED: weakref.WeakSet[Client] = weakref.WeakSet()
"""Clients that were told about their data: one model's gradients say enough."""


class Notices:
    """Of one optimizer. ``model``: the table's name."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self._differ: set[tuple[int, str]] = set()
        self._changed = False
        self._same = SameSamples(client.rank)

    def hear(self, result: StepResult, groups: Sequence[Mapping[str, Hyper]] | None) -> None:
        """A step's outcome; ``groups``: the hyperparameters that this worker said last. Warns, and logs skips."""
        if not result.applied:
            self._skipped(result)
        if result.differ and not self._changed:
            self._changed = True
            warn(
                f"workers changed the gradients of step {result.clock} of {self._model!r} in different ways (or "
                "some did and some did not): the change of the lowest rank counted, for all. What a script does to "
                "gradients between backward() and step() must be the same on every worker (noise: from the same "
                "seed). Said once"
            )
        if result.groups is not None and groups is not None:
            self._compare(result.clock, groups, result.groups)
        text = self._same.hear(result.alike, result.clock)
        if text and self._client not in _SHARED:
            _SHARED.add(self._client)
            warn(text)

    def _skipped(self, result: StepResult) -> None:
        ranks = result.skipped_by or (self._client.rank,)
        log.warning(
            "rank %d: step %d of %r was skipped on all workers for the sake of %s (a gradient that is not finite, or "
            "skip_step()); parameters and state are as before",
            self._client.rank, result.clock, self._model, _ranks(ranks),
        )  # fmt: skip

    def _compare(self, clock: int, mine: Sequence[Mapping[str, Hyper]], used: Sequence[Mapping[str, Hyper]]) -> None:
        for index, (own, theirs) in enumerate(zip(mine, used, strict=True)):
            for key, value in own.items():
                if value != theirs.get(key, value) and (index, key) not in self._differ:
                    self._differ.add((index, key))
                    warn(
                        f"{key} of parameter group {index} is {value!r} on rank {self._client.rank}, and step {clock} "
                        f"of {self._model!r} was taken with {theirs[key]!r}: under Bulk the lowest rank's "
                        "hyperparameters are the step's. Give all workers the same (a scheduler that looks at a loss "
                        "needs the same loss on all of them). Said once"
                    )


class SameSamples:
    """Whether other workers contribute the bits that this one does, step after step: it is the same samples then.

    Three different gradients in a row are enough, or two in eight steps: one that never changes, or is one of two (a
    sign), can be alike by chance. The lowest of those that are alike says so.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._steps = 0
        self._others: frozenset[int] | None = None
        self._marks: set[tuple[int, ...]] = set()

    def hear(self, alike: Alike | None, clock: int) -> str:
        """What there is to say, empty as a rule. None: the servers do not look, or not any more."""
        if alike is None:
            return ""
        self._others = alike.ranks if self._others is None else self._others & alike.ranks
        self._steps += 1
        self._marks.add(alike.mark)
        sure = len(self._marks) >= 3 or (len(self._marks) == 2 and self._steps >= 8)
        if not self._others or not sure or self._rank > min(self._others):
            return ""
        same = sorted({self._rank, *self._others})
        return (
            f"{_ranks(same)} contributed the same gradients, bit for bit, in {self._steps} steps up to step {clock}: "
            f"they train on the same samples, which is {len(same)} times the work for nothing. To give each worker its "
            "share of the data: loader = headwater.shard(loader). Said once"
        )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def warn(text: str) -> None:
    """For whoever reads the output, as of the script's line; and for who collects logs, at a level that is not printed.

    The text should end in "Said once", and the caller see to that.
    """
    log.info("%s", text)
    level, frame = 1, sys._getframe()  # noqa: SLF001 - what `warnings` itself calls
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("headwater", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
