"""What the workers of a table say beside their gradients: hyperparameters, digests; and what each is told of it.

Only a primary knows it; a worker that meets a new one says it again. No tensors, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping

from headwater.types import Hyper
from headwater.wire.messages import AckBody, StepBody

Groups = tuple[dict[str, Hyper], ...]


class Words:
    """By session: the hyperparameters and the digest that its worker said last.

    What is said with a bulk step counts when all have ended it: one that a death undoes is pushed again, with its
    words. ``new``: somebody has spoken, or others are there, since the last step that was applied.
    """

    def __init__(self) -> None:
        self.groups: dict[int, Groups] = {}
        self.digests: dict[int, int] = {}
        self.new = False
        self._heard: list[tuple[int, StepBody]] = []

    def hear(self, session: int, body: StepBody) -> None:
        """A worker says what has changed."""
        self._heard.append((session, body))

    def count(self) -> None:
        """What was heard counts."""
        for session, body in self._heard:
            if body.groups is not None:
                self.groups[session] = body.groups
                self.new = True
            if body.digest is not None:
                self.digests[session] = body.digest
                self.new = True
        self._heard = []

    def undo(self) -> None:
        """What was heard does not count."""
        self._heard = []

    def end(self, session: int) -> None:
        """A worker is gone for good."""
        self.groups.pop(session, None)
        self.digests.pop(session, None)

    def of_step(self, sessions: Mapping[int, int]) -> Groups | None:
        """The hyperparameters of a bulk step: those of the lowest rank, if they may be others than before.

        ``sessions``: of the workers that take part, by rank.
        """
        return self.groups.get(sessions[min(sessions)]) if self.new else None

    def notes(self, sessions: Mapping[int, int], skipped_by: tuple[int, ...]) -> dict[int, AckBody]:
        """What there is to say to each worker of a bulk step, by rank."""
        if not self.new and not skipped_by:
            return {}
        used = self.of_step(sessions)
        apart = self.new and len({self.digests.get(session, 0) for session in sessions.values()}) > 1
        found = {}
        for rank, session in sessions.items():
            other = used if used is not None and self.groups.get(session, used) != used else None
            if other is not None or skipped_by or apart:
                found[rank] = AckBody(groups=other, skipped_by=skipped_by, apart=apart)
        return found
