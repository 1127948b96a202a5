"""A relay as a state machine: frames of readers and events of the other side in, frames and jobs out.

Readers find here what they find at a coordinator and at its servers: leases, watches and lists (``Versions``), and the
parts (``Shelf``). What there is follows the other side's list: its tags, its newest version of each model, and what a
reader asks for by name. What the other side has no more goes, as soon as what it has instead is here; if it lists no
version of a model at all, or does not answer, what is here stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from headwater.cluster.entries import ASKERS, LATEST, Entry
from headwater.cluster.membership import HEARTBEAT, Membership, given_up
from headwater.cluster.versions import Known, Versions
from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, LinkError, ProtocolError, UnknownVersion
from headwater.layout.kinds import spans
from headwater.relay.words import Back, Base, Event, Failed, Fetched, Job, Listed, News, Silent, Taken, Trouble, same
from headwater.server.versions.shelf import Key, Shelf
from headwater.types import TableSpec, VersionInfo
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Instruction, Outgoing

KEEP = 3  # versions of a model
AGAIN = 0.5  # seconds until a version that did not come is asked for again; twice as long each time
SELDOM = 10.0  # seconds at most
PAUSE = 0.5  # seconds between two ticks, which come more often, that mean that this process was stopped


class _Waiting(NamedTuple):
    """A reader that wants a lease of what is still to come."""

    asker: Asker
    session: int
    ask: v.Lease
    until: float


@dataclass(slots=True)
class _Rest:
    """A version that did not come ``attempts`` times; not again before ``until``."""

    attempts: int
    until: float


class Relay:
    """``me``: where readers find this process. ``upstream``: where its versions come from, for messages.

    ``keep``: the newest versions of each model that are kept; tags and leases hold more.
    """

    def __init__(
        self, me: v.Holder, shelf: Shelf, models: Sequence[str], upstream: str, keep: int = KEEP, now: float = 0.0
    ) -> None:
        self.shelf = shelf
        self.versions = Versions(self, 1, lambda: self.now)
        self.upstream = upstream
        self.now = self._since = self._heard = self._ticked = now
        self._me = me
        self._models = list(dict.fromkeys(models))  # whose turn it is comes first
        self._keep = keep
        self._members = Membership()
        self._theirs: dict[int, v.VersionStatus] = {}  # what the other side has
        self._listened = False  # whether it has ever said what it has
        self._why = ""  # it does not answer
        self._behind = (0.0, "")  # it is a relay that hears nothing itself: for how long, and why
        self._demanded: set[int] = set()  # versions that readers asked for by name
        self._orphans: dict[int, Entry] = {}  # leased here, and not to be leased again
        self._waiting: list[_Waiting] = []
        self._job: Job | None = None
        self._rests: dict[int, _Rest] = {}
        self._bases: dict[str, int] = {}  # by model: what is leased on the other side
        self._specs: dict[int, TableSpec] = {}
        self._out: list[Instruction] = []
        self._orders: list[Job | v.Release] = []
        self._news: list[News] = []
        self._trouble = ""

    # ---- from readers ----------------------------------------------------------------------------

    def receive(self, peer: int, frame: Frame, now: float) -> list[Instruction]:
        """A frame of a reader. A refusal goes back as ERROR. Raises ``ProtocolError``: then the connection ends."""
        self.now = now
        asker = Asker(peer, frame.seq)
        try:
            if frame.kind == Kind.REQUEST:
                self._request(asker, frame, m.unpack_request(frame.body))
            elif frame.kind == Kind.NOTICE:
                self._notice(peer, frame, m.unpack_notice(frame.body) if frame.body else None)
            else:
                raise ProtocolError(f"{frame.kind.name} does not go to a relay")
        except ProtocolError:
            raise
        except HeadwaterError as error:
            self.fail(asker, error)
        return self._flush()

    def _request(self, asker: Asker, frame: Frame, message: m.Request) -> None:
        match message:
            case m.Join():
                self._join(asker, message)
            case m.Leave():
                self._depart(asker.peer, clean=True)
                self.reply(asker, m.Done())
            case m.Status():
                self.reply(asker, self.status())
            case v.Fetch():
                self._out += self.shelf.receive(asker.peer, frame)
            case v.Lease():
                self._lease(asker, self._session(asker.peer), message)
            case v.Watch():
                self._session(asker.peer)
                self._follows(message.model)
                self._demand(message.model, message.name)
                self.versions.watch(asker, message)
            case v.ListVersions():
                self.versions.show(asker, message)
            case _:
                raise ClusterError(
                    f"{type(message).__name__} does not go to a relay, which only hands versions out; nothing was "
                    f"changed. Ask the cluster's coordinator; the versions here come from {self.upstream}"
                )

    def _notice(self, peer: int, frame: Frame, notice: m.Notice | None) -> None:
        match notice:
            case m.Heartbeat():
                self._members.heard(peer, notice, self.now)
            case v.Release() | v.Holding():
                member = self._members.of(peer)
                if member is not None and isinstance(notice, v.Release):
                    self._release(member.join.session, notice)
                elif member is not None and isinstance(notice, v.Holding):
                    self._holding(member.join.session, notice)
            case v.Unmap() | None:
                self._out += self.shelf.receive(peer, frame)
            case _:
                raise ProtocolError(f"{type(notice).__name__} does not go to a relay")

    def closed(self, peer: int, now: float) -> list[Instruction]:
        """A connection ended."""
        self.now = now
        self._waiting = [each for each in self._waiting if each.asker.peer != peer]
        self.versions.gone(peer)
        self.shelf.closed(peer)
        self._depart(peer, clean=False)
        return self._flush()

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        gap, self.now, self._ticked = now - self._ticked, now, now
        if gap > PAUSE:  # this process stood still: nobody else was silent for that
            self._members.forgive(gap)
        for member, why in self._members.lost_now(now):
            if (peer := member.peer) is not None:
                self._depart(peer, clean=False)
                self._out.append(Outgoing(peer, Frame(Kind.ERROR, body=m.error_body(given_up(why))), close=True))
        self._waiting = [each for each in self._waiting if now < each.until]
        self.versions.tick(now)
        sessions = {member.join.session for member in self._members.readers.values()}
        for number, orphan in list(self._orphans.items()):
            if not sessions & set(orphan.leases):
                self._bury(number)
        return self._flush()

    def woken(self) -> list[Instruction]:
        """A delta has been made."""
        self._out += self.shelf.woken()
        return self._flush()

    # ---- who is there ----------------------------------------------------------------------------

    def _join(self, asker: Asker, join: m.Join) -> None:
        if join.role != "reader":
            raise ClusterError(
                f"this is a relay: it has no tables, and a {join.role} has no use for it. Connect to the cluster's "
                f"coordinator; the versions here come from {self.upstream}"
            )
        if self._members.holds(asker.peer):
            raise ClusterError("this connection has joined already")
        self._members.admit(asker.peer, join, self.now)
        self.versions.joined(join.session)
        self.reply(asker, m.Joined(-1, 0, HEARTBEAT, (), durable=True, relay=True))

    def _depart(self, peer: int, *, clean: bool) -> None:
        member = self._members.of(peer)
        if member is None:
            return
        self._members.depart(member, clean=clean)
        session = member.join.session
        if all(other.join.session != session for other in self._members.readers.values()):  # it is not back already
            self.versions.left(session, self.now, clean=clean)

    def _session(self, peer: int) -> int:
        member = self._members.of(peer)
        if member is None:
            raise ClusterError("join first: only a reader that is a member can lease")
        return member.join.session

    # ---- leases ----------------------------------------------------------------------------------

    def _lease(self, asker: Asker, session: int, ask: v.Lease) -> None:
        """Lease what is here; what is on its way, or would be, is worth as much waiting as the reader has patience."""
        self._follows(ask.model)
        try:
            self.versions.lease(asker, session, ask)
        except UnknownVersion:
            if ask.patience <= 0 or not self._demand(ask.model, ask.name):
                raise
            mine = [each for each in self._waiting if each.asker.peer == asker.peer]
            if len(mine) >= ASKERS:  # given up long ago
                self._waiting.remove(mine[0])
            self._waiting.append(_Waiting(asker, session, ask, self.now + ask.patience))

    def _release(self, session: int, said: v.Release) -> None:
        self.versions.release(session, said.number, said.turn)
        orphan = self._orphans.get(said.number)
        if orphan is not None and orphan.leases[session]:
            orphan.leases[session] -= 1
            if not orphan.leases.total():
                self._bury(said.number)

    def _holding(self, session: int, said: v.Holding) -> None:
        self.versions.holding(session, said)
        held = {number for _, number in said.leases}
        for number in [number for number in self._orphans if number not in held]:
            self._orphans[number].leases.pop(session, None)
            if not self._orphans[number].leases.total():
                self._bury(number)

    def _follows(self, model: str) -> None:
        if model not in self._models:
            models = ", ".join(map(repr, sorted(self._models)))
            raise UnknownVersion(f"this relay follows {models}, and not {model!r}; start it with --model {model}")

    def _demand(self, model: str, name: str) -> bool:
        """Whether a version that is not here is to come. Raises ``ClusterError`` where there is no place for it."""
        try:
            self.versions.resolve(model, name)
        except UnknownVersion:
            pass
        else:
            return False
        mine = [each for each in self._theirs.values() if each.info.model == model and each.state == "ready"]
        if not self._listened or any(name in (LATEST, *each.tags) for each in mine):  # it comes by itself
            return True
        found = next((each.info for each in mine if each.info.name == name), None)
        if found is None:
            return False
        held = [e for e in self.versions.entries.values() if e.info.model == model and (e.leases or self._tags(e))]
        if found.number not in self._demanded and len(held) >= self._keep:
            raise ClusterError(
                f"version {name!r} of {model!r} is not here, and there is no place for it: {len(held)} versions are "
                f"held by tags and leases, and this relay keeps {self._keep} (--keep). Lease it from {self.upstream}"
            )
        self._demanded.add(found.number)
        return True

    def _tags(self, entry: Entry) -> list[str]:
        return [tag for (model, tag), number in self.versions.tags.items() if number == entry.number]

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            patience = max(0.0, each.until - self.now)
            try:
                self._lease(each.asker, each.session, msgspec.structs.replace(each.ask, patience=patience))
            except HeadwaterError as error:
                self.fail(each.asker, error)

    # ---- from the other side ---------------------------------------------------------------------

    def happened(self, event: Event, now: float) -> list[Instruction]:
        """Something came from where the versions come from, or did not."""
        self.now = now
        match event:
            case Listed():
                self._listed(event.versions)
            case Silent():
                if not self._why:
                    self._news.append(Trouble(f"{self.upstream} does not answer: {event.why}. What is here is served"))
                self._why = event.why
            case Fetched():
                self._fetched(event)
            case Failed():
                self._failed(event)
        return self._flush()

    def _listed(self, listed: v.VersionList) -> None:
        if self._why:
            self._news.append(Back(self.now - self._heard))
        self._listened = True
        self._heard, self._why, self._behind = self.now, "", (listed.silent, listed.why)
        self._theirs = {
            each.info.number: each
            for each in listed.versions
            if each.info.model in self._models and each.state in ("ready", "lost")
        }
        self._demanded &= set(self._theirs)
        self._rests = {number: rest for number, rest in self._rests.items() if number in self._theirs}
        self._mirror()
        self._serve_waiting()

    def _mirror(self) -> None:
        """Let there be here what there is on the other side, as far as it has come."""
        for model in self._models:
            theirs = [each for each in self._theirs.values() if each.info.model == model]
            ready = [each.info.number for each in theirs if each.state == "ready"]
            if not ready:  # a cluster that has just begun: what is here is better than nothing
                continue
            self.versions.mirror(model, self._mirrored(model))
            current = not self._wanted(model)
            for number in [e.number for e in self.versions.entries.values() if e.info.model == model]:
                newer = number > max(ready) and self._here(max(ready))
                if not self._here(number) and (current or newer):
                    self._forget(number)
        self.versions.retain()

    def _mirrored(self, model: str, arriving: VersionInfo | None = None) -> dict[str, int]:
        """The other side's tags: those of versions that are here, or ``arriving``; others mean what they meant."""
        theirs = [each for each in self._theirs.values() if each.info.model == model]
        if all(each.state != "ready" for each in theirs):  # a cluster that has just begun
            return {tag: number for (of, tag), number in self.versions.tags.items() if of == model}
        tags = {}
        for each in theirs:
            for tag in each.tags:
                here = self._here(each.info.number) or (arriving is not None and same(arriving, each.info))
                meant = each.info.number if here else self.versions.tags.get((model, tag))
                if tag != LATEST and meant is not None:
                    tags[tag] = meant
        return tags

    def _here(self, number: int) -> bool:
        """Whether the other side's version of this number is here."""
        entry, theirs = self.versions.entries.get(number), self._theirs.get(number)
        return entry is not None and theirs is not None and same(entry.info, theirs.info)

    def _wanted(self, model: str) -> list[int]:
        """What has to come, the most urgent first."""
        mine = [each for each in self._theirs.values() if each.info.model == model and each.state == "ready"]
        demanded = [each.info.number for each in mine if each.info.number in self._demanded]
        tagged = [each.info.number for each in mine if set(each.tags) - {LATEST}]
        newest = [max(each.info.number for each in mine)] if mine else []
        begins = not any(self._here(each.info.number) for each in mine)  # then "latest" must not mean an old one first
        wanted = [*newest, *demanded, *tagged] if begins else [*demanded, *tagged, *newest]
        return [number for number in wanted if not self._here(number)]

    def _forget(self, number: int) -> None:
        """The other side has this version no more. Who leases it may still be fetching it."""
        entry = self.versions.forget(number)
        if entry.leases:
            self._orphans[number] = entry
        else:
            self.drop((number,))

    def _bury(self, number: int) -> None:
        self._orphans.pop(number)
        self.drop((number,))

    # ---- fetching --------------------------------------------------------------------------------

    def _next(self) -> None:
        """Have the next version fetched: one at a time, the models take turns."""
        for model in self._models if self._job is None and not self._why else ():
            for number in self._wanted(model):
                rest = self._rests.get(number)
                if rest is not None and self.now < rest.until:
                    continue
                self._job = Job(self._theirs[number].info, self._candidates(model), rest.attempts if rest else 0)
                self._orders.append(self._job)
                self._models.remove(model)
                self._models.append(model)
                return

    def _candidates(self, model: str) -> tuple[Base, ...]:
        """Versions of a model that are here and there."""
        found = []
        for entry in self.versions.entries.values():
            if entry.info.model == model and self._here(entry.number):
                rooms = {
                    (key.shard, key.table): held.room
                    for key, held in self.shelf.parts.items()
                    if key.number == entry.number
                }
                found.append(Base(entry.number, rooms, tuple(room.lend() for room in rooms.values())))
        return tuple(found)

    def _fetched(self, done: Fetched) -> None:
        info = done.leased.info
        self._job = None
        self._trouble = ""
        self._rests.pop(info.number, None)
        if info.number in self._orphans:
            self._bury(info.number)
        if info.number in self.versions.entries:  # of another cluster
            self.versions.forget(info.number)
            self.drop((info.number,))
        self._put(done)
        hold = -info.number  # nobody's session: until it is known who wants it
        self.versions.adopt(done.leased, self._keep, hold, self._mirrored(info.model, info))
        demanded = info.number in self._demanded
        self._demanded.discard(info.number)
        self._mirror()
        self._lease_base(info.model, info.number)
        self._serve_waiting()
        if demanded:  # whoever has waited for it to be here may want it now
            self.versions.left(hold, self.now, clean=False)
        else:
            self.versions.release(hold, info.number)
        ways = {part.delta is None for part in done.parts.values()}
        way = "mixed" if len(ways) > 1 else "whole" if True in ways else "delta"
        self._news.append(Taken(info, done.nbytes, way, done.seconds))

    def _put(self, done: Fetched) -> None:
        specs = dict(done.leased.specs)
        self._specs |= specs
        for (shard, table), got in done.parts.items():
            words = spans(specs[table], done.leased.shards, shard, got.at.size)
            deltas = {} if got.delta is None else {done.base: got.delta}
            self.shelf.put(Key(done.leased.info.number, shard, table), got.room, got.sums, words, deltas)

    def _lease_base(self, model: str, number: int) -> None:
        """The other side keeps what the next delta is made from: the newest version that is here."""
        newest = max((e.number for e in self.versions.entries.values() if e.info.model == model), default=0)
        before = self._bases.get(model)
        if newest != number:
            self._orders.append(v.Release(number))
        elif before != number:
            self._bases[model] = number
            if before is not None:
                self._orders.append(v.Release(before))

    def _failed(self, failed: Failed) -> None:
        self._job = None
        info = failed.job.info
        attempts = failed.job.attempt + 1
        self._rests[info.number] = _Rest(attempts, self.now + min(SELDOM, AGAIN * 2 ** (attempts - 1)))
        if str(failed.error) != self._trouble:
            self._trouble = str(failed.error)
            self._news.append(Trouble(f"version {info.name!r} of {info.model!r} did not come: {failed.error}"))
        if isinstance(failed.error, LinkError | DeadlineExceeded):  # it may still come
            return
        for each in [w for w in self._waiting if w.ask.model == info.model and w.ask.name == info.name]:
            self._waiting.remove(each)
            self.fail(each.asker, failed.error)
        self._demanded.discard(info.number)

    # ---- out -------------------------------------------------------------------------------------

    def orders(self) -> list[Job | v.Release]:
        """What the line to the other side has to do, once."""
        orders, self._orders = self._orders, []
        return orders

    def news(self) -> list[News]:
        """What there is to tell, once."""
        news, self._news = self._news, []
        return news

    def silence(self) -> tuple[float, str]:
        """Seconds since the cluster was last heard of, if it is silent, and why; 0 while it is heard."""
        age, why = self._behind
        if self._why:
            return max(self.now - self._heard, 1e-3) + age, self._why
        return (age + self.now - self._heard if age else 0.0), why

    def status(self) -> m.ClusterStatus:
        """For ``headwater status``."""
        seconds, why = self.silence()
        readers = tuple(
            m.WorkerStatus(-1, "reader", member.join.pid, "alive", 0, 0, 0, 0, self.now - member.heard)
            for member in self._members.readers.values()
        )
        relay = m.RelayStatus(self.upstream, seconds, why, self.shelf.nbytes, self.shelf.sent_bytes)
        return m.ClusterStatus(
            self.now - self._since, 0, 1, 1, (), (), readers, (), self.versions.models(), relay
        )  # fmt: skip

    def _flush(self) -> list[Instruction]:
        self._next()
        out, self._out = self._out, []
        return out

    # ---- what Versions asks of its desk --------------------------------------------------------------

    def reply(self, asker: Asker, message: m.Reply) -> None:
        if isinstance(message, v.VersionList):
            seconds, why = self.silence()
            message = msgspec.structs.replace(message, silent=seconds, why=why)
        self._out.append(Outgoing(asker.peer, Frame(Kind.REPLY, seq=asker.seq, body=m.pack(message))))

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        self._out.append(Outgoing(asker.peer, Frame(Kind.ERROR, seq=asker.seq, body=m.error_body(error))))

    def drop(self, numbers: tuple[int, ...]) -> None:
        self._out += self.shelf.drop(numbers)

    def holder(self, server: int) -> v.Holder | None:
        return self._me

    def table(self, number: int) -> Known:
        return Known(self._specs[number], (), None)

    def save(self, key: str, value: bytes | None) -> None:
        """Nothing here is durable."""

    def tell(self, shard: int, message: v.CutVersion) -> None:
        """Nothing is published here."""

    def copies(self, shard: int) -> tuple[int, ...]:
        return ()

    def order(self, server: int, message: v.Hold) -> None:
        """There are no servers."""
