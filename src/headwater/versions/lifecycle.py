"""How a version comes to be and who holds it, as a state machine. No sockets, no clock. Only the coordinator has one.

A version is *waiting* (a step that it wants is not committed yet) → *cutting* (every shard begins and makes its part) →
*ready* (each part is held by somebody; readers may lease it) → gone: retired by count or age when no tag means it and
nobody leases it, or *lost* when the last holder of a part died. Tags are names that move; ``latest`` is always the
newest ready version and cannot be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import msgspec
import xxhash

from headwater.errors import (
    ClusterError,
    HeadwaterError,
    ProtocolError,
    UnknownVersion,
    UsageError,
    VersionExists,
)
from headwater.types import TableSpec, VersionInfo
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import LATEST, TAGS, Entry, Saved, check, check_name, same, saved, wait
from headwater.versions.leases import Leases
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker

HEAL = 5.0  # seconds between two looks for servers that should hold a part and do not
UNFINISHED = 16  # versions of one cluster that are on their way; more are refused
RESERVED = 64  # numbers that are taken at a time: to keep each would be a wait for the disk with every version
ABANDONED = 30.0  # seconds after which a version that nobody waits for and that has not begun is given up
COPYING = 900.0  # the same for one that has


class Known(NamedTuple):
    """A table as it concerns versions. ``clock``: its last committed step, None where only its shard knows."""

    spec: TableSpec
    shards: tuple[int, ...]
    clock: int | None


class LifecycleDesk(Protocol):
    """Whom ``Lifecycle`` speaks through, and whom it asks. What is saved is durable before what follows is sent."""

    def save(self, key: str, value: bytes | None) -> None: ...
    def reply(self, asker: Asker, message: m.Reply) -> None: ...
    def fail(self, asker: Asker, error: HeadwaterError) -> None: ...
    def tell(self, shard: int, message: v.CutVersion) -> None: ...
    def drop(self, numbers: tuple[int, ...]) -> None: ...
    def order(self, server: int, message: v.Hold) -> None: ...
    def table(self, number: int) -> Known: ...
    def holder(self, server: int) -> v.Holder | None: ...
    def copies(self, shard: int) -> tuple[int, ...]: ...


class Lifecycle:
    """The way into a catalogue, its tags, and who holds what is in it.

    ``clock``: seconds, of which only differences mean anything.
    """

    def __init__(self, desk: LifecycleDesk, catalogue: Catalogue, leases: Leases, clock: Callable[[], float]) -> None:
        self._desk = desk
        self._catalogue = catalogue
        self._leases = leases
        self._clock = clock
        self._next = self._reserved = 1
        self._healed = 0.0

    # ---- from the wish to the moment --------------------------------------------------------------

    def publish(self, asker: Asker, ask: v.Publish) -> None:
        """Begin a version as soon as its moment is there. Raises what is wrong with it; nothing is begun then."""
        check(ask)
        known = {table: self._desk.table(table) for table in ask.tables}
        twin = self._catalogue.named(ask.model, ask.name)
        if twin is not None:
            if same(ask, twin.ask):  # asked again over a new connection, or by another worker at the same step
                self._answer_begun(twin, asker)
                return
            raise VersionExists(
                f"{ask.model!r} has a version {ask.name!r} already (number {twin.number}); nothing was published. "
                "Choose another name"
            )
        self._catalogue.check_names(ask)
        if sum(entry.state in ("waiting", "cutting") for entry in self._catalogue.entries.values()) >= UNFINISHED:
            raise ClusterError(f"{UNFINISHED} versions are on their way already; nothing was published. Wait for one")
        parent = self._catalogue.newest(ask.model)
        info = VersionInfo(
            ask.model, self._next, ask.name, parent.number if parent else 0, 0, ask.time,
            tuple(each.spec.name for each in known.values()), 0, "", dict(ask.metadata),
        )  # fmt: skip
        self._count()
        shards = sorted({shard for each in known.values() for shard in each.shards})
        entry = self._catalogue.entries[info.number] = Entry(
            info, ask, tuple(shards), since=self._clock(), publishers=[asker]
        )
        self.advance(entry)

    def _count(self) -> None:
        """A number is given out, for good: servers may hold parts under it, whatever becomes of its version."""
        if self._next >= self._reserved:
            self._reserved = self._next + RESERVED
            self._desk.save("versions", msgspec.msgpack.encode(self._reserved))
        self._next += 1

    def advance(self, entry: Entry | None = None) -> None:
        """Steps have been committed: what has waited for them is cut now, before anything after them is."""
        for each in [entry] if entry is not None else list(self._catalogue.entries.values()):
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
        for entry in self._catalogue.entries.values():
            if entry.state == "cutting" and shard in entry.shards and not entry.holders.get(shard):
                self._order(entry, shard)

    def part(self, done: v.PartDone, *, leads: bool = True) -> None:
        """A server's word about its parts of a version. ``leads``: it is the shard's primary.

        Raises ``ProtocolError`` for what it cannot mean.
        """
        entry = self._catalogue.entries.get(done.number)
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
            entry.early[done.shard, done.server] = done  # before its primary: a backup's record may be rolled back
            return
        entry.pause = max(entry.pause, done.pause)
        if entry.state == "cutting" and done.shard not in entry.begun:
            self._begun(entry, done)
        if done.parts and done.number in self._catalogue.entries:
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
            self._leases.changed(entry.info.model)
        elif entry.state == "cutting" and entry.whole and len(entry.begun) == len(entry.shards):
            self._ready(entry)

    def _ready(self, entry: Entry) -> None:
        digest = xxhash.xxh3_64()
        for key in sorted(entry.parts):
            digest.update(entry.parts[key].digest.to_bytes(8, "little"))
        nbytes = sum(part.size for part in entry.parts.values())
        entry.info = msgspec.structs.replace(entry.info, nbytes=nbytes, digest=digest.hexdigest())
        entry.state = "ready"
        self._desk.save(f"version/{entry.number}", saved(entry))
        for tag in entry.ask.tags:
            if self._catalogue.tags.get((entry.info.model, tag), 0) < entry.number:  # a later one may have been ready
                self._move(entry.info.model, tag, entry.number)
        awaiting, entry.awaiting = entry.awaiting, []
        for asker in awaiting:
            self._desk.reply(asker, v.Found(entry.info, entry.pause))
        self._leases.changed(entry.info.model)
        self._leases.retain()

    def _give_up(self, entry: Entry, error: HeadwaterError) -> None:
        for asker in [*entry.publishers, *entry.awaiting]:
            self._desk.fail(asker, error)
        self._leases.remove(entry)

    def _answer_begun(self, entry: Entry, asker: Asker) -> None:
        if entry.state in ("waiting", "cutting") and len(entry.begun) < len(entry.shards):
            wait(entry.publishers, asker)
        else:
            self._desk.reply(asker, v.Publishing(entry.number))

    def await_ready(self, asker: Asker, number: int) -> None:
        """Answer when the version can be leased. Raises ``UnknownVersion`` if it never will be."""
        entry = self._catalogue.entries.get(number)
        if entry is None:
            raise UnknownVersion(
                f"version number {number} is not on its way: it was given up, retired, or the coordinator was "
                "restarted meanwhile. What is published stands; publish again"
            )
        if entry.state in ("waiting", "cutting"):
            wait(entry.awaiting, asker)
        else:
            self._desk.reply(asker, v.Found(entry.info, entry.pause))

    def gone(self, peer: int) -> None:
        """Whoever asked over this connection is not there any more."""
        for entry in self._catalogue.entries.values():
            entry.publishers = [asker for asker in entry.publishers if asker.peer != peer]
            entry.awaiting = [asker for asker in entry.awaiting if asker.peer != peer]

    def tick(self, now: float) -> None:
        """Time has passed: what nobody waits for is given up, servers are back, copies are missing."""
        for entry in list(self._catalogue.entries.values()):
            forgotten = entry.state in ("waiting", "cutting") and not entry.publishers and not entry.awaiting
            patience = ABANDONED if len(entry.begun) < len(entry.shards) else COPYING
            if forgotten and self._clock() - entry.since > patience:
                why = f"version {entry.info.name!r} was not published in {patience:.0f} s, and nobody waits for it"
                self._give_up(entry, ClusterError(why))
        self._returned()
        if now >= self._healed + HEAL:
            self._healed = now
            self._heal(now)

    # ---- tags and retirement -------------------------------------------------------------------------

    def set_tag(self, asker: Asker, ask: v.SetTag) -> None:
        """Move a tag. Raises ``UsageError`` or ``UnknownVersion``; it means what it did then."""
        if ask.tag == LATEST:
            raise UsageError(f"the tag {LATEST!r} is always the newest version; it cannot be moved. Choose another tag")
        if not ask.name:
            if (ask.model, ask.tag) not in self._catalogue.tags:
                raise UnknownVersion(f"{ask.model!r} has no tag {ask.tag!r}")
            self._move(ask.model, ask.tag, None)
        else:
            check_name("tag", ask.tag)
            if self._catalogue.named(ask.model, ask.tag) is not None:
                raise UsageError(f"{ask.tag!r} is a version of {ask.model!r}; a tag needs a name of its own")
            tags = self._catalogue.tagged(ask.model)
            if ask.tag not in tags and len(tags) >= TAGS:
                raise UsageError(f"{ask.model!r} has {TAGS} tags, no more are kept; take one away first")
            self._move(ask.model, ask.tag, self._catalogue.resolve(ask.model, ask.name).number)
        self._desk.reply(asker, m.Done())
        self._leases.changed(ask.model)
        self._leases.retain()

    def _move(self, model: str, tag: str, number: int | None) -> None:
        if number is None:
            self._catalogue.tags.pop((model, tag), None)
        else:
            self._catalogue.tags[model, tag] = number
        mine = self._catalogue.tagged(model)
        self._desk.save(f"tags/{model}", msgspec.msgpack.encode(mine) if mine else None)

    def retire(self, asker: Asker, ask: v.Retire) -> None:
        """Let a version go. Raises ``UsageError`` if a tag or a reader holds it."""
        entry = self._catalogue.resolve(ask.model, ask.name)
        tags = self._catalogue.tags_of(entry)
        if tags or entry.leases:
            held = f"tag {tags[0]!r}" if tags else f"{sum(entry.leases.values())} leases"
            raise UsageError(f"version {entry.info.name!r} is held by {held}; it was not retired")
        self._leases.remove(entry)
        self._desk.reply(asker, m.Done())
        self._leases.changed(ask.model)

    # ---- who holds it --------------------------------------------------------------------------------

    def buried(self, server: int) -> None:
        """A server is dead: what only it held is lost, until it is back."""
        for entry in list(self._catalogue.entries.values()):
            for shard, holders in entry.holders.items():
                if server in holders:
                    holders.discard(server)
                    entry.missed.add((shard, server))
            if entry.state == "ready" and not entry.whole:
                entry.state = "lost"
                self._leases.changed(entry.info.model)

    def _returned(self) -> None:
        """Servers that were only slow, or cut off, hold what they held."""
        for entry in list(self._catalogue.entries.values()):
            back = {each for each in entry.missed if self._desk.holder(each[1]) is not None}
            if back:
                entry.missed -= back
                for shard, server in back:
                    entry.holders[shard].add(server)
                self._held(entry)

    def _heal(self, now: float) -> None:
        """Servers that became copies of a shard after a version was made fetch it from one that has it."""
        for entry in self._catalogue.entries.values():
            for shard in entry.shards if entry.state == "ready" and now >= entry.since + HEAL else ():
                there = self._leases.where(entry, shard)
                parts = tuple(part for (of, _), part in sorted(entry.parts.items()) if of == shard)
                specs = tuple((part.table, self._desk.table(part.table).spec) for part in parts)
                for server in self._desk.copies(shard) if there else ():
                    if server not in entry.holders[shard]:
                        self._desk.order(server, v.Hold(entry.number, shard, parts, specs, there[0]))

    def only(self, server: int) -> bool:
        """Whether a version would be lost with this server."""
        return any(
            entry.state == "ready" and any(holders == {server} for holders in entry.holders.values())
            for entry in self._catalogue.entries.values()
        )

    # ---- what must be durable ------------------------------------------------------------------------

    def restore(self, state: Mapping[str, bytes]) -> None:
        """What was ready before a restart; the servers will say what they hold."""
        for key, data in state.items():
            if key.startswith("version/"):
                kept = msgspec.msgpack.decode(data, type=Saved)
                parts = {(shard, part.table): part for shard, part in kept.parts}
                self._catalogue.entries[kept.info.number] = Entry(
                    kept.info, kept.ask, kept.shards, "lost", parts=parts, since=self._clock()
                )
            elif key.startswith("tags/"):
                for tag, number in msgspec.msgpack.decode(data, type=dict[str, int]).items():
                    self._catalogue.tags[key[len("tags/") :], tag] = number
        if "versions" in state:
            self._next = msgspec.msgpack.decode(state["versions"], type=int)
        self._next = self._reserved = max([self._next, *(number + 1 for number in self._catalogue.entries)])
