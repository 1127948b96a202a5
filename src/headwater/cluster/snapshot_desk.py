"""Snapshots at the coordinator: what the state machine wants done, and what it needs to know of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.cluster.snapshots import Action, Answer, Discard, Moment, Publish, Send, Start
from headwater.errors import HeadwaterError
from headwater.wire import messages as m

if TYPE_CHECKING:
    from headwater.cluster.coordinator import Coordinator


class SnapshotDesk:
    """The coordinator's desk for its ``Snapshots``. ``_clock``: steps above it are not in the one under way."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._clock = 0
        self._plan: bytes | None = None
        self._jobs: list[Start | Publish | Discard] = []

    def take_jobs(self) -> list[Start | Publish | Discard]:
        """File work for the host, once."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def settled_clock(self) -> int:
        """Steps up to here are committed, and a snapshot under way holds them."""
        committed = self._coordinator.committed()
        return min(committed, self._clock) if self._coordinator.snapshots.step == "cutting" else committed

    def do(self, actions: list[Action]) -> None:
        """Carry out what the state machine wants."""
        c = self._coordinator
        for action in actions:
            match action:
                case Send():
                    c.tell(action.shard, action.cut)
                    if not action.cut.folder and action.shard == 0:  # all shards are told to give it up
                        self._jobs.append(Discard(action.cut.snapshot))
                case Moment():
                    self._cut()
                case Answer(reply=HeadwaterError() as error):
                    c.fail(action.asker, error)
                case Answer(reply=m.SnapshotTaken() as taken):
                    c.reply(action.asker, taken)
                case Publish():
                    at = max((clock for part in action.parts for _, clock in part.clocks), default=0)
                    plan = c.plans.snapshot(at) if self._plan is None else self._plan
                    self._jobs.append(action._replace(plan=plan))
                case Start():
                    self._jobs.append(action)

    def _cut(self) -> None:
        """Now: what has been decided until here is in the snapshot, what will be decided is not."""
        c = self._coordinator
        ready = {t.number: t for t in c.tables.by_number.values() if t.state == "ready"}
        clocks = [(t.number, t.clock) for t in ready.values() if t.spec.sync.collective and len(t.participants) > 1]
        together = all(t.spec.sync.collective for t in ready.values())
        self._clock, self._plan = c.committed(), None if together else c.plans.snapshot()
        self.do(c.snapshots.cut(clocks, {t.number: t.spec for t in ready.values()}))
