"""A server without its sockets: frames in, frames out, and the memory that its shard's tables live in.

Translates between the wire and the shard. The loop (and the in-process transport) owns the I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from headwater.cluster.coordinator import decide
from headwater.cluster.placement import BLOCK, PAGE, Block, layout
from headwater.errors import HeadwaterError, NotEnoughMemory, ProtocolError
from headwater.server import COORDINATOR
from headwater.server import events as e
from headwater.server.shard import Shard
from headwater.server.tables.dense import state_bytes
from headwater.transports import memory
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind, Outgoing, checksum
from headwater.wire.tensors import to_bytes

SLOT_PART = 4 << 20  # bytes of optimizer state per reply


class _Memory(NamedTuple):
    """The values of one table here, and the descriptors to share them."""

    spec: TableSpec
    blocks: tuple[Block, ...]
    values: torch.Tensor
    view: memoryview
    versions: memoryview | None
    fds: tuple[int, ...]
    limit: int  # bytes of the largest block: no payload is longer


class _Link:
    """What the node knows of one connection."""

    def __init__(self) -> None:
        self.session: int | None = None
        self.shared: dict[int, memory.Region] = {}  # by table: the client's gradients
        self.scratch = torch.empty(0, dtype=torch.uint8)  # for a payload that is used at once
        self.landed: dict[int, torch.Tensor] = {}  # by id of the frame: payloads that are not used yet


def _unlimited() -> int:
    return 1 << 62


class Node:
    """One server process, or one of several in a single process.

    ``share``: keep values in memfds so that clients of this host can map them. ``available`` tells the bytes
    of memory that may still be taken. ``detach(table, ranges)`` is called before values are overwritten.
    """

    def __init__(
        self,
        shard: int,
        shards: int,
        epoch: int,
        *,
        share: bool = False,
        checked: bool = False,
        available: Callable[[], int] = _unlimited,
        detach: Callable[[int, tuple[tuple[int, int], ...]], None] = lambda table, ranges: None,
    ) -> None:
        self.shard = Shard(shard, epoch, detach)
        self.shards = shards
        self.pushed_bytes = self.pulled_bytes = 0
        self._share = share
        self._checked = checked
        self._available = available
        self._memory: dict[int, _Memory] = {}
        self._links: dict[int, _Link] = {}
        self._peers: dict[int, int] = {}  # session -> peer
        self._out: list[Outgoing] = []

    # ---- from the loop -------------------------------------------------------------------------

    def landing(self, peer: int, frame: Frame) -> memoryview:
        """Where the payload that follows this header belongs. Raises before anything is allocated by its word."""
        kept = self._memory.get(frame.table)
        link = self._links.get(peer)
        if link is None or link.session is None or kept is None:
            raise ProtocolError(f"{frame.kind.name} for table {frame.table} before a session was opened on it")
        end = frame.start + frame.length
        limit = kept.limit
        if end > kept.values.numel() or frame.length > limit:
            raise ProtocolError(
                f"{frame.kind.name} of bytes {frame.start}:{end}, but the table has {kept.values.numel()} here "
                f"in blocks of at most {limit}; nothing was allocated"
            )
        if frame.kind == Kind.PUSH and frame.table in link.shared:
            raise ProtocolError(f"bytes for table {frame.table}, whose gradients this client shares")
        again = frame.seq <= self.shard.sessions[link.session].seq  # a duplicate must not touch what is pending
        if frame.kind == Kind.PUSH and not again and not self.shard.table(frame.table).eager:
            return _view(self.shard.staging(link.session, frame.table)[frame.start : end])
        # One receive call may complete several small frames before the first is acted on: each lands apart.
        target = link.scratch
        if link.landed:
            target = torch.empty(frame.length, dtype=torch.uint8)
        elif target.numel() < frame.length:
            target = link.scratch = torch.empty(limit, dtype=torch.uint8)
        link.landed[id(frame)] = target[: frame.length]
        return _view(link.landed[id(frame)])

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...] = ()) -> list[Outgoing]:
        """A complete frame from a client; ``fds`` are closed in any case."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = _Link()
        payload = link.landed.pop(id(frame), None)
        try:
            if frame.kind == Kind.PUSH:
                self._push(link, frame, payload)
            elif frame.kind == Kind.PULL:
                self._run(e.Pull(self._session(link), frame.seq, frame.table, frame.clock, frame.start, frame.length))
            elif frame.kind == Kind.ASSIGN:
                self._assign(link, frame, payload)
            elif frame.kind == Kind.REQUEST:
                self._request(peer, link, frame, m.unpack_request(frame.body), fds)
            else:
                raise ProtocolError(f"{frame.kind.name} does not go to a server")
        except HeadwaterError as error:
            fatal = isinstance(error, ProtocolError)
            reply = Frame(Kind.ERROR, table=frame.table, seq=frame.seq, clock=frame.clock, body=m.error_body(error))
            self._out.append(Outgoing(peer, reply, close=fatal))
        finally:
            if fds:
                memory.close_all(fds)
        return self._flush()

    def coordinator(self, frame: Frame) -> list[Outgoing]:
        """A frame from the coordinator."""
        if frame.kind == Kind.NOTICE:
            message = m.unpack_notice(frame.body)
            if isinstance(message, m.Commit | m.Members):
                self._run(message)
            elif isinstance(message, m.Drop):
                self._forget(message.table)
        elif frame.kind == Kind.REQUEST:
            self._create_or_refuse(frame)
        return self._flush()

    def closed(self, peer: int) -> list[Outgoing]:
        """A client's connection ended. Its session's unfinished pushes are dropped with it."""
        link = self._links.pop(peer, None)
        if link is not None and link.session is not None:
            self._peers.pop(link.session, None)
            self._run(e.Closed(link.session))
        return self._flush()

    def heartbeat(self) -> m.Heartbeat:
        shard = self.shard
        clocks = tuple(
            (number, max(t.gathering.clock, max(t.clocks.clock.values(), default=0)))
            for number, t in shard.tables.items()
        )
        nbytes = sum(table.dense.nbytes for table in shard.tables.values())
        return m.Heartbeat(
            pushed_bytes=self.pushed_bytes, pulled_bytes=self.pulled_bytes, lsn=shard.lsn, nbytes=nbytes,
            sessions=len(self._peers), tables=clocks,
        )  # fmt: skip

    # ---- requests --------------------------------------------------------------------------------

    def _request(self, peer: int, link: _Link, frame: Frame, request: m.Request, fds: tuple[int, ...]) -> None:
        match request:
            case m.Open():
                self._open(peer, link, frame, request)
            case m.Attach():
                self._attach(peer, link, frame, request, fds)
            case m.Slots():
                self._slots(peer, frame, request.table)
            case m.SlotPart():
                session = self._session(link)
                self._run(e.AssignSlots(session, frame.seq, request.table, request.slots, request.reset))
                self._reply(peer, frame, m.Done())
            case _:
                raise ProtocolError(f"{type(request).__name__} does not go to a server")

    def _open(self, peer: int, link: _Link, frame: Frame, request: m.Open) -> None:
        if request.shard != self.shard.number:
            raise ProtocolError(f"shard {request.shard} is not here, this server has shard {self.shard.number}")
        if not 0 <= request.session < 1 << 63 or request.rank < -1:
            raise ProtocolError(f"session {request.session} of rank {request.rank} is out of range")
        if request.session in self._peers or link.session is not None:
            raise ProtocolError(f"session {request.session:016x} is open already")
        link.session = request.session
        self._peers[request.session] = peer
        self._run(e.Opened(request.session, request.rank))
        self._reply(peer, frame, m.Opened(self.shard.sessions[request.session].seq))

    def _attach(self, peer: int, link: _Link, frame: Frame, request: m.Attach, fds: tuple[int, ...]) -> None:
        session = self._session(link)
        table = self.shard.table(request.table)
        kept = self._memory[request.table]
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
        self._run(e.Attached(session, request.table, shared))
        clock = table.gathering.clock if table.bulk else min(table.clocks.clock.values(), default=0)
        reply = m.Attached(self.shard.lsn, clock, kept.values.numel())
        self._reply(peer, frame, reply, give)

    def _slots(self, peer: int, frame: Frame, number: int) -> None:
        """The optimizer state, in parts of a few MB."""
        part: list[m.Slot] = []
        size = 0
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
                    self._reply(peer, frame, m.SlotPart(number, tuple(part), True))
                    part, size = [], 0
        self._reply(peer, frame, m.SlotPart(number, tuple(part), False))

    def _session(self, link: _Link) -> int:
        if link.session is None:
            raise ProtocolError("a session must be opened first")
        return link.session

    # ---- data ------------------------------------------------------------------------------------

    def _push(self, link: _Link, frame: Frame, payload: torch.Tensor | None) -> None:
        session = self._session(link)
        table = self.shard.tables.get(frame.table)
        body = m.unpack(frame.body, m.StepBody) if frame.body else None
        gradient, base = None, 0
        if table is not None and table.eager and frame.length:
            if frame.flags & Flag.SHARED:
                gradient = self.shard.sessions[session].gradients.get(frame.table)
                if gradient is None:
                    raise ProtocolError(f"shared push to table {frame.table} without shared memory")
            else:
                gradient, base = payload, frame.start
        self.pushed_bytes += frame.length
        self._run(
            e.Push(
                session, frame.seq, frame.epoch, frame.members, frame.table, frame.clock, frame.start, frame.length,
                frame.flags, gradient, base, body,
            )
        )  # fmt: skip

    def _assign(self, link: _Link, frame: Frame, payload: torch.Tensor | None) -> None:
        if frame.flags & Flag.SHARED or (frame.length and payload is None):
            raise ProtocolError("an assignment needs its bytes behind it; values are not shared for writing")
        data = link.scratch[:0] if payload is None else payload
        last = bool(frame.flags & Flag.END)
        self._run(e.Assign(self._session(link), frame.seq, frame.table, frame.start, data, last))

    # ---- tables ------------------------------------------------------------------------------------

    def _create_or_refuse(self, frame: Frame) -> None:
        request = m.unpack_request(frame.body)
        if not isinstance(request, m.Create):
            raise ProtocolError(f"the coordinator asked for {type(request).__name__}")
        try:
            reply: m.Reply = m.Created(request.table, self._create(request.table, request.spec))
            out = Frame(Kind.REPLY, seq=frame.seq, body=m.pack(reply))
        except HeadwaterError as error:
            self._forget(request.table)
            out = Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(error))
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where memory is refused
            self._forget(request.table)
            refusal = NotEnoughMemory(f"table {request.spec.name!r}: {error}; it was not created")
            out = Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(refusal))
        self._out.append(Outgoing(COORDINATOR, out))

    def _create(self, number: int, spec: TableSpec) -> int:
        plan = layout(spec, self.shards)
        segments = plan.segments[self.shard.number]
        size = plan.sizes[self.shard.number]
        needed, free = state_bytes(spec, segments), self._available()
        if needed > free:
            raise NotEnoughMemory(
                f"table {spec.name!r} takes {needed / 2**20:.0f} MiB on shard {self.shard.number} "
                f"(values, optimizer state, one gradient), {free / 2**20:.0f} MiB are free; it was not created"
            )
        kept = self._allocate(spec, plan.blocks_of(self.shard.number), size)
        self._memory[number] = kept
        alone = len(plan.participants) == 1
        self._run(e.Created(number, spec, segments, kept.values, alone, kept.versions))
        self.shard.tables[number].dense.after_block = lambda start, stop: self._drop(number, start, stop)
        return self.shard.tables[number].dense.nbytes

    def _forget(self, number: int) -> None:
        """The table does not come about: give its memory back."""
        kept = self._memory.pop(number, None)
        if kept is not None:
            memory.close_all(kept.fds)
        self.shard.tables.pop(number, None)

    def _drop(self, table: int, start: int, stop: int) -> None:
        """A step has read these gradients: stay resident with one worker's, however many there are."""
        regions = [link.shared[table] for link in self._links.values() if table in link.shared]
        for region in regions[1:]:
            region.drop(start, stop)

    def _allocate(self, spec: TableSpec, blocks: tuple[Block, ...], size: int) -> _Memory:
        limit = max((block.size for block in blocks), default=0)
        if not self._share:
            values = torch.zeros(size, dtype=torch.uint8)
            return _Memory(spec, blocks, values, _view(values), None, (), limit)
        count = -(-size // BLOCK)
        fd = memory.create(spec.name[:64], size)
        marks = memory.create(f"{spec.name[:64]}.versions", -(-count * 8 // PAGE) * PAGE)
        region = memory.Region([memory.Piece(fd, 0, size)])
        versions = memory.Region([memory.Piece(marks, 0, -(-count * 8 // PAGE) * PAGE)])
        values = torch.frombuffer(region.buffer, dtype=torch.uint8)[:size]
        return _Memory(spec, blocks, values, region.view, versions.view[: count * 8].cast("Q"), (fd, marks), limit)

    # ---- instructions -------------------------------------------------------------------------------

    def _run(self, event: e.Event) -> None:
        for instruction in self.shard.handle(event):
            if isinstance(instruction, e.Ack):
                self._ack(instruction)
            elif isinstance(instruction, e.Send):
                self._send(instruction)
            elif isinstance(instruction, e.Fail):
                self._fail(instruction)
            else:
                self._ready(instruction)

    def _ready(self, ready: m.Ready) -> None:
        table = self.shard.tables[ready.table]
        if table.alone:  # nobody else to agree with
            self._run(decide(table.spec, [ready]))
        else:
            self._out.append(Outgoing(COORDINATOR, Frame(Kind.NOTICE, body=m.pack(ready))))

    def _ack(self, a: e.Ack) -> None:
        flags = (Flag.END if a.step else 0) | (Flag.SKIP if a.skipped else 0)
        body = b"" if a.norm is None else m.pack(m.AckBody(a.norm))
        self._count_live(a)
        self._to(
            a.session,
            Frame(
                Kind.ACK, flags, self.shard.number, a.table, a.session, self.shard.epoch, a.seq, a.lsn, a.clock,
                start=a.staleness, members=self.shard.members_epoch, body=body,
            ),
        )  # fmt: skip

    def _count_live(self, a: e.Ack) -> None:
        """Values that a client maps are fresh without a byte moved; they count as pulled, as a doorbell as pushed."""
        peer = self._peers.get(a.session)
        table = self.shard.tables.get(a.table)
        if a.step and table is not None and table.bulk and peer is not None and a.table in self._links[peer].shared:
            self.pulled_bytes += table.size

    def _fail(self, f: e.Fail) -> None:
        body = m.pack(m.ErrorBody(f.code, f.message))
        frame = Frame(
            Kind.ERROR, 0, self.shard.number, f.table, f.session, self.shard.epoch, f.seq, self.shard.lsn, f.clock,
            members=self.shard.members_epoch, body=body,
        )  # fmt: skip
        self._to(f.session, frame, close=f.code == "ProtocolError")

    def _send(self, s: e.Send) -> None:
        """Values: a grant where the client maps them, else one DATA frame per block."""
        peer = self._peers.get(s.session)
        if peer is None:
            return
        kept = self._memory[s.table]
        if s.table in self._links[peer].shared:
            self.pulled_bytes += s.length
            self._to(s.session, self._data(s, Flag.SHARED | Flag.END, s.start, s.length))
            return
        self.pulled_bytes += s.length
        stop = s.start + s.length
        for block in kept.blocks:
            start, end = max(s.start, block.local), min(stop, block.local + block.size)
            if start < end:
                frame = self._data(s, Flag.END if end == stop else Flag.NONE, start, end - start)
                frame.payload = kept.view[start:end]
                if self._checked:
                    frame.flags |= Flag.CHECKED
                    frame.check = checksum(frame.payload)
                self._to(s.session, frame)
        if not s.length:
            self._to(s.session, self._data(s, Flag.END, s.start, 0))

    def _data(self, s: e.Send, flags: int, start: int, length: int) -> Frame:
        return Frame(
            Kind.DATA, flags, self.shard.number, s.table, s.session, self.shard.epoch, s.request, s.lsn, s.clock,
            start, length, members=s.staleness,
        )  # fmt: skip

    def _to(self, session: int, frame: Frame, close: bool = False) -> None:
        peer = self._peers.get(session)
        if peer is not None:
            self._out.append(Outgoing(peer, frame, close=close))

    def _reply(self, peer: int, frame: Frame, message: m.Reply, fds: tuple[int, ...] = ()) -> None:
        self._out.append(Outgoing(peer, Frame(Kind.REPLY, seq=frame.seq, body=m.pack(message)), fds))

    def _flush(self) -> list[Outgoing]:
        out, self._out = self._out, []
        return out


def _view(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
