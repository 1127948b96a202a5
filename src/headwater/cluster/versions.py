"""Versions, tags and leases as a state machine: what happened in, what is to be said out. No sockets, no clock.

A version is *waiting* (a step that it wants is not committed yet) → *cutting* (every shard begins and makes its part) →
*ready* (each part is held by somebody; readers may lease it) → gone: retired by count or age when no tag means it and
nobody leases it, or *lost* when the last holder of a part died. Tags are names that move; ``latest`` is always the
newest ready version and cannot be moved. The coordinator has one of these, and so has every relay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import xxhash

from headwater.cluster import version_status
from headwater.cluster.entries import (
    ASKERS,
    LATEST,
    TAGS,
    Desk,
    Entry,
    Prints,
    Saved,
    Waiting,
    check,
    check_name,
    same,
    wait,
)
from headwater.cluster.entries import Known as Known
from headwater.errors import (
    ClusterError,
    HeadwaterError,
    ProtocolError,
    UnknownVersion,
    UsageError,
    VersionExists,
    VersionExpired,
)
from headwater.types import VersionInfo
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker

LEASE = 10.0  # seconds in which a reader whose connection broke may come back to its leases
LEASES = 4096  # of one reader
HEAL = 5.0  # seconds between two looks for servers that should hold a part and do not
UNFINISHED = 16  # versions of one cluster that are on their way; more are refused
RESERVED = 64  # numbers that are taken at a time: to keep each would be a wait for the disk with every version
WAITERS = 16  # of one reader for the same news
ABANDONED = 30.0  # seconds after which a version that nobody waits for and that has not begun is given up
COPYING = 900.0  # the same for one that has


class Versions:
    """All versions of a cluster of ``shards`` shards. ``clock``: seconds, of which only differences mean anything."""

    def __init__(self, desk: Desk, shards: int, clock: Callable[[], float]) -> None:
        self.entries: dict[int, Entry] = {}
        self.tags: dict[tuple[str, str], int] = {}
        self._desk = desk
        self._shards = shards
        self._clock = clock
        self._next = self._reserved = 1
        self._watching: dict[Waiting, list[Asker]] = {}
        self._listing: list[tuple[Asker, str]] = []  # who waits for another list, and of which model
        self._revision = 1
        self._healed = 0.0
        self._prints = Prints()
        self._turns: dict[int, dict[int, int]] = {}  # by session: the leases that it can name, and their versions
        self._away: dict[int, float] = {}  # sessions whose connection broke, and when their leases end

    # ---- publishing ------------------------------------------------------------------------------

    def publish(self, asker: Asker, ask: v.Publish) -> None:
        """Begin a version as soon as its moment is there. Raises what is wrong with it; nothing is begun then."""
        check(ask)
        known = {table: self._desk.table(table) for table in ask.tables}
        twin = self._named(ask.model, ask.name)
        if twin is not None:
            if same(ask, twin.ask):  # asked again over a new connection, or by another worker at the same step
                self._answer_begun(twin, asker)
                return
            raise VersionExists(
                f"{ask.model!r} has a version {ask.name!r} already (number {twin.number}); nothing was published. "
                "Choose another name"
            )
        self._check_names(ask)
        if sum(entry.state in ("waiting", "cutting") for entry in self.entries.values()) >= UNFINISHED:
            raise ClusterError(f"{UNFINISHED} versions are on their way already; nothing was published. Wait for one")
        parent = self.newest(ask.model)
        info = VersionInfo(
            ask.model, self._next, ask.name, parent.number if parent else 0, 0, ask.time,
            tuple(each.spec.name for each in known.values()), 0, "", dict(ask.metadata),
        )  # fmt: skip
        self._count()
        shards = sorted({shard for each in known.values() for shard in each.shards})
        entry = self.entries[info.number] = Entry(info, ask, tuple(shards), since=self._clock(), publishers=[asker])
        self.advance(entry)

    def _count(self) -> None:
        """A number is given out, for good: servers may hold parts under it, whatever becomes of its version."""
        if self._next >= self._reserved:
            self._reserved = self._next + RESERVED
            self._desk.save("versions", msgspec.msgpack.encode(self._reserved))
        self._next += 1

    def _check_names(self, ask: v.Publish) -> None:
        """A name is a version's or a tag's, not both; that of a version that is on its way counts."""
        mine = self.of(ask.model)
        coming = {tag for entry in mine if entry.state in ("waiting", "cutting") for tag in entry.ask.tags}
        tags = coming | {tag for model, tag in self.tags if model == ask.model}
        if ask.name in tags:
            raise UsageError(
                f"{ask.name!r} is a tag of {ask.model!r}; a version needs a name of its own. Nothing was published"
            )
        for tag in ask.tags:
            if self._named(ask.model, tag) is not None:
                raise UsageError(
                    f"{tag!r} is a version of {ask.model!r}; a tag needs a name of its own. Nothing was published"
                )
        if len(tags | set(ask.tags)) > TAGS:
            raise UsageError(f"{ask.model!r} would have more than {TAGS} tags; take some away. Nothing was published")

    def advance(self, entry: Entry | None = None) -> None:
        """Steps have been committed: what has waited for them is cut now, before anything after them is."""
        for each in [entry] if entry is not None else list(self.entries.values()):
            if each.state != "waiting":
                continue
            clocks = [(self._desk.table(table).clock, clock) for table, clock in each.ask.clocks]
            if all(now is None or now >= wanted for now, wanted in clocks):
                each.state = "cutting"
                for shard in each.shards:
                    self._order(each, shard)

    def _order(self, entry: Entry, shard: int) -> None:
        tables = tuple(t for t in entry.ask.tables if shard in self._desk.table(t).shards)
        late = len(entry.begun) == len(entry.shards)
        self._desk.tell(shard, v.CutVersion(entry.number, shard, tables, entry.ask.clocks, late))

    def moved(self, shard: int) -> None:
        """A shard has another primary, which may not know what the one before was told."""
        self._healed = 0.0
        for entry in self.entries.values():
            if entry.state == "cutting" and shard in entry.shards and not entry.holders.get(shard):
                self._order(entry, shard)

    def part(self, done: v.PartDone, *, leads: bool = True) -> None:
        """A server's word about its parts of a version. ``leads``: it is the shard's primary.

        Raises ``ProtocolError`` for what it cannot mean.
        """
        entry = self.entries.get(done.number)
        if entry is None or done.shard not in entry.shards:
            self._desk.drop((done.number,))
            return
        if done.error:  # a backup that has no memory for its copy is no reason to do without the version
            if leads and entry.state == "cutting" and not entry.holders.get(done.shard):
                self._give_up(entry, ClusterError(f"version {entry.info.name!r} was not published: {done.error}"))
            return
        if entry.state == "waiting":
            raise ProtocolError(f"server {done.server} has begun version number {done.number} before it was told to")
        self._check_part(entry, done)
        if entry.state == "cutting" and not leads and all(shard != done.shard for shard, _ in entry.parts):
            entry.early[done.shard, done.server] = done  # it runs ahead of its primary, perhaps into what never was
            return
        entry.pause = max(entry.pause, done.pause)
        if entry.state == "cutting" and done.shard not in entry.begun:
            self._begun(entry, done)
        if done.parts and done.number in self.entries:
            self._holds(entry, done, leads)

    def _check_part(self, entry: Entry, done: v.PartDone) -> None:
        mine = {table for table in entry.ask.tables if done.shard in self._desk.table(table).shards}
        tables = [part.table for part in done.parts]
        sound = all(0 <= part.size < 1 << 63 and 0 <= part.digest < 1 << 64 for part in done.parts)
        clocks = all(table in mine and 0 <= clock < 1 << 63 for table, clock in done.clocks)
        if not sound or not clocks or (tables and sorted(tables) != sorted(mine)) or not 0 <= done.pause < 1e9:
            raise ProtocolError(
                f"server {done.server} says of version number {done.number} what cannot be: its parts on shard "
                f"{done.shard} are of tables {sorted(mine)}"
            )

    def _begun(self, entry: Entry, done: v.PartDone) -> None:
        entry.begun[done.shard] = done.clocks
        if len(entry.begun) < len(entry.shards):
            return
        steps: dict[int, set[int]] = {}
        for table, clock in (each for clocks in entry.begun.values() for each in clocks):
            steps.setdefault(table, set()).add(clock)
        torn = [table for table, found in steps.items() if len(found) > 1 and self._desk.table(table).clock is not None]
        if torn:  # the publisher did not wait, and a step was committed between the shards' moments
            name = self._desk.table(torn[0]).spec.name
            why = f"a step of table {name!r} was committed while the shards began their parts"
            self._give_up(entry, ClusterError(f"version {entry.info.name!r} was not published: {why}. Publish again"))
            return
        step = entry.ask.step
        if step is None:
            step = max((clock for found in steps.values() for clock in found), default=0)
        entry.info = msgspec.structs.replace(entry.info, step=step)
        publishers, entry.publishers = entry.publishers, []
        for asker in publishers:
            self._desk.reply(asker, v.Publishing(entry.number))

    def _holds(self, entry: Entry, done: v.PartDone, leads: bool) -> None:
        for part in done.parts:
            known = entry.parts.setdefault((done.shard, part.table), part)
            if known != part:  # replicas of one shard hold the same bytes, or one of them is broken
                if entry.state != "cutting" or not leads:  # readers have had the other's, or will
                    raise ProtocolError(
                        f"server {done.server} holds other bytes of version number {done.number} than the others do; "
                        "readers are not sent to it"
                    )
                self._give_up(entry, ClusterError(f"two replicas of shard {done.shard} differ in {entry.info.name!r}"))
                return
        agreed = {x.server for x in entry.early.values() if x.shard == done.shard and set(x.parts) == set(done.parts)}
        entry.holders.setdefault(done.shard, set()).update(agreed, {done.server})
        self._held(entry)

    def _held(self, entry: Entry) -> None:
        """A version has one holder more."""
        if entry.state == "lost" and entry.whole:
            entry.state = "ready"
            self._changed(entry.info.model)
        elif entry.state == "cutting" and entry.whole and len(entry.begun) == len(entry.shards):
            self._ready(entry)

    def _ready(self, entry: Entry) -> None:
        digest = xxhash.xxh3_64()
        for key in sorted(entry.parts):
            digest.update(entry.parts[key].digest.to_bytes(8, "little"))
        nbytes = sum(part.size for part in entry.parts.values())
        entry.info = msgspec.structs.replace(entry.info, nbytes=nbytes, digest=digest.hexdigest())
        entry.state = "ready"
        self._save(entry)
        for tag in entry.ask.tags:
            if self.tags.get((entry.info.model, tag), 0) < entry.number:  # a later version may have been ready before
                self._move(entry.info.model, tag, entry.number)
        awaiting, entry.awaiting = entry.awaiting, []
        for asker in awaiting:
            self._desk.reply(asker, v.Found(entry.info, entry.pause))
        self._changed(entry.info.model)
        self.retain()

    def adopt(self, origin: v.Leased, keep: int, session: int, tags: Mapping[str, int]) -> None:
        """A version from elsewhere is here, whole, leased by ``session``, and its model has these tags."""
        parts = {(part.shard, part.table): v.PartDigest(part.table, part.size, part.digest) for part in origin.parts}
        shards = tuple(sorted({shard for shard, _ in parts}))
        ask = v.Publish(origin.info.model, origin.info.name, origin.tables, keep=keep)
        entry = Entry(origin.info, ask, shards, "ready", parts=parts, since=self._clock(), origin=origin)
        entry.holders = {shard: {0} for shard in shards}
        entry.leases[session] += 1
        self.entries[origin.info.number] = entry
        self._retag(origin.info.model, tags)
        self._changed(origin.info.model)
        self.retain()

    def forget(self, number: int) -> Entry:
        """This version, and the tags that mean it, are none of those that there are any more. Its parts stay."""
        entry = self.entries.pop(number)
        self.tags = {tag: to for tag, to in self.tags.items() if to != number}
        self._changed(entry.info.model)
        return entry

    def mirror(self, model: str, tags: Mapping[str, int]) -> None:
        """Let the tags of a model be these."""
        before = self.tags
        self._retag(model, tags)
        if self.tags != before:
            self._changed(model)

    def _retag(self, model: str, tags: Mapping[str, int]) -> None:
        others = {tag: to for tag, to in self.tags.items() if tag[0] != model}
        self.tags = others | {(model, tag): to for tag, to in tags.items()}

    def _give_up(self, entry: Entry, error: HeadwaterError) -> None:
        for asker in [*entry.publishers, *entry.awaiting]:
            self._desk.fail(asker, error)
        self._remove(entry)

    def _answer_begun(self, entry: Entry, asker: Asker) -> None:
        if entry.state in ("waiting", "cutting") and len(entry.begun) < len(entry.shards):
            wait(entry.publishers, asker)
        else:
            self._desk.reply(asker, v.Publishing(entry.number))

    def await_ready(self, asker: Asker, number: int) -> None:
        """Answer when the version can be leased. Raises ``UnknownVersion`` if it never will be."""
        entry = self.entries.get(number)
        if entry is None:
            raise UnknownVersion(
                f"version number {number} is not on its way: it was given up, retired, or the coordinator was "
                "restarted meanwhile. What is published stands; publish again"
            )
        if entry.state in ("waiting", "cutting"):
            wait(entry.awaiting, asker)
        else:
            self._desk.reply(asker, v.Found(entry.info, entry.pause))

    # ---- readers ---------------------------------------------------------------------------------

    def lease(self, asker: Asker, session: int, ask: v.Lease) -> None:
        """Hold a version for a reader. Raises ``UnknownVersion`` or ``VersionExpired``."""
        entry = self.resolve(ask.model, ask.name)
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
        specs = origin.specs if origin is not None else [(t, self._desk.table(t).spec) for t in tables]
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
            entry = self.entries.get(number)
            if turn not in self._turns.get(session, ()) and entry is not None and entry.state in ("ready", "lost"):
                self._grant(session, turn, entry)

    def release(self, session: int, number: int, turn: int = 0) -> None:
        """A lease ends. One that is not there is no fault: it may have timed out."""
        if turn:
            number = self._turns.get(session, {}).pop(turn, 0)
        entry = self.entries.get(number)
        if entry is not None and entry.leases[session]:
            entry.leases[session] -= 1
            if not entry.leases[session]:
                del entry.leases[session]
            self.retain()

    def watch(self, asker: Asker, ask: v.Watch) -> None:
        """Answer when a name or tag means another version than number ``after``; a tag that is not there may come."""
        mine = Waiting(asker.peer, ask)
        if entry := mine.news(self._find(ask.model, ask.name)):
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

    def _revised(self) -> None:
        self._revision += 1
        listing, self._listing = self._listing, []
        for asker, model in listing:
            self.show(asker, v.ListVersions(model))

    def gone(self, peer: int) -> None:
        """Whoever asked over this connection is not there any more."""
        self._listing = [each for each in self._listing if each[0].peer != peer]
        self._watching = {each: askers for each, askers in self._watching.items() if each.peer != peer}
        for entry in self.entries.values():
            entry.publishers = [asker for asker in entry.publishers if asker.peer != peer]
            entry.awaiting = [asker for asker in entry.awaiting if asker.peer != peer]

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
            for entry in self.entries.values():
                entry.leases.pop(session, None)
        for entry in list(self.entries.values()):
            forgotten = entry.state in ("waiting", "cutting") and not entry.publishers and not entry.awaiting
            patience = ABANDONED if len(entry.begun) < len(entry.shards) else COPYING
            if forgotten and self._clock() - entry.since > patience:
                why = f"version {entry.info.name!r} was not published in {patience:.0f} s, and nobody waits for it"
                self._give_up(entry, ClusterError(why))
        if over or any(entry.ask.age is not None for entry in self.entries.values()):
            self.retain()
        self._returned()
        if now >= self._healed + HEAL:
            self._healed = now
            self._heal(now)

    def _heal(self, now: float) -> None:
        """Servers that became copies of a shard after a version was made fetch it from one that has it."""
        for entry in self.entries.values():
            for shard in entry.shards if entry.state == "ready" and now >= entry.since + HEAL else ():
                there = self.where(entry, shard)
                parts = tuple(part for (of, _), part in sorted(entry.parts.items()) if of == shard)
                specs = tuple((part.table, self._desk.table(part.table).spec) for part in parts)
                for server in self._desk.copies(shard) if there else ():
                    if server not in entry.holders[shard]:
                        self._desk.order(server, v.Hold(entry.number, shard, parts, specs, there[0]))

    def only(self, server: int) -> bool:
        """Whether a version would be lost with this server."""
        return any(
            entry.state == "ready" and any(holders == {server} for holders in entry.holders.values())
            for entry in self.entries.values()
        )

    # ---- tags and retention --------------------------------------------------------------------------

    def resolve(self, model: str, name: str) -> Entry:
        """The version that a name or tag means. Raises ``UnknownVersion`` with what there is."""
        entry = self._find(model, name)
        if entry is not None and entry.state in ("ready", "lost"):
            return entry
        if entry is not None:
            raise UnknownVersion(f"version {name!r} of {model!r} is being published; wait for it")
        raise version_status.unknown(self, model, name)

    def set_tag(self, asker: Asker, ask: v.SetTag) -> None:
        """Move a tag. Raises ``UsageError`` or ``UnknownVersion``; it means what it did then."""
        if ask.tag == LATEST:
            raise UsageError(f"the tag {LATEST!r} is always the newest version; it cannot be moved. Choose another tag")
        if not ask.name:
            if (ask.model, ask.tag) not in self.tags:
                raise UnknownVersion(f"{ask.model!r} has no tag {ask.tag!r}")
            self._move(ask.model, ask.tag, None)
        else:
            check_name("tag", ask.tag)
            if self._named(ask.model, ask.tag) is not None:
                raise UsageError(f"{ask.tag!r} is a version of {ask.model!r}; a tag needs a name of its own")
            tags = {tag for model, tag in self.tags if model == ask.model}
            if ask.tag not in tags and len(tags) >= TAGS:
                raise UsageError(f"{ask.model!r} has {TAGS} tags, no more are kept; take one away first")
            self._move(ask.model, ask.tag, self.resolve(ask.model, ask.name).number)
        self._desk.reply(asker, m.Done())
        self._changed(ask.model)
        self.retain()

    def _move(self, model: str, tag: str, number: int | None) -> None:
        if number is None:
            self.tags.pop((model, tag), None)
        else:
            self.tags[model, tag] = number
        mine = {each: to for (of, each), to in self.tags.items() if of == model}
        self._desk.save(f"tags/{model}", msgspec.msgpack.encode(mine) if mine else None)

    def retire(self, asker: Asker, ask: v.Retire) -> None:
        """Let a version go. Raises ``UsageError`` if a tag or a reader holds it."""
        entry = self.resolve(ask.model, ask.name)
        tags = self.tags_of(entry)
        if tags or entry.leases:
            held = f"tag {tags[0]!r}" if tags else f"{sum(entry.leases.values())} leases"
            raise UsageError(f"version {entry.info.name!r} is held by {held}; it was not retired")
        self._remove(entry)
        self._desk.reply(asker, m.Done())
        self._changed(ask.model)

    def retain(self) -> None:
        """Let go of what is neither new, nor tagged, nor leased."""
        for model in {entry.info.model for entry in self.entries.values()}:
            mine = [e for e in self.of(model) if e.state in ("ready", "lost")]
            newest = self.newest(model)
            for place, entry in enumerate(reversed(mine)):
                if entry is newest or entry.leases or self.tags_of(entry):
                    continue
                policy = newest.ask if newest is not None else entry.ask
                old = policy.age is not None and self._clock() - entry.since > policy.age
                if place >= policy.keep or old:
                    self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        ready = entry.state in ("ready", "lost")
        self.entries.pop(entry.number, None)
        self._desk.drop((entry.number,))
        if ready:
            self._desk.save(f"version/{entry.number}", None)
            self._revised()

    def tags_of(self, entry: Entry) -> tuple[str, ...]:
        """The tags that mean a version."""
        return tuple(sorted(tag for (_, tag), number in self.tags.items() if number == entry.number))

    # ---- servers -----------------------------------------------------------------------------------

    def buried(self, server: int) -> None:
        """A server is dead: what only it held is lost, until it is back."""
        for entry in list(self.entries.values()):
            for shard, holders in entry.holders.items():
                if server in holders:
                    holders.discard(server)
                    entry.missed.add((shard, server))
            if entry.state == "ready" and not entry.whole:
                entry.state = "lost"
                self._changed(entry.info.model)

    def _returned(self) -> None:
        """Servers that were only slow, or cut off, hold what they held."""
        for entry in list(self.entries.values()):
            back = {each for each in entry.missed if self._desk.holder(each[1]) is not None}
            if back:
                entry.missed -= back
                for shard, server in back:
                    entry.holders[shard].add(server)
                self._held(entry)

    def status(self, model: str = "") -> tuple[v.VersionStatus, ...]:
        """For ``headwater versions``."""
        return version_status.listed(self, model)

    def models(self) -> tuple[m.ModelStatus, ...]:
        """For ``headwater status``."""
        return version_status.models(self)

    # ---- who is who ----------------------------------------------------------------------------------

    def of(self, model: str) -> list[Entry]:
        """The versions of a model, oldest first."""
        return [entry for number, entry in sorted(self.entries.items()) if entry.info.model == model]

    def _named(self, model: str, name: str) -> Entry | None:
        return next((entry for entry in self.of(model) if entry.info.name == name), None)

    def newest(self, model: str) -> Entry | None:
        """The newest version of a model that is ready."""
        return next((entry for entry in reversed(self.of(model)) if entry.state == "ready"), None)

    def _find(self, model: str, name: str) -> Entry | None:
        if name == LATEST:  # where all are lost, it is one of these, and its holder may be on its way back
            return self.newest(model) or next((e for e in reversed(self.of(model)) if e.state == "lost"), None)
        number = self.tags.get((model, name))
        return self.entries.get(number) if number is not None else self._named(model, name)

    def _changed(self, model: str) -> None:
        """What a name means may be another version now: tell those who wait for it."""
        for each in [each for each in self._watching if each.ask.model == model]:
            if entry := each.news(self._find(model, each.ask.name)):
                for asker in self._watching.pop(each):
                    self._desk.reply(asker, v.Found(entry.info, entry.pause))
        self._revised()

    # ---- what must be durable --------------------------------------------------------------------

    def _save(self, entry: Entry) -> None:
        parts = tuple((shard, part) for (shard, _), part in sorted(entry.parts.items()))
        saved = Saved(entry.info, entry.ask, entry.shards, parts)
        self._desk.save(f"version/{entry.number}", msgspec.msgpack.encode(saved))

    def restore(self, state: Mapping[str, bytes]) -> None:
        """What was ready before a restart; the servers will say what they hold."""
        for key, data in state.items():
            if key.startswith("version/"):
                saved = msgspec.msgpack.decode(data, type=Saved)
                parts = {(shard, part.table): part for shard, part in saved.parts}
                self.entries[saved.info.number] = Entry(
                    saved.info, saved.ask, saved.shards, "lost", parts=parts, since=self._clock()
                )
            elif key.startswith("tags/"):
                for tag, number in msgspec.msgpack.decode(data, type=dict[str, int]).items():
                    self.tags[key[len("tags/") :], tag] = number
        if "versions" in state:
            self._next = msgspec.msgpack.decode(state["versions"], type=int)
        self._next = self._reserved = max([self._next, *(number + 1 for number in self.entries)])
