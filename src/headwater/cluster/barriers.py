"""Where workers wait for each other. Part of the coordinator."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headwater.cluster.membership import Member, Membership
from headwater.cluster.outbox import Outbox
from headwater.errors import HeadwaterError, UsageError, WorkerLost
from headwater.wire import messages as m
from headwater.wire.outgoing import Asker


class Barriers:
    """By name: who waits, and each session's last turn that is over, so that asking again is harmless.

    Workers may say something to each other there: each is told what all have said.
    """

    def __init__(self, outbox: Outbox, membership: Membership) -> None:
        self._outbox = outbox
        self._membership = membership
        self._waiting: dict[str, dict[int, tuple[Asker, m.Barrier]]] = {}
        self._passed: dict[str, dict[int, int]] = {}
        self._answers: dict[str, m.Reply] = {}  # of the last turn of each name

    def wait(self, asker: Asker, worker: Member, message: m.Barrier) -> None:
        """A worker is at a barrier. It is answered when all are."""
        if self._passed.get(message.name, {}).get(worker.join.session, 0) >= message.turn:
            self._outbox.reply(asker, self._answers.get(message.name, m.Done()))  # it is over; the answer was lost
            return
        if len(message.value) > m.MAX_VALUE:
            raise UsageError(f"{len(message.value)} bytes to say at a barrier, of at most {m.MAX_VALUE}")
        self._waiting.setdefault(message.name, {})[worker.rank] = (asker, message)
        self._check(message.name)

    def at(self, name: str) -> set[int]:
        """The ranks that wait there."""
        return set(self._waiting.get(name, ()))

    def departed(self, rank: int, clean: bool) -> None:
        """A worker is gone. After a death nobody knows what the others wait for: they are told."""
        there = {member.join.session for member in self._membership.workers.values()}
        for name, passed in list(self._passed.items()):
            self._passed[name] = {session: turn for session, turn in passed.items() if session in there}
            if not self._passed[name]:
                del self._passed[name]
                self._answers.pop(name, None)
        for name, askers in list(self._waiting.items()):
            askers.pop(rank, None)
            if clean:
                self._check(name)
                continue
            for asker, _ in self._waiting.pop(name).values():
                self._outbox.fail(asker, _lost(self._membership))

    def _check(self, name: str) -> None:
        askers = self._waiting.get(name, {})
        workers = self._membership.workers
        if not askers or not set(self._membership.ranks()) <= set(askers):
            return
        passed = self._passed.setdefault(name, {})
        values = tuple((rank, message.value) for rank, (_, message) in sorted(askers.items()))
        answer: m.Reply = m.Met(values) if any(value for _, value in values) else m.Done()
        self._answers[name] = answer
        for rank, (asker, message) in self._waiting.pop(name).items():
            if rank in workers:
                passed[workers[rank].join.session] = message.turn
            self._outbox.reply(asker, answer)
        self._outbox.save("barriers", msgspec.msgpack.encode(self._passed))
        if isinstance(answer, m.Met):
            self._outbox.save("met", msgspec.msgpack.encode(self._met()))

    def restore(self, state: Mapping[str, bytes]) -> None:
        """Turns that were over before a restart: whoever asks again is answered as the first time."""
        if "barriers" in state:
            self._passed = msgspec.msgpack.decode(state["barriers"], type=dict[str, dict[int, int]])
        if "met" in state:
            self._answers = dict(msgspec.msgpack.decode(state["met"], type=dict[str, m.Met]))

    def _met(self) -> dict[str, m.Met]:
        return {name: answer for name, answer in self._answers.items() if isinstance(answer, m.Met)}


def _lost(membership: Membership) -> HeadwaterError:
    return WorkerLost(f"{membership.reason}; the barrier was given up, {len(membership.ranks())} workers remain")
