"""A client's side of the simulation: links that a fibre pumps, and the clock and the threads of a process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken, ProtocolError, Unreachable
from headwater.testing.network import End, Network
from headwater.testing.processes import Process
from headwater.testing.scheduler import Scheduler, Signal
from headwater.transports.stream import Handler
from headwater.wire import messages as m
from headwater.wire.frames import Frame

Tap = Callable[[Frame], None]
CONNECT = 2.0  # seconds until a client gives up on an address that does not answer


class SimLink:
    """One connection of a client. What arrives waits until a fibre pumps, unless it was prefetched."""

    shared = False

    def __init__(self, scheduler: Scheduler, network: Network, end: End, handler: Handler, tap: Tap) -> None:
        self._scheduler = scheduler
        self._network = network
        self._end = end
        self._handler = handler
        self._tap = tap
        self._inbox: deque[Frame] = deque()
        self._arrived = Signal()
        self._wanted: list[Callable[[], bool]] = []
        self.error: HeadwaterError | None = None
        self._eof = False
        end.receiver = self
        end.late = True

    # ---- from the network ------------------------------------------------------------------------

    def arrived(self, end: End, frame: Frame) -> None:
        self._inbox.append(frame)
        if self._wanted:
            self._prefetch()
        self._arrived.notify()

    def hung_up(self, end: End) -> None:
        self._eof = True
        self._arrived.notify()

    # ---- for the client --------------------------------------------------------------------------

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        if self.error is not None:
            raise self.error
        if self._eof or not self._end.open:
            raise self._broken("the connection broke while something was sent")
        self._network.send(self._end, frame)

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        process = self._end.process
        while not done():
            if self._inbox:
                self._take()
                continue
            if self.error is not None:
                raise self.error
            if self._eof:
                raise self._broken("the other side closed the connection")
            if process.clock() >= deadline:
                raise DeadlineExceeded("the other side did not answer in time; what was sent may still be applied")
            self._arrived.wait(self._scheduler.current(), process.moment(deadline))

    def _take(self) -> None:
        frame = self._inbox.popleft()
        try:
            if frame.payload is not None:
                self._handler.landing(frame)[:] = frame.payload
            self._tap(frame)
            self._handler.receive(frame, ())
        except ProtocolError as error:
            self.error = self.error or error
            self._network.close(self._end)
            raise

    def _broken(self, why: str) -> HeadwaterError:
        if self.error is None:
            self.error = LinkBroken(why)
            self._network.close(self._end)
        return self.error

    def prefetch(self, done: Callable[[], bool]) -> None:
        self._wanted.append(done)
        self._prefetch()

    def _prefetch(self) -> None:
        while self._wanted and self._inbox:
            if self._wanted[0]():
                del self._wanted[0]
                continue
            try:
                self._take()
            except HeadwaterError:  # whoever pumps is told
                return

    def close(self) -> None:
        if self.error is None:
            self.error = LinkBroken("this client has closed the connection")
        self._network.close(self._end)


class FibreLock:
    """A lock that fibres wait for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._taken = False
        self._free = Signal()

    def __enter__(self) -> None:
        while self._taken:
            self._free.wait(self._scheduler.current())
        self._taken = True

    def __exit__(self, *what: object) -> None:
        self._taken = False
        self._free.notify()


class SimRuntime:
    """What a client asks of its surroundings: time, rest, something to be done now and then, connections."""

    def __init__(self, scheduler: Scheduler, network: Network, process: Process, random: Random, tap: Tap) -> None:
        self._scheduler = scheduler
        self._network = network
        self._process = process
        self._random = random
        self._tap = tap

    def now(self) -> float:
        return self._process.clock()

    def token(self) -> int:
        return self._random.getrandbits(63)

    def sleep(self, seconds: float) -> None:
        self._scheduler.current().wait(self._process.moment(self._process.clock() + seconds))

    def lock(self) -> FibreLock:
        return FibreLock(self._scheduler)

    def every(self, period: float, act: Callable[[], None]) -> Callable[[], None]:
        """A thread that calls ``act``; the answer stops it."""
        going = [True]

        def body() -> None:
            while going[0]:
                self.sleep(period)
                if going[0]:
                    act()

        self._process.fibre(body)
        return lambda: going.__setitem__(0, False)

    def dial(self, view: m.ShardView | None, handler: Handler) -> SimLink:
        """Connect to a shard's server, or to the coordinator. Raises ``Unreachable``."""
        address = "sim://coordinator" if view is None else view.address
        found: list[End | None] = []
        signal = Signal()

        def done(end: End | None) -> None:
            if late and end is not None:
                self._network.close(end)
            found.append(end)
            signal.notify()

        late: list[bool] = []
        self._network.connect(self._process, address, done)
        until = self._process.clock() + CONNECT
        while not found and self._process.clock() < until:
            signal.wait(self._scheduler.current(), self._process.moment(until))
        if not found or found[0] is None:
            late.append(True)
            raise Unreachable(f"nobody answers at {address}")
        return SimLink(self._scheduler, self._network, found[0], handler, self._tap)
