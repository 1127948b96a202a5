"""The I/O of a process that others connect to: channels, handshakes, time.

One thread, one epoll. Its host (a coordinator, a server, a relay) is a state machine: frames in, frames out.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headwater.errors import HeadwaterError, ProtocolError
from headwater.transports.channel import Channel
from headwater.transports.memory import close_all
from headwater.transports.receiver import Receiver
from headwater.transports.schemes import Listener
from headwater.transports.spin import SPIN, Spinning
from headwater.wire import auth
from headwater.wire import messages as m
from headwater.wire.frames import MAX_BODY, Frame, Kind, encode
from headwater.wire.outgoing import Dial, Instruction

log = logging.getLogger("headwater")

TICK = 0.1  # seconds
HANDSHAKE = 5.0  # seconds until a connection that has not proved itself is closed
HELLO_LIMIT = 4096  # bytes of body before the peer has proved itself
UNPROVEN = 128  # connections that have not proved themselves; beyond that the oldest is closed
LENT = 1 << 20  # bytes that a descriptor on its way counts for
OUTBOX = 64 << 20  # bytes of answers that a peer has not taken, above which it is asked to take them first
LASTING = 0  # the key of a dial whose connection has that number too, each time anew: a server's to its coordinator
READS = 64  # receive calls per connection and turn, so that one flood does not starve the others
VECTORS = 64  # buffers per send call
JOINED = 4 << 10  # bytes: a smaller payload is copied behind its header rather than sent as a second buffer

Ranges = tuple[tuple[int, int], ...]


class Host(Protocol):
    """A state machine that the loop serves. Peers are numbered by connection.

    ``work`` is called when what ``receive`` returned is on its way, ``woken`` after ``Loop.wake``. ``dialed`` says what
    became of a ``Dial``.
    """

    def landing(self, peer: int, frame: Frame) -> memoryview: ...
    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]: ...
    def closed(self, peer: int) -> list[Instruction]: ...
    def tick(self, now: float) -> list[Instruction]: ...
    def work(self) -> list[Instruction]: ...
    def woken(self) -> list[Instruction]: ...
    def dialed(self, key: int, peer: int | None) -> list[Instruction]: ...


@dataclass(slots=True)
class _Entry:
    """Bytes on their way out; ``span`` says which values they are a view of, if they are."""

    data: memoryview
    fds: tuple[int, ...] = ()
    span: tuple[int, int, int, int] | None = None  # shard, table, start, stop


@dataclass(slots=True, eq=False)
class _Connection:
    peer: int
    channel: Channel
    fd: int
    deadline: float
    receiver: Receiver = field(init=False)
    outbox: deque[_Entry] = field(default_factory=deque)
    client_nonce: bytes = b""
    server_nonce: bytes = b""
    stage: str = "hello"  # hello, proof, open
    queued: int = 0  # bytes in the outbox
    mask: int = select.EPOLLIN
    closing: bool = False


class Loop:
    """Serves ``host`` on its listeners until ``stop`` or a signal.

    ``connector`` opens and authenticates a connection for a ``Dial``; it may block, in a thread of its own.
    ``sync`` is called once per turn: what the turn's frames have in common is done there.
    """

    def __init__(self, host: Host, token: bytes | None, connector: Callable[[Dial], Channel] | None = None) -> None:
        self.host = host
        self._token = token or b""
        self._epoll = select.epoll()
        self._listeners: dict[int, Listener] = {}
        self._by_fd: dict[int, _Connection] = {}
        self._by_peer: dict[int, _Connection] = {}
        self._next_peer = 1
        self._stopping = False
        self._spinning = Spinning()
        self._unread: set[_Connection] = set()  # of which more is here than epoll knows
        self._woken = False
        self._deaf: list[Listener] = []  # listeners that had no descriptor left to accept with
        self.sync: Callable[[], list[Instruction]] | None = None
        self._connector = connector
        self._dials: queue.SimpleQueue[tuple[int, Channel | None]] = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_r, select.EPOLLIN)

    def serve(self, listener: Listener) -> None:
        """Accept connections."""
        self._listeners[listener.fileno()] = listener
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def adopt(self, channel: Channel, peer: int) -> None:
        """Take over a connection that this process made and that has shaken hands."""
        connection = self._add(channel, peer)
        connection.stage, connection.receiver.limit = "open", MAX_BODY

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT end ``run`` cleanly."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def wake(self) -> None:
        """From any thread: something is finished that the host has to look at."""
        self._woken = True
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"w")

    def stop(self) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"x")

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped, then close everything."""
        next_tick = time.monotonic() + TICK
        try:
            while not self._stopping:
                for fd, mask in self._poll(next_tick):
                    self._event(fd, mask)
                if self._unread:
                    self._read_on()
                while not self._dials.empty():
                    self._dialed(*self._dials.get())
                if self._woken:
                    self._woken = False
                    self.dispatch(self.host.woken())
                now = time.monotonic()
                if now >= next_tick:
                    next_tick = now + TICK
                    self._expire(now)
                    self.dispatch(self.host.tick(now))
                if self.sync is not None:
                    self.dispatch(self.sync())
        finally:
            self._close_all()

    def _poll(self, until: float) -> list[tuple[int, int]]:
        """What happened, by ``until`` at the latest."""
        poll, now = self._epoll.poll, time.monotonic()
        if self._unread:
            return poll(0)
        if self._spinning.pays():
            end = min(until, now + SPIN)
            while now < end:
                events = poll(0)
                if events:
                    self._spinning.hit()
                    return events
                os.sched_yield()
                now = time.monotonic()
            self._spinning.missed()
        return poll(max(0.0, until - now))

    def _event(self, fd: int, mask: int) -> None:
        connection = self._by_fd.get(fd)
        if connection is not None:
            if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._readable(connection)
            if mask & select.EPOLLOUT and connection.peer in self._by_peer:
                self._flush(connection)
        elif fd in self._listeners:
            self._accept(self._listeners[fd])
        elif fd == self._wake_r:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 512)

    def _accept(self, listener: Listener) -> None:
        try:
            channel = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it would stay ready: look again at the next tick
                log.error("no descriptors are left: %s", error.strerror)
                self._epoll.modify(listener.fileno(), 0)
                self._deaf.append(listener)
            return
        unproven = [c for c in self._by_fd.values() if c.stage != "open"]
        if len(unproven) >= UNPROVEN:
            self._close(min(unproven, key=lambda c: c.deadline))
        self._add(channel, self._next_peer)
        self._next_peer += 1

    def _add(self, channel: Channel, peer: int) -> _Connection:
        connection = _Connection(peer, channel, channel.fileno(), time.monotonic() + HANDSHAKE)
        connection.receiver = Receiver(channel, lambda frame: self._landing(connection, frame), HELLO_LIMIT)
        self._by_fd[connection.fd] = self._by_peer[peer] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)
        return connection

    def _landing(self, connection: _Connection, frame: Frame) -> memoryview:
        if connection.stage != "open":
            raise ProtocolError(f"{frame.kind.name} with a payload during the handshake")
        return self.host.landing(connection.peer, frame)

    def _readable(self, connection: _Connection) -> None:
        """Receive what is there; a frame that is not allowed ends this connection and no other."""
        receiver, channel = connection.receiver, connection.channel
        try:
            for _ in range(READS):
                receiver.fill()
                some = False
                while (arrived := receiver.next()) is not None:
                    some = True
                    self._frame(connection, *arrived)
                    if connection.peer not in self._by_peer:
                        return  # closed meanwhile: what came behind is not looked at
                if some and not receiver.midway and not channel.pending:
                    return
        except BlockingIOError:
            return
        except HeadwaterError as error:
            if isinstance(error, ProtocolError):
                log.warning("peer %d: %s", connection.peer, error)
                self._enqueue(connection, Frame(Kind.ERROR, body=m.error_body(error)))
                self._flush(connection)
            self._close(connection)
            return
        if channel.pending:
            self._unread.add(connection)

    def _read_on(self) -> None:
        """What others had to wait less for is read, in turns."""
        connections, self._unread = self._unread, set()
        for connection in connections:
            if connection.mask & select.EPOLLIN:
                self._readable(connection)

    def _frame(self, connection: _Connection, frame: Frame, fds: tuple[int, ...]) -> None:
        if fds and (connection.stage != "open" or frame.kind != Kind.REQUEST):
            close_all(fds)
            raise ProtocolError(f"{frame.kind.name} with descriptors, which only a request carries")
        if connection.stage == "open":
            out = self.host.receive(connection.peer, frame, fds)
            if out:
                self.dispatch(out)
            out = self.host.work()
            if out:
                self.dispatch(out)
        else:
            self._handshake(connection, frame)

    def _handshake(self, connection: _Connection, frame: Frame) -> None:
        """The server's side of FORMAT.md, section 3."""
        if connection.stage == "hello" and frame.kind == Kind.HELLO:
            connection.client_nonce = m.unpack(frame.body, m.Hello).nonce
            auth.check_nonce(connection.client_nonce)
            connection.server_nonce = auth.nonce()
            mine = auth.proof(self._token, "server", connection.client_nonce, connection.server_nonce)
            connection.stage = "proof"
            self._enqueue(connection, Frame(Kind.CHALLENGE, body=m.pack(m.Challenge(connection.server_nonce, mine))))
        elif connection.stage == "proof" and frame.kind == Kind.PROOF:
            given = m.unpack(frame.body, m.Proof).proof
            try:
                auth.check(self._token, "client", connection.client_nonce, connection.server_nonce, given)
            except HeadwaterError as error:
                log.warning("peer %d: %s", connection.peer, error)
                self._enqueue(connection, Frame(Kind.ERROR, body=m.error_body(error)))
                connection.closing = True
            else:
                connection.stage, connection.receiver.limit = "open", MAX_BODY
                self._enqueue(connection, Frame(Kind.WELCOME))
        else:
            raise ProtocolError(f"{frame.kind.name} instead of the handshake's next message")
        self._flush(connection)

    # ---- sending ---------------------------------------------------------------------------------

    def dispatch(self, instructions: Sequence[Instruction]) -> None:
        """Carry out the host's instructions; frames to one peer go together."""
        touched: dict[int, _Connection] = {}
        for out in instructions:
            if isinstance(out, Dial):
                self._dial(out)
                continue
            peer, frame, fds, close = out
            connection = self._by_peer.get(peer)
            if connection is None:
                continue
            if not (fds or close or connection.outbox) and len(instructions) == 1:
                self._send_one(connection, frame)  # nine of ten
                return
            self._enqueue(connection, frame, fds)
            connection.closing = connection.closing or close
            touched[peer] = connection
        for connection in touched.values():
            self._flush(connection)

    def _send_one(self, connection: _Connection, frame: Frame) -> None:
        """Send a frame when nothing else waits to be sent."""
        payload = frame.payload
        if payload is not None and len(payload) > JOINED:
            self._enqueue(connection, frame)
            self._flush(connection)
            return
        data = encode(frame) if payload is None else encode(frame) + payload
        try:
            sent = connection.channel.send((data,))
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(connection)
            return
        if sent < len(data):
            connection.outbox.append(_Entry(memoryview(data)[sent:]))
            connection.queued += len(data) - sent
            self._want_write(connection, True)

    def _enqueue(self, connection: _Connection, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        head = memoryview(encode(frame))
        lent: list[int] = []
        try:  # duplicates: their owner may close them before they are sent, and the numbers be used again
            lent.extend(os.dup(fd) for fd in fds)
        except OSError as error:
            log.error("peer %d: no descriptors are left: %s", connection.peer, error.strerror)
            close_all(lent)
            self._close(connection)
            return
        connection.outbox.append(_Entry(head, tuple(lent)))
        connection.queued += len(head) + LENT * len(lent)
        if frame.payload is not None and len(frame.payload):
            values = frame.kind == Kind.DATA  # other payloads stay as they are until they have arrived
            span = (frame.shard, frame.table, frame.start, frame.stop) if values else None
            connection.outbox.append(_Entry(frame.payload, (), span))
            connection.queued += len(frame.payload)

    def _flush(self, connection: _Connection) -> None:
        outbox = connection.outbox
        try:
            while outbox:
                connection.queued -= self._send_some(connection.channel, outbox)
        except BlockingIOError:
            if connection.closing:  # it does not read its refusal
                self._close(connection)
            else:
                self._want_write(connection, True)
            return
        except OSError:
            self._close(connection)
            return
        self._want_write(connection, False)
        if connection.closing:
            self._close(connection)

    def _send_some(self, channel: Channel, outbox: deque[_Entry]) -> int:
        """One send call; the bytes that it took, and what the descriptors counted for."""
        first = outbox[0]
        batch = [first.data]
        for i in range(1, 1 if first.fds else min(len(outbox), VECTORS)):  # descriptors travel with one frame
            if outbox[i].fds:
                break
            batch.append(outbox[i].data)
        sent = channel.send(batch, first.fds)
        weight = sent + LENT * len(first.fds)
        if first.fds:
            close_all(first.fds)
            first.fds = ()
        left = sent
        while left:
            entry = outbox[0]
            if left < len(entry.data):
                entry.data = entry.data[left:]
                break
            left -= len(entry.data)
            outbox.popleft()
        return weight

    def _want_write(self, connection: _Connection, wanted: bool) -> None:
        """Write when there is room; read no more questions from one that does not take its answers."""
        asks = not wanted or connection.queued <= OUTBOX
        mask = (select.EPOLLIN if asks else 0) | (select.EPOLLOUT if wanted else 0)
        if mask != connection.mask:
            connection.mask = mask
            self._epoll.modify(connection.fd, mask)
            if asks and connection.channel.pending:
                self._unread.add(connection)

    def detach(self, shard: int, table: int, ranges: Ranges) -> None:
        """Values are about to change: answers that still refer to them are copied out first."""
        for connection in self._by_peer.values():
            for entry in connection.outbox:
                if entry.span is not None and entry.span[:2] == (shard, table):
                    _, _, start, stop = entry.span
                    if any(start < b and a < stop for a, b in ranges):
                        entry.data, entry.span = memoryview(bytes(entry.data)), None

    # ---- connections of our own ------------------------------------------------------------------

    def _dial(self, dial: Dial) -> None:
        """Connect in a thread: an address where nobody answers must not hold the others up."""
        threading.Thread(target=self._connect, args=(dial,), name="headwater-dial", daemon=True).start()

    def _connect(self, dial: Dial) -> None:
        channel = None
        try:
            if self._connector is not None:
                channel = self._connector(dial)
        except (HeadwaterError, OSError) as error:
            log.debug("%s: %s", dial.address, error)
        self._dials.put((dial.key, channel))
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"d")

    def _dialed(self, key: int, channel: Channel | None) -> None:
        peer = None
        if channel is not None:
            peer = LASTING if key == LASTING else self._next_peer
            self._next_peer += 1
            old = self._by_peer.get(peer)
            if old is not None:
                self._close(old)
            self.adopt(channel, peer)
        self.dispatch(self.host.dialed(key, peer))

    # ---- ends ------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        while self._deaf:
            self._epoll.modify(self._deaf.pop().fileno(), select.EPOLLIN)
        for connection in [c for c in self._by_fd.values() if c.stage != "open" and now > c.deadline]:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        if self._by_peer.pop(connection.peer, None) is None:
            return
        self._by_fd.pop(connection.fd, None)
        self._unread.discard(connection)
        with contextlib.suppress(OSError):
            self._epoll.unregister(connection.fd)
        connection.channel.close()
        connection.receiver.close()
        for entry in connection.outbox:
            close_all(entry.fds)
        if connection.stage == "open":
            self.dispatch(self.host.closed(connection.peer))

    def _close_all(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        for listener in self._listeners.values():
            listener.close()
        for connection in self._by_fd.values():
            connection.channel.close()
            connection.receiver.close()
            for entry in connection.outbox:
                close_all(entry.fds)
        self._by_fd.clear()
        self._by_peer.clear()
        self._epoll.close()
        os.close(self._wake_r)
        wake, self._wake_w = self._wake_w, -1  # a thread may be about to write
        os.close(wake)
