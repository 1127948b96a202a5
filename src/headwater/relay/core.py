"""A relay as a state machine: frames of readers and events of the other side in; what follows out (``RelayEffects``).

Readers find here what they find at a coordinator and at its servers: leases, watches and lists (``Leases``), and the
parts (``PartStore``). What there is follows the other side (``Mirror``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from headwater.cluster.membership import HEARTBEAT, Membership, given_up
from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, LinkError, ProtocolError, UnknownVersion
from headwater.relay.events import Event, Failed, Fetched, Job, Listed, News, Silent
from headwater.relay.mirror import Mirror
from headwater.relay.orphans import Orphans
from headwater.types import TableSpec
from headwater.versions import listing
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import ASKERS, Entry
from headwater.versions.leases import Leases
from headwater.versions.part_store import PartStore
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Instruction, Outgoing

KEEP = 3  # versions of a model
PAUSE = 0.5  # seconds between two ticks, which come more often, that mean that this process was stopped


class RelayEffects(NamedTuple):
    """What follows from one event. Each list is carried out in its order; no list waits for another.

    frames: for readers.
    orders: for the line to the other side, one after another: a base is released after the fetch that was given it.
    news: for people.
    """

    frames: list[Instruction]
    orders: list[Job | v.Release]
    news: list[News]


class _Waiting(NamedTuple):
    """A reader that wants a lease of what is still to come."""

    asker: Asker
    session: int
    ask: v.Lease
    until: float


class Relay:
    """``me``: where readers find this process. ``upstream``: where its versions come from, for messages.

    ``keep``: the newest versions of each model that are kept; tags and leases hold more.
    """

    def __init__(
        self,
        me: v.Holder,
        part_store: PartStore,
        models: Sequence[str],
        upstream: str,
        keep: int = KEEP,
        now: float = 0.0,
    ) -> None:
        self.part_store = part_store
        self.catalogue = Catalogue()
        self.upstream = upstream
        self.now = self._since = self._ticked = now
        self._me = me
        self._members = Membership()
        self._leases = Leases(self, self.catalogue, 1, lambda: self.now)
        self._orphans = Orphans(self._drop)
        self._mirror = Mirror(self.catalogue, self._leases, part_store, self._orphans, models, upstream, keep, now)
        self._waiting: list[_Waiting] = []
        self._out: list[Instruction] = []

    # ---- from readers ----------------------------------------------------------------------------

    def receive(self, peer: int, frame: Frame, now: float) -> RelayEffects:
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
        return self._effects()

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
                self.part_store.receive(asker.peer, frame)
            case v.Lease():
                self._lease(asker, self._session(asker.peer), message)
            case v.Watch():
                self._session(asker.peer)
                self._mirror.check_model(message.model)
                self._mirror.demand(message.model, message.name)
                self._leases.watch(asker, message)
            case v.ListVersions():
                self._leases.show(asker, message)
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
                self.part_store.receive(peer, frame)
            case _:
                raise ProtocolError(f"{type(notice).__name__} does not go to a relay")

    def closed(self, peer: int, now: float) -> RelayEffects:
        """A connection ended."""
        self.now = now
        self._waiting = [each for each in self._waiting if each.asker.peer != peer]
        self._leases.gone(peer)
        self.part_store.closed(peer)
        self._depart(peer, clean=False)
        return self._effects()

    def tick(self, now: float) -> RelayEffects:
        """Time has passed."""
        gap, self.now, self._ticked = now - self._ticked, now, now
        if gap > PAUSE:  # this process stood still: nobody else was silent for that
            self._members.forgive(gap)
        for member, why in self._members.lost_now(now):
            if (peer := member.peer) is not None:
                self._depart(peer, clean=False)
                self._out.append(Outgoing(peer, Frame(Kind.ERROR, body=m.error_body(given_up(why))), close=True))
        self._waiting = [each for each in self._waiting if now < each.until]
        self._leases.tick(now)
        self._orphans.keep({member.join.session for member in self._members.readers.values()})
        return self._effects()

    def woken(self) -> RelayEffects:
        """A delta has been made."""
        self.part_store.woken()
        return self._effects()

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
        self._leases.joined(join.session)
        self.reply(asker, m.Joined(-1, 0, HEARTBEAT, (), durable=True, relay=True))

    def _depart(self, peer: int, *, clean: bool) -> None:
        member = self._members.of(peer)
        if member is None:
            return
        self._members.depart(member, clean=clean)
        session = member.join.session
        if all(other.join.session != session for other in self._members.readers.values()):  # it is not back already
            self._leases.left(session, self.now, clean=clean)

    def _session(self, peer: int) -> int:
        member = self._members.of(peer)
        if member is None:
            raise ClusterError("join first: only a reader that is a member can lease")
        return member.join.session

    # ---- leases ----------------------------------------------------------------------------------

    def _lease(self, asker: Asker, session: int, ask: v.Lease) -> None:
        """Lease what is here; what is on its way, or would be, is worth as much waiting as the reader has patience."""
        self._mirror.check_model(ask.model)
        try:
            self._leases.lease(asker, session, ask)
        except UnknownVersion:
            if ask.patience <= 0 or not self._mirror.demand(ask.model, ask.name):
                raise
            mine = [each for each in self._waiting if each.asker.peer == asker.peer]
            if len(mine) >= ASKERS:  # given up long ago
                self._waiting.remove(mine[0])
            self._waiting.append(_Waiting(asker, session, ask, self.now + ask.patience))

    def _release(self, session: int, said: v.Release) -> None:
        self._leases.release(session, said.number, said.turn)
        self._orphans.released(session, said.number)

    def _holding(self, session: int, said: v.Holding) -> None:
        self._leases.holding(session, said)
        self._orphans.holds(session, {number for _, number in said.leases})

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            patience = max(0.0, each.until - self.now)
            try:
                self._lease(each.asker, each.session, msgspec.structs.replace(each.ask, patience=patience))
            except HeadwaterError as error:
                self.fail(each.asker, error)

    # ---- from the other side ---------------------------------------------------------------------

    def happened(self, event: Event, now: float) -> RelayEffects:
        """Something came from where the versions come from, or did not."""
        self.now = now
        match event:
            case Listed():
                self._mirror.listed(event.versions, now)
                self._serve_waiting()
            case Silent():
                self._mirror.silent(event.why)
            case Fetched():
                self._fetched(event)
            case Failed():
                self._failed(event)
        return self._effects()

    def _fetched(self, done: Fetched) -> None:
        number = done.leased.info.number
        demanded = self._mirror.fetched(done, self.now)
        self._serve_waiting()
        if demanded:  # whoever has waited for it to be here may want it now
            self._leases.left(-number, self.now, clean=False)
        else:
            self._leases.release(-number, number)

    def _failed(self, failed: Failed) -> None:
        self._mirror.failed(failed, self.now)
        if isinstance(failed.error, LinkError | DeadlineExceeded):  # it may still come
            return
        info = failed.job.info
        for each in [w for w in self._waiting if w.ask.model == info.model and w.ask.name == info.name]:
            self._waiting.remove(each)
            self.fail(each.asker, failed.error)
        self._mirror.give_up(info.number)

    # ---- out -------------------------------------------------------------------------------------

    def status(self) -> m.ClusterStatus:
        """For ``headwater status``."""
        seconds, why = self._mirror.silence(self.now)
        readers = tuple(
            m.WorkerStatus(-1, "reader", member.join.pid, "alive", 0, 0, 0, 0, self.now - member.heard)
            for member in self._members.readers.values()
        )
        relay = m.RelayStatus(self.upstream, seconds, why, self.part_store.nbytes, self.part_store.sent_bytes)
        models = listing.models(self.catalogue)
        return m.ClusterStatus(self.now - self._since, 0, 1, 1, (), (), readers, (), models, relay)

    def _effects(self) -> RelayEffects:
        self._mirror.next(self.now)
        out, self._out = [*self._out, *self.part_store.outbox.frames], []
        self.part_store.outbox.frames.clear()
        return RelayEffects(out, *self._mirror.take())

    def _drop(self, number: int) -> None:
        self.part_store.drop((number,))

    # ---- what leases say and ask -----------------------------------------------------------------

    def reply(self, asker: Asker, message: m.Reply) -> None:
        if isinstance(message, v.VersionList):
            seconds, why = self._mirror.silence(self.now)
            message = msgspec.structs.replace(message, silent=seconds, why=why)
        self._out.append(Outgoing(asker.peer, Frame(Kind.REPLY, seq=asker.seq, body=m.pack(message))))

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        self._out.append(Outgoing(asker.peer, Frame(Kind.ERROR, seq=asker.seq, body=m.error_body(error))))

    def removed(self, entry: Entry) -> None:
        self._drop(entry.number)

    def spec(self, table: int) -> TableSpec:
        return self._mirror.specs[table]

    def holder(self, server: int) -> v.Holder | None:
        return self._me
