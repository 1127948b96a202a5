"""The clients of one shard at its primary: frames ↔ events, shared memory, staging."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from headwater.errors import ClusterError, HeadwaterError, ProtocolError
from headwater.layout.dense import Block
from headwater.server import events as e
from headwater.server.replication.state import view
from headwater.server.shard import Shard
from headwater.transports import memory
from headwater.types import DenseSpec
from headwater.wire import messages as m
from headwater.wire.frames import MAX_BODY, Flag, Frame, Kind, seal
from headwater.wire.outgoing import Outgoing
from headwater.wire.tensors import to_bytes

ROOM = 4096  # bytes that a record of slots is larger than the request
SLOT_PART = 4 << 20  # bytes of optimizer state per reply


class Kept(NamedTuple):
    """The values of one table here, and the descriptors to share them."""

    spec: DenseSpec
    blocks: tuple[Block, ...]
    values: torch.Tensor
    view: memoryview
    versions: memoryview | None
    fds: tuple[int, ...]
    limit: int  # bytes of the largest block: no payload is longer


class _Link:
    """What is known of one connection."""

    def __init__(self) -> None:
        self.session: int | None = None
        self.asked = 0  # the request that opens the session
        self.shared: dict[int, memory.Region] = {}  # by table: the client's gradients
        self.scratch = torch.empty(0, dtype=torch.uint8, device="cpu")  # for a payload that is used at once
        self.landed: dict[int, torch.Tensor] = {}  # by id of the frame: payloads that are not used yet


class Clients:
    """``kept`` is the node's memory by table. ``run`` hands an event to the shard and what follows to ``take``."""

    def __init__(
        self, shard: Shard, kept: dict[int, Kept], run: Callable[[e.Event], list[Outgoing]], checked: bool
    ) -> None:
        self.shard = shard
        self.pushed_bytes = self.pulled_bytes = 0
        self._kept = kept
        self._run = run
        self._checked = checked
        self._links: dict[int, _Link] = {}
        self._peers: dict[int, int] = {}  # session -> peer

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def peers(self) -> list[int]:
        return list(self._links)

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where the payload that follows this header belongs. Raises before anything is allocated by its word."""
        kept = self._kept.get(frame.table)
        link = self._links.get(peer)
        session = self.shard.sessions.get(link.session) if link is not None and link.session is not None else None
        if link is None or session is None or kept is None or frame.kind not in (Kind.PUSH, Kind.ASSIGN):
            raise ProtocolError(f"{frame.kind.name} for table {frame.table} before a session was opened on it")
        end = frame.start + frame.length
        if end > kept.values.numel() or frame.length > kept.limit:
            raise ProtocolError(
                f"{frame.kind.name} of bytes {frame.start}:{end}, but the table has {kept.values.numel()} here "
                f"in blocks of at most {kept.limit}; nothing was allocated"
            )
        if frame.kind == Kind.PUSH:
            if frame.table in link.shared:
                raise ProtocolError(f"bytes for table {frame.table}, whose gradients this client shares")
            again = frame.seq <= session.seq.get(frame.table, 0)  # a duplicate must not touch what is pending
            eager = self.shard.table(frame.table).eager  # each is a record, which the next one must not overwrite
            if not again and not eager and session.rank >= 0:  # the shard refuses a reader's, with a word
                return view(self.shard.staging(session.number, frame.table)[frame.start : end])
        # One receive call may complete several small frames before the first is acted on: each lands apart.
        target = link.scratch
        if link.landed:
            target = torch.empty(frame.length, dtype=torch.uint8, device="cpu")
        elif target.numel() < frame.length:
            target = link.scratch = torch.empty(kept.limit, dtype=torch.uint8, device="cpu")
        link.landed[id(frame)] = target[: frame.length]
        return view(link.landed[id(frame)])

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...] = ()) -> list[Outgoing]:
        """A complete frame from a client; ``fds`` are closed in any case."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = _Link()
        payload = link.landed.pop(id(frame), None)
        try:
            if frame.kind == Kind.PUSH:
                return self._push(link, frame, payload)
            if frame.kind == Kind.PULL:
                return self._pull(link, frame)
            if frame.kind == Kind.ASSIGN:
                return self._assign(link, frame, payload)
            if frame.kind == Kind.REQUEST:
                return self._request(peer, link, frame, m.unpack_request(frame.body), fds)
            raise ProtocolError(f"{frame.kind.name} does not go to a server")
        except HeadwaterError as error:
            fatal = isinstance(error, ProtocolError)
            reply = Frame(Kind.ERROR, table=frame.table, seq=frame.seq, clock=frame.clock, body=m.error_body(error))
            return [Outgoing(peer, reply, close=fatal)]
        finally:
            if fds:
                memory.close_all(fds)

    def closed(self, peer: int) -> list[Outgoing]:
        """A client's connection ended; its session goes on if it comes back."""
        link = self._links.pop(peer, None)
        if link is None or link.session is None or self._peers.get(link.session) != peer:
            return []
        del self._peers[link.session]
        return self._run(e.Closed(link.session))

    def dismiss(self, error: HeadwaterError) -> list[Outgoing]:
        """This server is not the primary any more: every client looks for the new one."""
        body = m.error_body(error)
        out = [Outgoing(peer, Frame(Kind.ERROR, shard=self.shard.number, body=body), close=True) for peer in self.peers]
        self._links.clear()
        self._peers.clear()
        return out

    # ---- requests --------------------------------------------------------------------------------

    def _request(
        self, peer: int, link: _Link, frame: Frame, request: m.Request, fds: tuple[int, ...]
    ) -> list[Outgoing]:
        match request:
            case m.Open():
                return self._open(peer, link, frame, request)
            case m.Attach():
                return self._attach(peer, link, frame, request, fds)
            case m.Slots():
                return self._slots(peer, frame, request.table)
            case m.SlotPart():
                if len(frame.body) > MAX_BODY - ROOM:
                    raise ProtocolError(f"{len(frame.body)} bytes of slots do not fit into one record; nothing was set")
                session = self._session(link)
                return self._run(e.AssignSlots(session, frame.seq, request.table, request.slots, request.reset))
            case m.Aside():
                return self._run(e.Aside(self._session(link), frame.seq, request.table, request.away))
            case _:
                raise ProtocolError(f"{type(request).__name__} does not go to a server")

    def _open(self, peer: int, link: _Link, frame: Frame, request: m.Open) -> list[Outgoing]:
        if request.shard != self.shard.number:
            raise ProtocolError(f"shard {request.shard} is not here, this is shard {self.shard.number}")
        if not 0 <= request.session < 1 << 63 or request.rank < -1:
            raise ProtocolError(f"session {request.session} of rank {request.rank} is out of range")
        if link.session is not None:
            raise ProtocolError(f"this connection has opened session {link.session:016x} already")
        event = e.Opened(request.session, request.rank, request.members)
        self.shard.check_open(event)  # before the connection that it has now is closed
        out: list[Outgoing] = []
        old = self._peers.get(request.session)
        if old is not None:  # it lost that connection before we did
            moved = m.error_body(ClusterError("the session has moved to another connection"))
            out.append(Outgoing(old, Frame(Kind.ERROR, body=moved), close=True))
            self._links.pop(old, None)
        link.session, link.asked = request.session, frame.seq
        self._peers[request.session] = peer
        return out + self._run(event)

    def seated(self, event: e.Seated) -> list[Outgoing]:
        """The session is in the log: say so."""
        peer = self._peers.get(event.session)
        if peer is None:
            return []
        reply = m.Opened(self.shard.epoch, self.shard.lsn)
        return [Outgoing(peer, Frame(Kind.REPLY, seq=self._links[peer].asked, body=m.pack(reply)))]

    def done(self, event: e.Done) -> list[Outgoing]:
        """A request was carried out, or refused."""
        if event.error is None:
            return self._to(event.session, Frame(Kind.REPLY, seq=event.request, body=m.pack(m.Done())))
        return self._to(event.session, Frame(Kind.ERROR, seq=event.request, body=m.error_body(event.error)))

    def _attach(self, peer: int, link: _Link, frame: Frame, request: m.Attach, fds: tuple[int, ...]) -> list[Outgoing]:
        session = self._session(link)
        table = self.shard.table(request.table)
        kept = self._kept[request.table]
        shared: torch.Tensor | None = None
        give: tuple[int, ...] = ()
        if request.shared:
            if len(fds) != 1 or not kept.fds:
                raise ProtocolError("shared memory was asked for without a descriptor, or this server shares none")
            memory.verify(fds[0], request.size)
            if request.size < max((b.start + b.size for b in kept.blocks), default=0):
                raise ProtocolError(f"gradient memory of {request.size} bytes is smaller than table {request.table}")
            region = memory.Region([memory.Piece(fds[0], b.start, b.size) for b in kept.blocks], writable=False)
            link.shared[request.table] = region
            shared, give = torch.frombuffer(region.buffer, dtype=torch.uint8)[: region.size], kept.fds
        if not 1 <= request.base < 1 << 62:
            raise ProtocolError(f"pushes from {request.base} on are out of range")
        out = self._run(e.Attached(session, request.table, shared, request.base))
        clock = table.gathering.clock if table.collective else min(table.clocks.clock.values(), default=0)
        done = self.shard.session(session).done.get(request.table, 0)
        reply = m.Attached(self.shard.lsn, clock, kept.values.numel(), done, self.shard.members.epoch)
        return [*out, Outgoing(peer, Frame(Kind.REPLY, seq=frame.seq, body=m.pack(reply)), give)]

    def _slots(self, peer: int, frame: Frame, number: int) -> list[Outgoing]:
        """The optimizer state, in parts of a few MB."""
        out: list[Outgoing] = []
        part: list[m.Slot] = []
        size = 0

        def reply(more: bool) -> None:
            body = m.pack(m.SlotPart(number, tuple(part), more))
            out.append(Outgoing(peer, Frame(Kind.REPLY, seq=frame.seq, body=body)))

        for parameter, name, start, tensor in self.shard.table(number).dense.read_slots():
            flat = tensor.reshape(-1)
            rows = max(1, SLOT_PART // flat.element_size())
            whole = flat.numel() <= rows
            for at in range(0, max(1, flat.numel()), rows):
                piece = tensor if whole else flat[at : at + rows]
                data, dtype = to_bytes(piece)
                part.append(m.Slot(parameter, name, start + at, tuple(piece.shape), dtype, data))
                size += len(data)
                if size >= SLOT_PART:
                    reply(True)
                    part, size = [], 0
        reply(False)
        return out

    def _session(self, link: _Link) -> int:
        if link.session is None:
            raise ProtocolError("a session must be opened first")
        return link.session

    # ---- data ------------------------------------------------------------------------------------

    def _push(self, link: _Link, frame: Frame, payload: torch.Tensor | None) -> list[Outgoing]:
        session = self._session(link)
        table = self.shard.tables.get(frame.table)
        body = m.unpack(frame.body, m.StepBody) if frame.body else None
        gradient, base, transient = None, 0, False
        if table is not None and table.eager and frame.length:
            if payload is not None:
                gradient, base, transient = payload, frame.start, True
            else:
                known = self.shard.sessions.get(session)
                gradient = known.gradients.get(frame.table) if known is not None else None
                if gradient is None:
                    raise ProtocolError(f"shared push to table {frame.table} without shared memory")
        self.pushed_bytes += frame.length
        return self._run(
            e.Push(
                session, frame.seq, frame.epoch, frame.members, frame.table, frame.clock, frame.start, frame.length,
                frame.flags, gradient, base, body, transient,
            )
        )  # fmt: skip

    def _pull(self, link: _Link, frame: Frame) -> list[Outgoing]:
        session = self._session(link)
        if frame.flags & Flag.MEAN:
            past = bool(frame.flags & Flag.END)
            return self._run(e.AskMean(session, frame.seq, frame.members, frame.table, frame.clock, past))
        return self._run(e.Pull(session, frame.seq, frame.table, frame.clock, frame.start, frame.length))

    def _assign(self, link: _Link, frame: Frame, payload: torch.Tensor | None) -> list[Outgoing]:
        if frame.flags & Flag.SHARED or (frame.length and payload is None):
            raise ProtocolError("an assignment needs its bytes behind it; values are not shared for writing")
        data = link.scratch[:0] if payload is None else payload
        last = bool(frame.flags & Flag.END)
        clock = frame.clock if frame.flags & Flag.WROTE else 0
        session = self._session(link)
        return self._run(e.Assign(session, frame.seq, frame.table, frame.start, data, last, clock, frame.members))

    # ---- instructions ----------------------------------------------------------------------------

    def ack(self, a: e.Ack) -> list[Outgoing]:
        flags = (Flag.END if a.step else 0) | (Flag.SKIP if a.skipped else 0)
        said = a.note if a.norm is None else msgspec.structs.replace(a.note or m.AckBody(), norm=a.norm)
        body = b"" if said is None else m.pack(said)
        self._count_live(a)
        return self._to(
            a.session,
            Frame(
                Kind.ACK, flags, self.shard.number, a.table, a.session, self.shard.epoch, a.seq, a.lsn, a.clock,
                start=a.staleness, members=self.shard.members.epoch, body=body,
            ),
        )  # fmt: skip

    def _count_live(self, a: e.Ack) -> None:
        """Values that a client maps are fresh without a byte moved; they count as pulled, as a doorbell as pushed."""
        peer = self._peers.get(a.session)
        table = self.shard.tables.get(a.table)
        if a.step and table is not None and peer is not None and a.table in self._links[peer].shared:
            self.pulled_bytes += 0 if table.spec.sync.reads_own_memory else table.size

    def fail(self, f: e.Fail) -> list[Outgoing]:
        body = m.pack(m.ErrorBody(f.code, f.message))
        frame = Frame(
            Kind.ERROR, 0, self.shard.number, f.table, f.session, self.shard.epoch, f.seq, self.shard.lsn, f.clock,
            members=self.shard.members.epoch, body=body,
        )  # fmt: skip
        return self._to(f.session, frame, close=f.code == "ProtocolError")

    def send(self, s: e.Send) -> list[Outgoing]:
        """Values: a grant where the client maps them, else one DATA frame per block."""
        peer = self._peers.get(s.session)
        kept = self._kept.get(s.table)
        if peer is None or kept is None:
            return []
        self.pulled_bytes += s.length
        if s.table in self._links[peer].shared:
            return self._to(s.session, self._data(s, Flag.SHARED | Flag.END, s.start, s.length))
        out: list[Outgoing] = []
        stop = s.start + s.length
        for block in kept.blocks:
            start, end = max(s.start, block.local), min(stop, block.local + block.size)
            if start < end:
                frame = self._data(s, Flag.END if end == stop else Flag.NONE, start, end - start)
                frame.payload = kept.view[start:end]
                if self._checked:
                    seal(frame)
                out += self._to(s.session, frame)
        return out if s.length else self._to(s.session, self._data(s, Flag.END, s.start, 0))

    def send_mean(self, s: e.SendMean) -> list[Outgoing]:
        """The aggregate of a step under way: bytes, on every transport."""
        kept = self._kept.get(s.table)
        if kept is None:
            return []
        raw, body = view(s.mean), m.pack(m.MeanBody(s.ranges))
        frames = [
            Frame(
                Kind.DATA, Flag.MEAN, self.shard.number, s.table, s.session, self.shard.epoch, s.seq, self.shard.lsn,
                s.clock, block.local, block.size, payload=raw[block.local : block.local + block.size],
            ) for block in kept.blocks
        ] or [Frame(Kind.DATA, Flag.MEAN, table=s.table, seq=s.seq, clock=s.clock)]  # fmt: skip
        frames[0].body = body
        frames[-1].flags |= Flag.END
        if self._checked:
            for frame in frames:
                seal(frame)
        return [out for frame in frames for out in self._to(s.session, frame)]

    def _data(self, s: e.Send, flags: int, start: int, length: int) -> Frame:
        return Frame(
            Kind.DATA, flags, self.shard.number, s.table, s.session, self.shard.epoch, s.request, self.shard.lsn,
            s.clock, start, length, members=s.staleness,
        )  # fmt: skip

    def _to(self, session: int, frame: Frame, close: bool = False) -> list[Outgoing]:
        peer = self._peers.get(session)
        return [] if peer is None else [Outgoing(peer, frame, close=close)]

    def drop(self, table: int, start: int, stop: int) -> None:
        """A step has read these gradients: stay resident with one worker's, however many there are."""
        regions = [link.shared[table] for link in self._links.values() if table in link.shared]
        for region in regions[1:]:
            region.drop(start, stop)
