"""Servers, views and one worker on any schedule of deaths and cut connections: each push once, and all copies equal."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.cluster.fleet import Fleet
from headwater.errors import HeadwaterError
from headwater.server.node import Setting
from headwater.server.replication.log import Log
from headwater.server.server import Server
from headwater.types import Async, Bulk, Sync
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from tests.server.ring import Ring, Worker, spec

SEEDS = st.integers(0, 2**32).map(random.Random)
COPIES = 2


class Play:
    """A ring whose views are made by a real fleet. ``waiting``: pushes that are not acknowledged, in order."""

    def __init__(self, sync: Sync, chance: random.Random) -> None:
        self.chance = chance
        self.ring = Ring(3)
        self.fleet = Fleet(3, 1, COPIES)
        for number in range(3):
            self.fleet.join(100 + number, m.Join("server", 0, address=f"s{number}"), 0.0)
        self.fleet.begin()
        self.plan()
        self.ring.begin(spec(sync, "SGD", (2_000,), (30, 40)))
        self.worker = Worker(self.ring)
        self.worker.open(self.leader)
        self.waiting: list[tuple[int, list[Frame]]] = []  # (last number, frames)
        self.pushed = 0

    @property
    def leader(self) -> int:
        primary = self.fleet.views[0].primary
        assert primary is not None
        return primary.server

    # ---- the coordinator ---------------------------------------------------------------------------

    def plan(self) -> None:
        """What primaries said, and the views that follow from it and from the deaths."""
        said, self.ring.said = self.ring.said, []
        for sender, message in said:
            if isinstance(message, m.Synced):
                self.fleet.synced(message, sender)
            elif isinstance(message, m.Suspect):
                self.fleet.suspect(message, sender)
        for _, view in self.fleet.plan():
            self.ring.epoch = view.epoch
            for number in range(len(self.ring.servers)):
                if number not in self.ring.down:
                    self.ring.tell(number, view)

    # ---- the worker --------------------------------------------------------------------------------

    def push(self) -> None:
        """Ask for one more step, if the last one is through; else go on with what waits."""
        self.hear()
        if not self.waiting and (-1, self.worker._peer) in self.ring._ends:
            self.pushed += 1
            frames = self.worker.push(self.pushed, deliver=False)
            self.waiting.append((frames[-1].seq, frames))

    def hear(self) -> None:
        for seq in self.worker.acks():
            self.waiting = [(last, frames) for last, frames in self.waiting if last > seq]
        lost = self.worker.take(Kind.ERROR) or (-1, self.worker._peer) not in self.ring._ends
        if lost and self.leader not in self.ring.down and 0 in self.ring.servers[self.leader].nodes:
            self.worker.frames.clear()
            self.again()

    def again(self) -> None:
        """Over a new connection: what the shard has not applied is sent again; what it has needs only its answer."""
        base = self.waiting[0][1][0].seq if self.waiting else self.worker.seq + 1
        self.ring.muted.clear()
        self.ring.run()
        if not self.ring.node(self.leader).leads:
            return
        self.worker.open(self.leader, base)
        for _, frames in self.waiting:
            self.worker.again(frames, deliver=False)

    # ---- what happens ------------------------------------------------------------------------------

    def disturb(self) -> None:
        ring, chance = self.ring, self.chance
        match chance.choice(("push", "push", "push", "steps", "steps", "mute", "speak", "cut", "die", "tick", "tick")):
            case "push":
                self.push()
            case "steps":
                for _ in range(chance.randint(1, 12)):
                    ring.step()
            case "mute":
                ring.muted.add(tuple(chance.sample(range(len(ring.servers)), 2)))  # type: ignore[arg-type]
            case "speak":
                ring.muted.clear()
            case "cut":
                between = [end for end, other in ring._ends.items() if end[0] >= 0 and other[0] >= 0]
                if between:
                    end = chance.choice(between)
                    if end[0] not in ring.down:
                        ring._do(end[0], ring.servers[end[0]].closed(end[1]))
                    ring._cut(end)
            case "die":
                self.die()
            case "tick":
                ring.tick(chance.choice((0.1, 0.5, 1.5)))
        self.plan()

    def die(self) -> None:
        """Somebody dies, where another copy is in sync; a new process takes its place."""
        view = self.fleet.views[0]
        live = [n for n, s in self.fleet.servers.items() if s.alive]
        victim = self.chance.choice(live)
        if victim == self.leader and not any(x.server in live for x in view.backups):
            return
        self.ring.kill(victim)
        self.fleet.disconnected(self.fleet.servers[victim].peer or 0)
        self.fleet.refused(victim)
        self.plan()
        number = self.fleet.next_number
        self.fleet.join(100 + number, m.Join("server", 0, address=f"s{number}"), 0.0)
        self.ring.servers.append(Server(Setting(number, 1, 1, threads=False)))

    def heal(self) -> None:
        """All is well again, for a while."""
        self.ring.muted.clear()
        for _ in range(60):
            self.ring.tick(0.2)
            self.plan()
            self.hear()
            if not self.waiting and len(self.fleet.views[0].backups) == COPIES - 1:
                break
        self.ring.run()


@pytest.mark.parametrize("sync", [Async(), Bulk()])
@given(chance=SEEDS)
@settings(max_examples=100)
def test_every_push_counts_once_and_the_copies_are_equal(sync: Sync, chance: random.Random) -> None:
    play = Play(sync, chance)
    for _ in range(60):
        play.disturb()
    play.heal()
    assert play.waiting == [], "a push was never acknowledged"
    (backup,) = play.fleet.views[0].backups
    assert play.ring.digest(play.leader) == play.ring.digest(backup.server)
    assert same(play, sync)


def same(play: Play, sync: Sync) -> bool:
    """Whether the shard is as if every push had been applied once, in order, by one server."""
    reference = Ring(1)
    reference.adopt(0)
    reference.begin(spec(sync, "SGD", (2_000,), (30, 40)))
    worker = Worker(reference)
    worker.open(0)
    for number in range(play.pushed):
        worker.push(number + 1)
    return play.ring.digest(play.leader)[1] == reference.digest(0)[1]


def test_the_schedules_find_a_primary_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are worth something: a push that is acknowledged before the backup has it is lost sooner or later."""
    monkeypatch.setattr(Log, "next_accepted", lambda log: log.pending.popleft() if log.pending else None)
    caught = 0
    for seed in range(60):
        play = Play(Async(), random.Random(seed))
        try:
            for _ in range(60):
                play.disturb()
            play.heal()
        except (AssertionError, HeadwaterError):
            caught += 1
            continue
        digests = {play.ring.digest(x.server)[1] for x in play.fleet.views[0].backups}
        caught += bool(play.waiting) or digests != {play.ring.digest(play.leader)[1]} or not same(play, Async())
    assert caught
