"""Versions under random events, beside a model that knows only the promises: what is held stays."""

from __future__ import annotations

import random
from typing import Any

import pytest

from headwater.errors import ClusterError, HeadwaterError, UnknownVersion, UsageError, VersionExists, VersionExpired
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import Entry
from headwater.versions.leases import LEASE, Leases
from headwater.wire import versions as v
from tests.versions.fake_coordinator import READER, FakeCoordinator, W

SESSIONS = (50, 51, 52)
NAMES = ("v0", "v1", "made-0", "made-1", "made-2", "prod", "stage", "latest", "latest")
SEEDS = 60


class Machine:
    """``leases``: (session, turn) → number, as their readers know them. ``away``: readers that are gone, since when."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.world = FakeCoordinator()
        self.leases: dict[tuple[int, int], int] = {}
        self.away: dict[int, float] = {}
        self.ready: dict[int, str] = {}  # every version that was ever ready
        self.numbers: set[int] = set()
        self.turn = 0

    def number_of(self, what: int) -> int | None:
        known = sorted(self.world.catalogue.entries)
        return known[what % len(known)] if known else None

    # ---- trainers and operators --------------------------------------------------------------------

    def publish(self) -> None:
        chance = self.chance
        tags = set(chance.sample(NAMES, chance.choice((0, 0, 1))))
        self._publish(chance.choice(NAMES), chance.randint(1, 3), chance.choice((None, 30.0)), tags)

    def _publish(self, name: str, keep: int, age: float | None, tags: set[str]) -> int:
        before = set(self.world.catalogue.entries)
        try:
            self.world.publish(name, keep=keep, age=age, tags=tuple(tags), time=float(len(self.numbers)))
        except (VersionExists, UsageError, ClusterError):
            assert set(self.world.catalogue.entries) == before
            return 0
        (number,) = set(self.world.catalogue.entries) - before
        assert number not in self.numbers
        self.numbers.add(number)
        return number

    def make(self) -> None:
        """A version that goes well; on ``both`` copies of each shard."""
        chance = self.chance
        keep, both = chance.randint(1, 3), chance.random() < 0.5
        if len(self.world.catalogue.entries) < 8 and {0, 1} <= self.world.up:
            number = self._publish(f"made-{len(self.numbers)}", keep, None, set())
            for server in sorted(self.world.up) if both else (0, 1):
                if number in self.world.catalogue.entries:
                    self.world.said(number, server, server % 2)

    def server_says(self) -> None:
        chance = self.chance
        what, server, begun, step = (
            chance.randrange(10),
            chance.randrange(4),
            chance.random() < 0.5,
            chance.choice((0, 0, 1)),
        )
        number = self.number_of(what)
        shard = server % 2
        if number is not None and server in self.world.up:
            begins = shard not in self.world.catalogue.entries[number].begun
            more: dict[str, Any] = {"clocks": ((1, step),)} if begins else {}
            self.world.said(number, server, shard, begun=begun, **more)

    def server_cannot(self) -> None:
        chance = self.chance
        what, server, leads = chance.randrange(10), chance.randrange(4), chance.random() < 0.5
        number = self.number_of(what)
        if number is not None:
            self.world.lifecycle.part(v.PartDone(number, server % 2, server, error="full"), leads=leads)

    def tag(self) -> None:
        chance = self.chance
        tag, name = chance.choice(NAMES), chance.choice((*NAMES, ""))
        before = dict(self.world.catalogue.tags)
        try:
            self.world.tag(tag, name)
        except HeadwaterError:
            assert self.world.catalogue.tags == before

    def retire(self) -> None:
        name = self.chance.choice(NAMES)
        try:
            number = self.world.means(name)
            self.world.lifecycle.retire(self.world.asker(), v.Retire("m", name))
        except (UsageError, UnknownVersion):
            return
        assert number not in self.held()

    # ---- readers -----------------------------------------------------------------------------------

    def lease(self) -> None:
        """``lost``: the answer never comes, and the reader asks again."""
        chance = self.chance
        session, name, lost = chance.choice(SESSIONS), chance.choice(NAMES), chance.random() < 0.3
        if session in self.away:
            return
        self.turn += 1
        for _ in range(2 if lost else 1):
            try:
                leased = self.world.lease(name, session, turn=self.turn)
            except (UnknownVersion, VersionExpired):
                return
            assert all(part.holders for part in leased.parts)
        self.leases[session, self.turn] = leased.info.number

    def release(self) -> None:
        chance = self.chance
        what, lost = chance.randrange(10), chance.random() < 0.3
        mine = sorted(key for key in self.leases if key[0] not in self.away)
        if mine:
            session, turn = mine[what % len(mine)]
            number = self.leases.pop((session, turn))
            if not lost:
                self.world.leases.release(session, number, turn)

    def beat(self) -> None:
        session = self.chance.choice(SESSIONS)
        if session not in self.away:
            mine = tuple((turn, number) for (of, turn), number in self.leases.items() if of == session)
            self.world.leases.holding(session, v.Holding(mine, self.turn))
            here = {number for _, number in mine}
            assert all((e.leases[session] > 0) == (e.number in here) for e in self.world.catalogue.entries.values())

    def reader_goes(self) -> None:
        chance = self.chance
        session, clean = chance.choice(SESSIONS), chance.random() < 0.3
        if session not in self.away:
            self.world.leases.left(session, self.world.now, clean=clean)
            self.away[session] = self.world.now if not clean else -1e9

    def reader_comes(self) -> None:
        session = self.chance.choice(SESSIONS)
        if session in self.away:
            self.world.leases.joined(session)
            if self.world.now - self.away.pop(session) >= LEASE:
                self.leases = {key: number for key, number in self.leases.items() if key[0] != session}

    def watch(self) -> None:
        chance = self.chance
        name, after = chance.choice(NAMES), chance.randrange(6)
        self.world.take(READER)
        self.world.watch(name, after)
        for found in self.world.take(READER):
            assert found.info.number != after
            assert self.world.catalogue.entries[found.info.number].state == "ready"

    # ---- deaths ------------------------------------------------------------------------------------

    def server_dies(self) -> None:
        server = self.chance.randrange(4)
        self.world.up.discard(server)
        self.world.lifecycle.buried(server)
        self.world.lifecycle.moved(server % 2)

    def server_comes(self) -> None:
        server = self.chance.randrange(4)
        self.world.up.add(server)

    def time(self) -> None:
        seconds = self.chance.choice((1, 5, 31))
        self.world.pass_time(seconds)

    def hang_up(self) -> None:
        peer = self.chance.choice((W, READER))
        self.world.gone(peer)

    def restart(self) -> None:
        """Its readers say what they hold before anything else happens."""
        self.world = self.world.restart()
        self.world.now = max([self.world.now, *self.away.values()])
        for session in set(range(50, 53)) - set(self.away):
            mine = tuple((turn, number) for (of, turn), number in self.leases.items() if of == session)
            self.world.leases.holding(session, v.Holding(mine, self.turn))
        self.leases = {key: number for key, number in self.leases.items() if key[0] not in self.away}

    # ---- what is always true -------------------------------------------------------------------------

    def held(self) -> set[int]:
        """Versions that readers hold who are there, or are not gone for long."""
        return {
            number for (session, _), number in self.leases.items()
            if session not in self.away or self.world.now < self.away[session] + LEASE
        }  # fmt: skip

    def promises(self) -> None:
        there = self.world.catalogue.entries
        assert self.held() <= set(there), "a version was let go of under a lease"
        assert set(self.world.catalogue.tags.values()) <= set(there), "a tag means nothing"
        assert not set(self.world.dropped) & set(there), "servers were told to drop what can be leased"
        names = [entry.info.name for entry in there.values()]
        assert len(set(names)) == len(names)
        assert not set(names) & {tag for _, tag in self.world.catalogue.tags}
        for number, entry in there.items():
            if entry.state == "ready":
                assert entry.whole
                assert self.ready.setdefault(number, entry.info.digest) == entry.info.digest, "a version has changed"
        kept = {int(key[8:]) for key in self.world.state if key.startswith("version/")}
        assert kept == {number for number, entry in there.items() if entry.state in ("ready", "lost")}


_RULES = {
    Machine.publish: 3, Machine.make: 8, Machine.server_says: 6, Machine.server_cannot: 1, Machine.tag: 4,
    Machine.retire: 2, Machine.lease: 10, Machine.release: 4, Machine.beat: 4, Machine.reader_goes: 2,
    Machine.reader_comes: 4, Machine.watch: 2, Machine.server_dies: 1, Machine.server_comes: 3, Machine.time: 3,
    Machine.hang_up: 1, Machine.restart: 1,
}  # fmt: skip


def run(first: int = 0, seeds: int = SEEDS) -> None:
    for seed in range(first, first + seeds):
        machine = Machine(seed)
        for act in machine.chance.choices(list(_RULES), list(_RULES.values()), k=80):
            try:
                act(machine)
                machine.promises()
            except Exception as error:
                raise AssertionError(f"seed {seed}, {act.__name__}: {type(error).__name__}: {error}") from error


def test_random_events_break_no_promise() -> None:
    run()


@pytest.mark.parametrize("bug", ["leases", "tags", "turns", "away"])
def test_a_seeded_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def expendable(self: Catalogue, now: float) -> list[Entry]:
        mine = [e for e in self.of("m") if e.state in ("ready", "lost")]
        newest, found = self.newest("m"), []
        for place, entry in enumerate(reversed(mine)):
            keeps = entry.leases if bug == "tags" else self.tags_of(entry)
            if entry is not newest and not keeps and place >= (newest or entry).ask.keep:
                found.append(entry)
        return found

    if bug in ("leases", "tags"):
        monkeypatch.setattr(Catalogue, "expendable", expendable)
    elif bug == "turns":  # a question that is asked again is another one
        grant = Leases._grant
        monkeypatch.setattr(Leases, "_grant", lambda self, session, turn, entry: grant(self, session, 0, entry))
    else:  # a reader that is back is still thought gone
        monkeypatch.setattr(Leases, "joined", lambda self, session: None)
    with pytest.raises(AssertionError, match="seed"):
        run(seeds=10 * SEEDS)
