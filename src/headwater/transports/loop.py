"""The I/O of a process that others connect to: sockets, handshakes, time.

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
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from headwater.errors import AddressInUse, HeadwaterError, ProtocolError, UsageError
from headwater.transports.address import Address, family
from headwater.transports.memory import close_all
from headwater.transports.receiver import Receiver, descriptors
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
SPIN = 100e-6  # seconds
VECTORS = 64  # buffers per send call

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


@dataclass(slots=True)
class _Connection:
    peer: int
    sock: socket.socket
    deadline: float
    receiver: Receiver = field(init=False)
    outbox: deque[_Entry] = field(default_factory=deque)
    client_nonce: bytes = b""
    server_nonce: bytes = b""
    stage: str = "hello"  # hello, proof, open
    queued: int = 0  # bytes in the outbox
    mask: int = select.EPOLLIN
    closing: bool = False


def listen(address: Address, token: bytes | None) -> socket.socket:
    """A listening socket. Raises ``AddressInUse``, or ``UsageError`` for an open port without a token."""
    if not address.loopback and not token:
        raise UsageError(
            f"{address} can be reached from other hosts and no token is set; nothing was bound. "
            "Set HEADWATER_TOKEN or HEADWATER_TOKEN_FILE, or listen on 127.0.0.1"
        )
    if address.scheme == "local":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: str | tuple[str, int] = "\0" + address.host
    else:
        sock = socket.socket(family(address), socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        target = (address.host, address.port)
    try:
        sock.bind(target)
        sock.listen(128)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{address} is in use by another process; choose another port, or 0 for any") from None
        raise UsageError(f"cannot listen on {address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock


class Loop:
    """Serves ``host`` on the listening sockets until ``stop`` or a signal.

    ``connector`` opens and authenticates a connection for a ``Dial``; it may block, in a thread of its own.
    ``sync`` is called once per turn: what the turn's frames have in common is done there.
    """

    def __init__(
        self, host: Host, token: bytes | None, connector: Callable[[Dial], socket.socket] | None = None
    ) -> None:
        self.host = host
        self._token = token or b""
        self._epoll = select.epoll()
        self._listeners: dict[int, socket.socket] = {}
        self._by_fd: dict[int, _Connection] = {}
        self._by_peer: dict[int, _Connection] = {}
        self._next_peer = 1
        self._stopping = False
        self._spins = False
        self._woken = False
        self._deaf: list[socket.socket] = []  # listeners that had no descriptor left to accept with
        self.sync: Callable[[], list[Instruction]] | None = None
        self._connector = connector
        self._dials: queue.SimpleQueue[tuple[int, socket.socket | None]] = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_r, select.EPOLLIN)

    def serve(self, sock: socket.socket) -> None:
        """Accept connections on a listening socket."""
        self._listeners[sock.fileno()] = sock
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def adopt(self, sock: socket.socket, peer: int) -> None:
        """Take over a connection that this process made and that has shaken hands."""
        connection = self._add(sock, peer)
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
        """What happened, by ``until`` at the latest.

        Waking a sleeping core takes longer than a small message's whole work, so after a short wait the next
        one is spun through first. A server that waits for long, as between training steps, never spins.
        """
        begun = time.monotonic()
        while self._spins:
            events = self._epoll.poll(0)
            if events:
                return events
            if time.monotonic() - begun > SPIN:
                break
            os.sched_yield()
        events = self._epoll.poll(max(0.0, until - time.monotonic()))
        self._spins = time.monotonic() - begun < 2 * SPIN
        return events

    def _event(self, fd: int, mask: int) -> None:
        connection = self._by_fd.get(fd)
        if connection is not None:
            if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._readable(connection)
            if mask & select.EPOLLOUT and connection.sock.fileno() >= 0:
                self._flush(connection)
        elif fd in self._listeners:
            self._accept(self._listeners[fd])
        elif fd == self._wake_r:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 512)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it would stay ready: look again at the next tick
                log.error("no descriptors are left: %s", error.strerror)
                self._epoll.modify(listener.fileno(), 0)
                self._deaf.append(listener)
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        unproven = [c for c in self._by_fd.values() if c.stage != "open"]
        if len(unproven) >= UNPROVEN:
            self._close(min(unproven, key=lambda c: c.deadline))
        self._add(sock, self._next_peer)
        self._next_peer += 1

    def _add(self, sock: socket.socket, peer: int) -> _Connection:
        sock.setblocking(False)
        connection = _Connection(peer, sock, time.monotonic() + HANDSHAKE)
        connection.receiver = Receiver(sock, lambda frame: self._landing(connection, frame), HELLO_LIMIT)
        self._by_fd[sock.fileno()] = self._by_peer[peer] = connection
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return connection

    def _landing(self, connection: _Connection, frame: Frame) -> memoryview:
        if connection.stage != "open":
            raise ProtocolError(f"{frame.kind.name} with a payload during the handshake")
        return self.host.landing(connection.peer, frame)

    def _readable(self, connection: _Connection) -> None:
        """Receive what is there; a frame that is not allowed ends this connection and no other."""
        try:
            for _ in range(READS):
                some = False
                for frame, fds in connection.receiver.read():
                    some = True
                    self._frame(connection, frame, fds)
                    if connection.peer not in self._by_peer:
                        return  # closed meanwhile: what came behind is not looked at
                if some and not connection.receiver.midway:
                    break
        except BlockingIOError:
            return
        except HeadwaterError as error:
            if isinstance(error, ProtocolError):
                log.warning("peer %d: %s", connection.peer, error)
                self._enqueue(connection, Frame(Kind.ERROR, body=m.error_body(error)))
                self._flush(connection)
            self._close(connection)

    def _frame(self, connection: _Connection, frame: Frame, fds: tuple[int, ...]) -> None:
        if fds and (connection.stage != "open" or frame.kind != Kind.REQUEST):
            close_all(fds)
            raise ProtocolError(f"{frame.kind.name} with descriptors, which only a request carries")
        if connection.stage == "open":
            self.dispatch(self.host.receive(connection.peer, frame, fds))
            after = self.host.work()
            if after:
                self.dispatch(after)
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

    def dispatch(self, instructions: Iterable[Instruction]) -> None:
        """Carry out the host's instructions."""
        touched: dict[int, _Connection] = {}
        for out in instructions:
            if isinstance(out, Dial):
                self._dial(out)
                continue
            connection = self._by_peer.get(out.peer)
            if connection is None:
                continue
            self._enqueue(connection, out.frame, out.fds)
            connection.closing = connection.closing or out.close
            touched[out.peer] = connection
        for connection in touched.values():
            self._flush(connection)

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
                connection.queued -= self._send_some(connection.sock, outbox)
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

    def _send_some(self, sock: socket.socket, outbox: deque[_Entry]) -> int:
        """One send call; the bytes that it took, and what the descriptors counted for."""
        first = outbox[0]
        if len(outbox) == 1 and not first.fds:
            sent = sock.send(first.data)
        else:
            batch = [first.data]
            for i in range(1, 1 if first.fds else min(len(outbox), VECTORS)):  # descriptors travel with one frame
                if outbox[i].fds:
                    break
                batch.append(outbox[i].data)
            sent = sock.sendmsg(batch, descriptors(first.fds))
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
            self._epoll.modify(connection.sock.fileno(), mask)

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
        sock = None
        try:
            if self._connector is not None:
                sock = self._connector(dial)
        except (HeadwaterError, OSError) as error:
            log.debug("%s: %s", dial.address, error)
        self._dials.put((dial.key, sock))
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"d")

    def _dialed(self, key: int, sock: socket.socket | None) -> None:
        peer = None
        if sock is not None:
            peer = LASTING if key == LASTING else self._next_peer
            self._next_peer += 1
            old = self._by_peer.get(peer)
            if old is not None:
                self._close(old)
            self.adopt(sock, peer)
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
        self._by_fd.pop(connection.sock.fileno(), None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(connection.sock.fileno())
        connection.sock.close()
        connection.receiver.close()
        for entry in connection.outbox:
            close_all(entry.fds)
        if connection.stage == "open":
            self.dispatch(self.host.closed(connection.peer))

    def _close_all(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        for sock in [*self._listeners.values(), *(c.sock for c in self._by_fd.values())]:
            sock.close()
        for connection in self._by_fd.values():
            connection.receiver.close()
            for entry in connection.outbox:
                close_all(entry.fds)
        self._by_fd.clear()
        self._by_peer.clear()
        self._epoll.close()
        os.close(self._wake_r)
        wake, self._wake_w = self._wake_w, -1  # a thread may be about to write
        os.close(wake)
