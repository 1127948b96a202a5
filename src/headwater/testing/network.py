"""Connections between simulated processes: ordered, delayed, cut, held back. What a frame costs is `times.py`'s.

A connection behaves as TCP does: what arrives has not been changed, lost or reordered, until the connection breaks;
then everything on its way is lost. A blocked direction loses nothing either: it is silent, and when it heals, what was
sent comes. Across connections any order is possible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from headwater.testing.processes import Process
from headwater.testing.scheduler import Scheduler
from headwater.testing.times import TimeModel
from headwater.wire.frames import HEADER, Frame

Accept = Callable[["End"], None]


class Receiver(Protocol):
    """Who reads from an end of a connection."""

    def arrived(self, end: End, frame: Frame) -> None: ...
    def hung_up(self, end: End) -> None: ...


@dataclass(slots=True, eq=False)
class End:
    """One side of a connection. ``late``: payloads are read when they arrive, as by a sender thread."""

    process: Process
    number: int
    receiver: Receiver | None = None
    late: bool = False
    other: End = field(init=False, repr=False)
    open: bool = True
    lost: bool = False  # its machine is gone, and what it was still sending
    flying: deque[Frame] = field(default_factory=deque)  # late payloads on their way
    last: float = 0.0  # when what was sent last arrives
    held: deque[Frame | None] = field(default_factory=deque)  # a blocked direction; None: it was closed


class Network:
    """Who can reach whom, and when what they say arrives."""

    def __init__(self, scheduler: Scheduler, times: TimeModel, random: Random) -> None:
        self.scheduler = scheduler
        self.times = times
        self.ends: list[End] = []
        self._random = random
        self._listening: dict[str, tuple[Process, Accept]] = {}
        self._blocked: dict[tuple[str, str], int] = {}
        self._numbers = 0

    # ---- connections -----------------------------------------------------------------------------

    def listen(self, address: str, process: Process, accept: Accept) -> None:
        self._listening[address] = (process, accept)

    def connect(self, process: Process, address: str, done: Callable[[End | None], None]) -> None:
        """Call ``done`` with this side of a connection, or ``None`` if nobody answers. Silence lasts as it lasts."""
        self.scheduler.after(self._latency(), self._knock, process, address, done)

    def _knock(self, process: Process, address: str, done: Callable[[End | None], None]) -> None:
        found = self._listening.get(address)
        if found is None or not found[0].alive:
            if found is None or not found[0].vanished:
                self._answer(process, done, None)
            return
        there, accept = found
        if there.stopped or self.blocked(process.name, there.name) or self.blocked(there.name, process.name):
            self.scheduler.after(0.1, self._knock, process, address, done)  # as a SYN that is sent again
            return
        there.call(self._accept, process, there, accept, done)

    def _accept(self, process: Process, there: Process, accept: Accept, done: Callable[[End | None], None]) -> None:
        near, far = self._end(process), self._end(there)
        near.other, far.other = far, near
        near.last = far.last = self.scheduler.now + self._latency()
        accept(far)
        self._answer(process, done, near)

    def _answer(self, process: Process, done: Callable[[End | None], None], end: End | None) -> None:
        if not process.alive and end is not None:
            self.close(end)
            return
        self.scheduler.after(self._latency(), process.call, self._told, done, end)

    def _told(self, done: Callable[[End | None], None], end: End | None) -> None:
        done(end if end is not None and end.open else None)  # it may have broken meanwhile

    def _end(self, process: Process) -> End:
        self._numbers += 1
        end = End(process, self._numbers)
        self.ends.append(end)
        process.ends.append(end)
        return end

    def _latency(self) -> float:
        return self.times.latency(self._random)

    # ---- what travels ----------------------------------------------------------------------------

    def send(self, end: End, frame: Frame) -> None:
        """Send a copy of the frame; from a side that was closed nothing goes."""
        if not end.open:
            return
        payload = frame.payload
        copy = Frame(
            frame.kind, frame.flags, frame.shard, frame.table, frame.session, frame.epoch, frame.seq, frame.lsn,
            frame.clock, frame.start, frame.stop, frame.members, frame.body,
            payload if payload is None or end.late else memoryview(bytes(payload)),
            payload_length=0 if payload is None else len(payload),
        )  # fmt: skip
        if end.late and payload is not None:
            end.flying.append(copy)
        self._travel(end, copy, len(payload) if payload else HEADER + len(frame.body))

    def close(self, end: End) -> None:
        """This side hangs up: the other learns of it after everything that was sent."""
        if end.open:
            for frame in end.flying:  # nobody reads the sender's memory any more
                frame.payload = memoryview(bytes(frame.payload or b""))
            end.flying.clear()
            self._travel(end, None, 0)
            self._forget(end)

    def _travel(self, end: End, item: Frame | None, nbytes: int) -> None:
        if end.held or (self._blocked and self.blocked(end.process.name, end.other.process.name)):
            end.held.append(item)
            return
        when = self.times.arrival(self.scheduler.now, end.process.line, end.other.process.line, nbytes, self._random)
        end.last = when = max(end.last, when)
        self.scheduler.at(when, self._arrive, end.other, item)

    def _arrive(self, end: End, item: Frame | None) -> None:
        if item is not None and item.payload is not None and end.other.flying:
            end.other.flying.popleft()
            item.payload = memoryview(bytes(item.payload))
        if end.open and not end.other.lost:
            end.process.call(self._hand_over, end, item)

    def _hand_over(self, end: End, item: Frame | None) -> None:
        if not end.open or end.receiver is None:
            return
        if item is None:
            self._forget(end)
            end.receiver.hung_up(end)
        else:
            end.receiver.arrived(end, item)

    def _forget(self, end: End) -> None:
        end.open = False
        if not end.other.open:
            self.ends.remove(end.other)
            self.ends.remove(end)
        if end in end.process.ends:
            end.process.ends.remove(end)

    # ---- faults ----------------------------------------------------------------------------------

    def cut(self, end: End) -> None:
        """The connection breaks now: what is on its way is lost, both sides learn of it, each in its time."""
        for side in (end, end.other):
            if side.open:
                self._forget(side)
                if side.receiver is not None and side.process.alive:
                    self.scheduler.after(self._latency(), side.process.call, side.receiver.hung_up, side)

    def hang_up(self, process: Process) -> None:
        """The process is dead, its kernel closes what it held open."""
        for end in list(process.ends):
            self.close(end)

    def abandon(self, process: Process) -> None:
        """The machine is gone: nobody learns of it by this, and what it was sending is lost."""
        for end in list(process.ends):
            end.lost = True
            self._forget(end)

    def reset(self, dead: Process) -> None:
        """Its machine is up again and knows of no connection: who still talks to it is told so."""
        for end in [e for e in self.ends if e.open and e.other.process is dead]:
            self.cut(end)

    def blocked(self, source: str, target: str) -> bool:
        return self._blocked.get((source, target), 0) > 0

    def block(self, source: str, target: str) -> None:
        """Nothing comes through in this direction until ``heal``."""
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        left = self._blocked[source, target] - 1
        if left:
            self._blocked[source, target] = left
            return
        del self._blocked[source, target]
        for end in list(self.ends):
            if end.held and (end.process.name, end.other.process.name) == (source, target):
                waiting, end.held = end.held, deque()
                for item in waiting:
                    self._travel(end, item, 0)
