"""Leases of versions, and who waits for news of them, as a state machine. No sockets, no clock.

The coordinator has one of these, and so has every relay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headwater.errors import ClusterError, VersionExpired
from headwater.types import TableSpec
from headwater.versions import listing
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import ASKERS, Entry, Prints, Waiting, check_name
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker

LEASE = 10.0  # seconds in which a reader whose connection broke may come back to its leases
LEASES = 4096  # of one reader
WAITERS = 16  # of one reader for the same news


class LeaseDesk(Protocol):
    """Whom ``Leases`` speaks through, and whom it asks. ``removed``: a version is gone, nobody needs its parts."""

    def reply(self, asker: Asker, message: m.Reply) -> None: ...
    def removed(self, entry: Entry) -> None: ...
    def spec(self, table: int) -> TableSpec: ...
    def holder(self, server: int) -> v.Holder | None: ...


class Leases:
    """Who reads which of a catalogue's versions. ``shards``: of the cluster whose tables they are of.

    ``clock``: seconds, of which only differences mean anything.
    """

    def __init__(self, desk: LeaseDesk, catalogue: Catalogue, shards: int, clock: Callable[[], float]) -> None:
        self._desk = desk
        self._catalogue = catalogue
        self._shards = shards
        self._clock = clock
        self._watching: dict[Waiting, list[Asker]] = {}
        self._listing: list[tuple[Asker, str]] = []  # who waits for another list, and of which model
        self._revision = 1
        self._prints = Prints()
        self._turns: dict[int, dict[int, int]] = {}  # by session: the leases that it can name, and their versions
        self._away: dict[int, float] = {}  # sessions whose connection broke, and when their leases end

    # ---- leases ----------------------------------------------------------------------------------

    def lease(self, asker: Asker, session: int, ask: v.Lease) -> None:
        """Hold a version for a reader. Raises ``UnknownVersion`` or ``VersionExpired``."""
        entry = self._catalogue.resolve(ask.model, ask.name)
        parts = tuple(
            v.PartAt(shard, table, part.size, part.digest, self.where(entry, shard))
            for (shard, table), part in sorted(entry.parts.items())
        )
        if entry.state == "lost" or not all(part.holders for part in parts):
            raise VersionExpired(
                f"no server that is there holds all of version {entry.info.name!r} of {entry.info.model!r} (number "
                f"{entry.number}): the last one with a part of it died. Lease another one, or publish again"
            )
        origin, tables = entry.origin, entry.ask.tables
        specs = origin.specs if origin is not None else [(t, self._desk.spec(t)) for t in tables]
        known = dict(ask.known)
        unknown = tuple((table, spec) for table, spec in specs if known.get(table) != self._prints.of(table, spec))
        self._grant(session, ask.turn, entry)
        shards = origin.shards if origin is not None else self._shards
        self._desk.reply(asker, v.Leased(entry.info, shards, tables, unknown, parts))

    def where(self, entry: Entry, shard: int) -> tuple[v.Holder, ...]:
        """Who holds a shard's part of it, and is there."""
        found = (self._desk.holder(server) for server in sorted(entry.holders.get(shard, ())))
        return tuple(holder for holder in found if holder is not None)

    def _grant(self, session: int, turn: int, entry: Entry) -> None:
        """One more lease. If it was asked for before, and the answer was lost, it takes the first one's place."""
        mine = self._turns.setdefault(session, {})
        if turn not in mine and max(len(mine), entry.leases[session]) >= LEASES:
            raise ClusterError(f"this reader has {LEASES} leases, no more are given; release some")
        entry.leases[session] += 1
        if turn in mine:
            self.release(session, 0, turn)
        if turn:
            mine[turn] = entry.number

    def holding(self, session: int, said: v.Holding) -> None:
        """All that a reader knows to lease: what it does not know ends, what is not known here stands again."""
        held = dict(said.leases[:LEASES])
        for turn in [turn for turn in self._turns.get(session, ()) if turn <= said.upto and turn not in held]:
            self.release(session, 0, turn)
        for turn, number in held.items():
            entry = self._catalogue.entries.get(number)
            if turn not in self._turns.get(session, ()) and entry is not None and entry.state in ("ready", "lost"):
                self._grant(session, turn, entry)

    def release(self, session: int, number: int, turn: int = 0) -> None:
        """A lease ends. One that is not there is no fault: it may have timed out."""
        if turn:
            number = self._turns.get(session, {}).pop(turn, 0)
        entry = self._catalogue.entries.get(number)
        if entry is not None and entry.leases[session]:
            entry.leases[session] -= 1
            if not entry.leases[session]:
                del entry.leases[session]
            self.retain()

    def left(self, session: int, now: float, *, clean: bool) -> None:
        """A client has left, or its connection broke: then its leases stand for a while."""
        self._away[session] = now if clean else now + LEASE
        if clean:
            self.tick(now)

    def joined(self, session: int) -> None:
        """A client is there, perhaps again."""
        self._away.pop(session, None)

    def tick(self, now: float) -> None:
        """Time has passed: leases of readers that are gone end, versions grow old."""
        over = [session for session, until in self._away.items() if now >= until]
        for session in over:
            del self._away[session]
            self._turns.pop(session, None)
            for entry in self._catalogue.entries.values():
                entry.leases.pop(session, None)
        if over or any(entry.ask.age is not None for entry in self._catalogue.entries.values()):
            self.retain()

    def retain(self) -> None:
        """Let go of what is neither new, nor tagged, nor leased."""
        for entry in self._catalogue.expendable(self._clock()):
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """A version is none any more."""
        self._catalogue.entries.pop(entry.number, None)
        self._desk.removed(entry)
        if entry.state in ("ready", "lost"):
            self._revised()

    # ---- news ------------------------------------------------------------------------------------

    def watch(self, asker: Asker, ask: v.Watch) -> None:
        """Answer when a name or tag means another version than number ``after``; a tag that is not there may come."""
        mine = Waiting(asker.peer, ask)
        if entry := mine.news(self._catalogue.find(ask.model, ask.name)):
            self._desk.reply(asker, v.Found(entry.info, entry.pause))
        else:
            check_name("model", ask.model)
            check_name("version or tag", ask.name)
            others = [each for each in self._watching if each.peer == asker.peer and each != mine]
            if len(others) >= ASKERS:  # given up long ago
                del self._watching[others[0]]
            askers = self._watching.setdefault(mine, [])
            askers.append(asker)  # another thread of the same reader, or one that has given the question before up
            del askers[:-WAITERS]

    def show(self, asker: Asker, ask: v.ListVersions) -> None:
        """Answer with what there is, as soon as that is another list than the one that is known."""
        self._listing = [each for each in self._listing if each[0].peer != asker.peer]  # it has given that up
        if ask.after == self._revision:
            self._listing.append((asker, ask.model))
        else:
            self._desk.reply(asker, v.VersionList(self.status(ask.model), self._revision))

    def changed(self, model: str) -> None:
        """What a name means may be another version now: tell those who wait for it."""
        for each in [each for each in self._watching if each.ask.model == model]:
            if entry := each.news(self._catalogue.find(model, each.ask.name)):
                for asker in self._watching.pop(each):
                    self._desk.reply(asker, v.Found(entry.info, entry.pause))
        self._revised()

    def _revised(self) -> None:
        self._revision += 1
        asked, self._listing = self._listing, []
        for asker, model in asked:
            self.show(asker, v.ListVersions(model))

    def gone(self, peer: int) -> None:
        """Whoever asked over this connection is not there any more."""
        self._listing = [each for each in self._listing if each[0].peer != peer]
        self._watching = {each: askers for each, askers in self._watching.items() if each.peer != peer}

    def status(self, model: str = "") -> tuple[v.VersionStatus, ...]:
        """For ``headwater versions``."""
        return listing.listed(self._catalogue, self.where, model)
