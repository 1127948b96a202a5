"""The clients of one shard at its primary: frames become events, what the shard answers becomes frames.

Shared memory and staging: where the bytes of a push land. Nothing here decides; see ``node.ClientPeer`` for who asks.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import torch

from headwater.errors import ClusterError, HeadwaterError, ProtocolError
from headwater.server import events as e
from headwater.server.effects import Effects
from headwater.server.replication.state import view
from headwater.server.shard import Shard
from headwater.transports import memory
from headwater.wire import messages as m
from headwater.wire.frames import MAX_BODY, Flag, Frame, Kind, seal
from headwater.wire.outgoing import Outgoing
from headwater.wire.tensors import to_bytes

ROOM = 4096  # bytes that a record of slots is larger than the request
SLOT_PART = 4 << 20  # bytes of optimizer state per reply


class ClientLink:
    """What is known of one connection."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.session: int | None = None
        self.asked = 0  # the request that opens the session
        self.shared: dict[int, memory.Region] = {}  # by table: the client's gradients
        self.scratch = torch.empty(0, dtype=torch.uint8, device="cpu")  # for a payload that is used at once
        self.landed: dict[int, torch.Tensor] = {}  # by id of the frame: payloads that are not used yet


class Clients:
    """``links``: the connections, by peer. A method for each kind of frame that comes, and for each that goes."""

    def __init__(self, shard: Shard, effects: Effects, checked: bool) -> None:
        self.shard = shard
        self.pushed_bytes = self.pulled_bytes = 0
        self.refused: Counter[int] = Counter()  # pushes, by session
        self.links: dict[int, ClientLink] = {}
        self._replica = shard.replica
        self._effects = effects
        self._checked = checked
        self._of_session: dict[int, ClientLink] = {}

    def __len__(self) -> int:
        return len(self._of_session)

    def connected(self, peer: int) -> ClientLink:
        """A client has said its first word over this connection."""
        link = self.links[peer] = ClientLink(peer)
        return link

    def landing(self, link: ClientLink, frame: Frame) -> memoryview:
        """Where the payload that follows this header belongs. Raises before anything is allocated by its word."""
        table = self.shard.tables.get(frame.table)
        session = self.shard.sessions.get(link.session) if link.session is not None else None
        if frame.kind == Kind.PULL and (table is None or not table.store.key_limit):
            raise ProtocolError(f"PULL with keys from table {frame.table}, which has none; nothing was allocated")
        if session is None or table is None or frame.kind not in (Kind.PUSH, Kind.ASSIGN, Kind.PULL):
            raise ProtocolError(f"{frame.kind.name} for table {frame.table} before a session was opened on it")
        end, length, limit = frame.stop, frame.payload_length, table.store.limit
        if frame.kind == Kind.PULL:
            return self._keys_landing(link, frame, table.store.key_limit)
        if end > table.size or length > limit or end - frame.start != length:
            raise ProtocolError(
                f"{frame.kind.name} of bytes {frame.start}:{end} with a payload of {length}, but the table has "
                f"{table.size} here in blocks of at most {limit}; nothing was allocated"
            )
        if frame.kind == Kind.PUSH:
            if frame.table in link.shared:
                raise ProtocolError(f"bytes for table {frame.table}, whose gradients this client shares")
            again = frame.seq <= session.seq.get(frame.table, 0)  # a duplicate must not touch what is pending
            # An eager table's pushes are each a record, which the next one must not overwrite.
            if not again and not table.eager and session.rank >= 0:  # the shard refuses a reader's, with a word
                return view(self.shard.staging(session.number, frame.table)[frame.start : end])
        # One receive call may complete several small frames before the first is acted on: each lands apart.
        target = link.scratch
        if link.landed:
            target = torch.empty(length, dtype=torch.uint8, device="cpu")
        elif target.numel() < length:
            target = link.scratch = torch.empty(limit, dtype=torch.uint8, device="cpu")
        link.landed[id(frame)] = target[:length]
        return view(link.landed[id(frame)])

    def _keys_landing(self, link: ClientLink, frame: Frame, limit: int) -> memoryview:
        length = frame.payload_length
        if length > limit or frame.stop > frame.start or frame.flags & Flag.MEAN:
            raise ProtocolError(
                f"PULL of bytes {frame.start}:{frame.stop} with {length} bytes of keys, but table {frame.table} takes "
                f"{limit} at most, and no range with them; nothing was allocated"
            )
        link.landed[id(frame)] = keys = torch.empty(length, dtype=torch.uint8, device="cpu")
        return view(keys)

    def event(self, link: ClientLink, frame: Frame, fds: tuple[int, ...]) -> e.Event | None:
        """What a frame means to the shard; ``None``: it is answered already. Raises what the client is told."""
        payload = link.landed.pop(id(frame), None)
        if frame.kind == Kind.PUSH:
            return self._pushed(link, frame, payload)
        if frame.kind == Kind.PULL:
            return self._pulled(link, frame, payload)
        if frame.kind == Kind.ASSIGN:
            return self._assigned(link, frame, payload)
        if frame.kind == Kind.REQUEST:
            return self._requested(link, frame, m.unpack_request(frame.body), fds)
        raise ProtocolError(f"{frame.kind.name} does not go to a server")

    def left(self, link: ClientLink) -> e.Closed | None:
        """A client's connection ended; its session goes on if it comes back."""
        self.links.pop(link.peer, None)
        if link.session is None or self._of_session.get(link.session) is not link:
            return None
        del self._of_session[link.session]
        return e.Closed(link.session)

    def dismiss(self, error: HeadwaterError) -> None:
        """This server is not the primary any more: every client looks for the new one."""
        body = m.error_body(error)
        for link in self.links.values():
            self._effects.tell(link.peer, Frame(Kind.ERROR, shard=self.shard.number, body=body), close=True)
            link.session = None
        self.links.clear()
        self._of_session.clear()

    # ---- requests --------------------------------------------------------------------------------

    def _requested(self, link: ClientLink, frame: Frame, request: m.Request, fds: tuple[int, ...]) -> e.Event | None:
        match request:
            case m.Open():
                return self._opened(link, frame, request)
            case m.Attach():
                return self._attached(link, frame, request, fds)
            case m.Slots():
                self._tell_slots(link.peer, frame, request.table)
                return None
            case m.SlotPart():
                if len(frame.body) > MAX_BODY - ROOM:
                    raise ProtocolError(f"{len(frame.body)} bytes of slots do not fit into one record; nothing was set")
                session = self._session(link)
                return e.AssignSlots(session, frame.seq, request.table, request.slots, request.reset)
            case m.PauseTable():
                return e.PauseTable(self._session(link), frame.seq, request.table, request.paused)
            case _:
                raise ProtocolError(f"{type(request).__name__} does not go to a server")

    def _opened(self, link: ClientLink, frame: Frame, request: m.Open) -> e.Opened:
        if request.shard != self.shard.number:
            raise ProtocolError(f"shard {request.shard} is not here, this is shard {self.shard.number}")
        if not 0 <= request.session < 1 << 63 or request.rank < -1:
            raise ProtocolError(f"session {request.session} of rank {request.rank} is out of range")
        if link.session is not None:
            raise ProtocolError(f"this connection has opened session {link.session:016x} already")
        event = e.Opened(request.session, request.rank, request.members)
        self.shard.check_open(event)  # before the connection that it has now is closed
        old = self._of_session.get(request.session)
        if old is not None:  # it lost that connection before we did
            moved = m.error_body(ClusterError("the session has moved to another connection"))
            self._effects.tell(old.peer, Frame(Kind.ERROR, body=moved), close=True)
            self.links.pop(old.peer, None)
            old.session = None  # what still comes over it is refused
        link.session, link.asked = request.session, frame.seq
        self._of_session[request.session] = link
        return event

    def _attached(self, link: ClientLink, frame: Frame, request: m.Attach, fds: tuple[int, ...]) -> e.Attached:
        session = self._session(link)
        store = self.shard.table(request.table).store
        shared: torch.Tensor | None = None
        if request.shared:
            if len(fds) != 1 or not store.fds:
                raise ProtocolError("shared memory was asked for without a descriptor, or this server shares none")
            region = store.gradients_in(fds[0], request.size)
            link.shared[request.table] = region
            shared = torch.frombuffer(region.buffer, dtype=torch.uint8)[: region.size]
        if not 1 <= request.base < 1 << 62:
            raise ProtocolError(f"pushes from {request.base} on are out of range")
        return e.Attached(session, request.table, shared, request.base, frame.seq, shared is not None)

    def _tell_slots(self, peer: int, frame: Frame, number: int) -> None:
        """The optimizer state, in parts of a few MB."""
        part: list[m.Slot] = []
        size = 0

        def reply(more: bool) -> None:
            body = m.pack(m.SlotPart(number, tuple(part), more))
            self._effects.tell(peer, Frame(Kind.REPLY, seq=frame.seq, body=body))

        for parameter, name, start, tensor in self.shard.table(number).store.read_slots():
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

    def _session(self, link: ClientLink) -> int:
        if link.session is None:
            raise ProtocolError("a session must be opened first")
        return link.session

    # ---- data ------------------------------------------------------------------------------------

    def _pushed(self, link: ClientLink, frame: Frame, payload: torch.Tensor | None) -> e.Push:
        session = self._session(link)
        table = self.shard.tables.get(frame.table)
        body = m.unpack(frame.body, m.StepBody) if frame.body else None
        gradient, base = None, 0
        length = frame.stop - frame.start
        if length and frame.payload is None and not frame.flags & Flag.SHARED:
            raise ProtocolError(f"PUSH of bytes {frame.start}:{frame.stop} without them; nothing was applied")
        if table is not None and table.eager and length:
            if payload is not None:
                gradient, base = payload, frame.start
            else:
                known = self.shard.sessions.get(session)
                gradient = known.gradients.get(frame.table) if known is not None else None
                if gradient is None:
                    raise ProtocolError(f"shared push to table {frame.table} without shared memory")
        self.pushed_bytes += length
        return e.Push(
            session, frame.seq, frame.epoch, frame.members, frame.table, frame.clock, frame.start, length,
            frame.flags, gradient, base, body,
        )  # fmt: skip

    def _pulled(self, link: ClientLink, frame: Frame, payload: torch.Tensor | None) -> e.Pull | e.AskMean:
        session = self._session(link)
        if frame.flags & Flag.MEAN:
            past = bool(frame.flags & Flag.END)
            return e.AskMean(session, frame.seq, frame.members, frame.table, frame.clock, past)
        keys = b"" if payload is None else bytes(view(payload))
        return e.Pull(session, frame.seq, frame.table, frame.clock, frame.start, frame.stop - frame.start, keys)

    def _assigned(self, link: ClientLink, frame: Frame, payload: torch.Tensor | None) -> e.Assign:
        if frame.flags & Flag.SHARED or (frame.stop > frame.start and payload is None):
            raise ProtocolError("an assignment needs its bytes behind it; values are not shared for writing")
        data = link.scratch[:0] if payload is None else payload
        last = bool(frame.flags & Flag.END)
        clock = frame.clock if frame.flags & Flag.WROTE else 0
        session = self._session(link)
        return e.Assign(session, frame.seq, frame.table, frame.start, data, last, clock, frame.members)

    # ---- answers -----------------------------------------------------------------------------------

    def seated(self, event: e.Seated) -> None:
        """The session is in the log: say so."""
        link = self._of_session.get(event.session)
        if link is not None:
            reply = m.Opened(self.shard.epoch, self._replica.lsn)
            self._effects.tell(link.peer, Frame(Kind.REPLY, seq=link.asked, body=m.pack(reply)))

    def joined(self, x: e.Joined) -> None:
        """A session may use a table: where it stands, and its values' descriptors."""
        table = self.shard.table(x.table)
        clock = table.gathering.clock if table.collective else min(table.clocks.clock.values(), default=0)
        done = self.shard.session(x.session).done.get(x.table, 0)
        reply = m.Attached(self._replica.lsn, clock, table.size, done, self._replica.members.epoch)
        frame = Frame(Kind.REPLY, seq=x.request, body=m.pack(reply))
        self._say(x.session, frame, table.store.fds if x.shared else ())

    def done(self, event: e.Done) -> None:
        """A request was carried out, or refused."""
        if event.error is None:
            self._say(event.session, Frame(Kind.REPLY, seq=event.request, body=m.pack(m.Done())))
        else:
            self._say(event.session, Frame(Kind.ERROR, seq=event.request, body=m.error_body(event.error)))

    def acknowledge(self, a: e.Ack) -> None:
        flags = (Flag.END if a.step else 0) | (Flag.SKIP if a.skipped else 0)
        note = a.note if a.norm is None else msgspec.structs.replace(a.note or m.AckBody(), norm=a.norm)
        body = b"" if note is None else m.pack(note)
        self._count_live(a)
        self._say(
            a.session,
            Frame(
                Kind.ACK, flags, self.shard.number, a.table, a.session, self.shard.epoch, a.seq, a.lsn, a.clock,
                start=a.staleness, members=self._replica.members.epoch, body=body,
            ),
        )  # fmt: skip

    def _count_live(self, a: e.Ack) -> None:
        """Values that a client maps are fresh without a byte moved; they count as pulled, as a doorbell as pushed."""
        link = self._of_session.get(a.session)
        table = self.shard.tables.get(a.table)
        if a.step and table is not None and link is not None and a.table in link.shared:
            self.pulled_bytes += 0 if table.spec.sync.reads_own_memory else table.size

    def refuse(self, f: e.Fail) -> None:
        if f.push:
            self.refused[f.session] += 1
        body = m.pack(m.ErrorBody(f.code, f.message))
        frame = Frame(
            Kind.ERROR, 0, self.shard.number, f.table, f.session, self.shard.epoch, f.seq, self._replica.lsn, f.clock,
            members=self._replica.members.epoch, body=body,
        )  # fmt: skip
        self._say(f.session, frame, close=f.code == "ProtocolError")

    def send_values(self, s: e.Send) -> None:
        """A grant where the client maps the values, else one DATA frame per piece of the answer."""
        link = self._of_session.get(s.session)
        table = self.shard.tables.get(s.table)
        if link is None or table is None:
            return
        self.pulled_bytes += s.length
        if s.table in link.shared:
            self._say(s.session, self._data(s, Flag.SHARED | Flag.END, s.start, s.length))
            return
        frames = []
        for start, payload in table.store.answer(s.start, s.start + s.length, s.keys):
            frame = self._data(s, Flag.NONE, start, len(payload))
            frame.payload = payload
            frames.append(frame)
        if not s.length:  # by keys: their number is not known before
            self.pulled_bytes += sum(frame.length for frame in frames)
        frames = frames or [self._data(s, Flag.NONE, s.start, 0)]
        frames[-1].flags = int(Flag.END)
        for frame in frames:
            if self._checked:
                seal(frame)
            self._say(s.session, frame)

    def send_mean(self, s: e.SendMean) -> None:
        """The aggregate of a step under way: bytes, on every transport."""
        table = self.shard.tables.get(s.table)
        if table is None:
            return
        raw, body = view(s.mean), m.pack(m.MeanBody(s.ranges))
        frames = [
            Frame(
                Kind.DATA, Flag.MEAN, self.shard.number, s.table, s.session, self.shard.epoch, s.seq, self._replica.lsn,
                s.clock, start, stop, payload=raw[start:stop],
            ) for start, stop in table.store.chunks()
        ] or [Frame(Kind.DATA, Flag.MEAN, table=s.table, seq=s.seq, clock=s.clock)]  # fmt: skip
        frames[0].body = body
        frames[-1].flags |= Flag.END
        for frame in frames:
            if self._checked:
                seal(frame)
            self._say(s.session, frame)

    def _data(self, s: e.Send, flags: int, start: int, length: int) -> Frame:
        return Frame(
            Kind.DATA, flags, self.shard.number, s.table, s.session, self.shard.epoch, s.request, self._replica.lsn,
            s.clock, start, start + length, members=s.staleness,
        )  # fmt: skip

    def _say(self, session: int, frame: Frame, fds: tuple[int, ...] = (), *, close: bool = False) -> None:
        link = self._of_session.get(session)
        if link is not None:
            self._effects.instructions.append(Outgoing(link.peer, frame, fds, close))

    def consumed(self, table: int, start: int, stop: int) -> None:
        """A step has read these gradients: stay resident with one worker's, however many there are."""
        regions = [link.shared[table] for link in self.links.values() if table in link.shared]
        for region in regions[1:]:
            region.drop(start, stop)
