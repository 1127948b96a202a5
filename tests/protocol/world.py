"""A whole cluster in one thread: the real coordinator, servers and clients, over a network that does as it is told.

Every message is delivered by ``World.run``, one after the other, unless its way is ``held``. What each process does is
written down in the order in which it does it: what it logs, applies and writes to disk, then what it sends.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import greenlet  # type: ignore[import-untyped,unused-ignore]

from headwater.client.client import Client
from headwater.client.dense.table import DenseTable
from headwater.client.session import TURN
from headwater.cluster.coordinator import Coordinator, Rules
from headwater.cluster.effects import Effects
from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken, ProtocolError, Unreachable
from headwater.server import COORDINATOR
from headwater.server.control import Control
from headwater.server.node import Setting
from headwater.server.replication.disk import DiskLog
from headwater.server.replication.log import Log
from headwater.server.replication.records import Record
from headwater.server.server import Server
from headwater.server.shard import Shard
from headwater.server.snapshots.keeper import Keeper
from headwater.testing.versions import SimPartStore
from headwater.transports.stream import Handler
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing
from tests.protocol.text import Names, values

COORD = "coord"
TICK = 0.1  # seconds between two ticks of a process
GRACE = 0.3  # seconds in which a worker whose connection broke may come back


@dataclass(eq=False)
class End:
    """One side of a connection; ``peer`` is its number at the process that has it."""

    process: Process
    peer: int
    other: End | None = None
    open: bool = True

    @property
    def there(self) -> Process:
        assert self.other is not None
        return self.other.process


@dataclass
class Message:
    """On its way from ``source``. Without ``frame``: the connection is closed."""

    source: End
    frame: Frame | None


class Process:
    """Something with a name and connections."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.ends: dict[int, End] = {}
        self._peers = 0

    def adopt(self, peer: int | None = None) -> End:
        self._peers += 1
        end = End(self, self._peers if peer is None else peer)
        self.ends[end.peer] = end
        return end

    def take(self, end: End, frame: Frame) -> None:
        """A frame arrives."""
        raise NotImplementedError

    def closed(self, end: End) -> None:
        """A connection ended."""
        raise NotImplementedError

    def tick(self) -> None:
        """Time has passed."""

    def say(self, text: str) -> None:
        self.world.say(self, text)

    def send(self, end: End, frame: Frame, *, close: bool = False) -> None:
        if not end.open:
            return
        self.say(f"-> {end.there.name}  {self.world.names.frame(frame)}{self.world.holds(end)}")
        payload = None if frame.payload is None else memoryview(bytearray(frame.payload))
        self.world.queue.append(Message(end, replace(frame, payload=payload, payload_length=len(payload or b""))))
        if close:
            self.hang_up(end)

    def hang_up(self, end: End) -> None:
        if end.open:
            end.open = False
            self.ends.pop(end.peer, None)
            self.world.queue.append(Message(end, None))

    def carry_out(self, instructions: Sequence[Instruction]) -> None:
        for x in instructions:
            if isinstance(x, Dial):
                self.say(f"dials {x.address}")
                self.world.dials.append((self, x))
            elif x.peer in self.ends:
                self._out(x)

    def _out(self, x: Outgoing) -> None:
        end = self.ends[x.peer]
        self.send(end, x.frame, close=x.close)
        if x.close:
            self.closed(end)

    def dialed(self, dial: Dial, there: Process | None) -> None:
        raise NotImplementedError


class CoordProcess(Process):
    """The coordinator: after each event, its ``Effects`` in the order of their fields."""

    def __init__(self, world: World, rules: Rules, folder: Path) -> None:
        super().__init__(world, COORD)
        self.machine = Coordinator(rules, world.now, world.store)
        self.keeper = Keeper(folder, wall=lambda: 0.0, threads=False)

    def begin(self) -> None:
        self._do(self.machine.start())

    def _do(self, effects: Effects) -> None:
        for key, value in effects.durable.items():
            if value is None:
                self.world.store.pop(key, None)
            else:
                self.world.store[key] = value
        if effects.durable:
            self.say("durable: " + ", ".join(self._kept(*item) for item in sorted(effects.durable.items())))
        for job in effects.jobs:
            self.say(f"job {type(job).__name__}")
            self.keeper.do(job)
        self.carry_out(effects.send)

    def _kept(self, key: str, value: bytes | None) -> str:
        if value is None:
            return f"no {key}"
        view = self.machine.fleet.views.get(int(key.split("/")[1])) if key.startswith("view/") else None
        return key if view is None else f"{key} ({self.world.names.message(view).split(' ', 3)[3]})"

    def take(self, end: End, frame: Frame) -> None:
        self._do(self.machine.receive(end.peer, frame, self.world.now))

    def closed(self, end: End) -> None:
        self._do(self.machine.disconnected(end.peer, self.world.now))

    def beat(self, server: ServerProcess) -> None:
        """A heartbeat, which comes over a connection of its own. It is not written down."""
        body = m.pack(server.machine.heartbeat())
        self._do(self.machine.receive(-1 - server.number, Frame(Kind.NOTICE, body=body), self.world.now))

    def tick(self) -> None:
        for process in self.world.processes.values():
            if isinstance(process, ServerProcess) and (process.name, self.name) not in self.world.held:
                self.beat(process)
        self._do(self.machine.tick(self.world.now))
        while (outcome := self.keeper.poll()) is not None:
            self.say(f"job done: {type(outcome).__name__}")
            self._do(self.machine.finished(outcome, self.world.now))

    def dialed(self, dial: Dial, there: Process | None) -> None:
        self._do(self.machine.dialed(dial.key, there is not None, self.world.now))


class ServerProcess(Process):
    """A server: a host's loop of ``receive``, ``work``, ``sync``."""

    def __init__(self, world: World, number: int, rules: Rules, folder: Path | None) -> None:
        super().__init__(world, f"s{number}")
        self.number = number
        self.session = 0x5E00 + number
        world.names.sessions[self.session] = self.name
        if folder is not None:
            folder.mkdir(exist_ok=True)
        setting = Setting(number, rules.shards, rules.min_copies, threads=False, session=self.session, data=folder)
        self.copies: list[Callable[[], None]] = []  # of versions, which a thread would make meanwhile
        setting.part_store = SimPartStore(number, rules.shards, self.copies.append)
        self.machine = Server(setting)

        self._join = m.Join("server", self.session, address=self.name)
        self._welcome: m.Welcome | None = None

    def join(self) -> None:
        end = self.world.connect(self, self.world.processes[COORD], COORDINATOR)
        self.send(end, Frame(Kind.REQUEST, seq=1, body=m.pack(self._join)))

    def _welcomed(self, welcome: m.Reply) -> None:
        assert isinstance(welcome, m.Welcome)
        self._welcome = welcome
        stop, clock = partial(self.world.kill, self.name), lambda: self.world.now
        self.machine.answer_to(Control(self.machine, self._join, welcome, COORD, stop, clock))

    def take(self, end: End, frame: Frame) -> None:
        if frame.kind == Kind.REPLY and self._welcome is None:
            self._welcomed(m.unpack_reply(frame.body))
            return
        try:
            if frame.payload is not None:
                data, frame.payload = frame.payload, None
                frame.payload = self.machine.landing(end.peer, frame)
                frame.payload[:] = data
            out = self.machine.receive(end.peer, frame)
        except HeadwaterError as error:
            refusal = Outgoing(end.peer, Frame(Kind.ERROR, body=m.error_body(error)), close=True)
            out = [refusal] if isinstance(error, ProtocolError) else []
        self.turn(out)

    def turn(self, out: Sequence[Instruction]) -> None:
        """As the loop does: send, do what was accepted, let the disk have it."""
        self.carry_out(out)
        self.carry_out(self.machine.work())
        self.carry_out(self.machine.sync())

    def closed(self, end: End) -> None:
        self.turn(self.machine.closed(end.peer))

    def tick(self) -> None:
        for node in self.machine.nodes.values():
            node.part.advance(1 << 30)
        self.turn(self.machine.tick(self.world.now))

    def copy(self) -> None:
        """The copies of versions that are under way are made."""
        copies, self.copies = self.copies, []
        for act in copies:
            act()
        self.turn(self.machine.woken())

    def dialed(self, dial: Dial, there: Process | None) -> None:
        peer = COORDINATOR if dial.key == COORDINATOR else None
        end = None if there is None else self.world.connect(self, there, peer)
        self.turn(self.machine.dialed(dial.key, None if end is None else end.peer))


class ClientLink:
    """A client's connection, as ``transports.stream.StreamLink`` is one."""

    shared = False

    def __init__(self, client: ClientProcess, end: End, handler: Handler) -> None:
        self.error: HeadwaterError | None = None
        self._client, self._end, self._handler = client, end, handler
        client.links[end.peer] = self

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        if self.error is not None:
            raise self.error
        self._client.send(self._end, frame)

    def arrive(self, frame: Frame) -> None:
        try:
            if frame.payload is not None:
                self._handler.landing(frame)[:] = frame.payload
            self._handler.receive(frame, ())
        except HeadwaterError as error:
            self.error = error
            self._client.hang_up(self._end)

    def hung_up(self) -> None:
        self.error = self.error or LinkBroken("the other side closed the connection")

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        world = self._client.world
        while not done():
            if self.error is not None:
                raise self.error
            stirred = self._client.park()
            over = stirred is not self and deadline - world.now <= TURN  # let it look at its other links
            if not done() and self.error is None and (over or world.now >= deadline):
                raise DeadlineExceeded("nothing came")

    def prefetch(self, done: Callable[[], bool]) -> None:
        """What arrives is taken at once anyway."""

    def close(self) -> None:
        self.error = self.error or LinkBroken("this client has closed the connection")
        self._client.hang_up(self._end)


class ClientProcess(Process):
    """A worker: a real ``Client``, whose calls wait in a greenlet. It is the client's ``Runtime`` too."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.rank = int(name[1:])
        self.session = 0x3000 + self.rank
        world.names.sessions[self.session] = name
        self.links: dict[int, ClientLink] = {}
        self.client: Client | None = None
        self.tables: dict[str, DenseTable] = {}
        self._call: Any = None
        self._hub: Any = None

    # ---- as the client's runtime ---------------------------------------------------------------------

    def now(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.now < until:
            self.park()

    def every(self, period: float, act: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def token(self) -> int:
        return self.session

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def dial(self, view: m.ShardView | None, handler: Handler) -> ClientLink:
        there = self.world.processes.get(COORD if view is None else view.address)
        if there is None:
            raise Unreachable("nobody listens there")
        return ClientLink(self, self.world.connect(self, there), handler)

    # ---- calls ---------------------------------------------------------------------------------------

    def call(self, act: Callable[[], str]) -> None:
        """Do this, as far as it goes without waiting; the rest when something comes."""
        assert self._call is None, f"{self.name} is still in the call before"
        self._call = greenlet.greenlet(lambda link: self._body(act))
        self.resume(None)

    def _body(self, act: Callable[[], str]) -> None:
        try:
            said = act()
        except HeadwaterError as error:
            said = f"{error.code}: {error}"
        self._call = None
        if said:
            self.say(f"returns: {said}")

    def resume(self, link: ClientLink | None) -> None:
        if self._call is not None:
            self._hub = greenlet.getcurrent()
            self._call.switch(link)

    def park(self) -> ClientLink | None:
        """Until something comes (over this link) or time passes."""
        found: ClientLink | None = self._hub.switch(None)
        return found

    def join(self, world: int) -> None:
        def act() -> str:
            self.client = Client(
                self.dial,
                role="worker",
                rank=self.rank,
                world=world,
                timeout=300.0,
                runtime=self,  # type: ignore[arg-type]
            )
            return ""

        self.call(act)

    def take(self, end: End, frame: Frame) -> None:
        link = self.links[end.peer]
        link.arrive(frame)
        self.resume(link)

    def closed(self, end: End) -> None:
        link = self.links.pop(end.peer, None)
        if link is not None:
            link.hung_up()
            self.resume(link)

    def tick(self) -> None:
        """Whoever waits looks at the clock. A heartbeat finds out that the coordinator is another one."""
        if (
            self._call is None
            and self.client is not None
            and not any(e.there.name == COORD for e in self.ends.values())
        ):
            self.call(self._beat)
        self.resume(None)

    def _beat(self) -> str:
        assert self.client is not None
        self.client._heartbeat()
        return ""


class ReaderProcess(Process):
    """A reader that speaks the protocol of versions by hand."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.session = 0x4000
        world.names.sessions[self.session] = name
        self.control = world.connect(self, world.processes[COORD])

    def join(self) -> None:
        self.ask(self.control, m.Join("reader", self.session))

    def ask(self, end: End, request: m.Request) -> None:
        self.send(end, Frame(Kind.REQUEST, seq=1, body=m.pack(request)))

    def take(self, end: End, frame: Frame) -> None:
        """It only listens."""

    def closed(self, end: End) -> None:
        """It only listens."""


class _Spy:
    """Called as a class's attribute without becoming a method."""

    def __init__(self, act: Callable[[Shard, Record], None]) -> None:
        self._act = act

    def __call__(self, shard: Shard, record: Record) -> None:
        self._act(shard, record)


class World:
    """``processes`` by name. ``lines``: what has happened since it was last asked."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.names = Names()
        self.processes: dict[str, Process] = {}
        self.queue: deque[Message] = deque()
        self.dials: deque[tuple[Process, Dial]] = deque()
        self.held: set[tuple[str, str]] = set()
        self.lines: list[str] = []
        self.store: dict[str, bytes] = {}  # what the coordinator has made durable
        self.folder = folder
        self.rules = Rules()
        self._header = ""
        self._values: dict[tuple[str, int, int], str] = {}  # as they were when they were last said

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what shards and disks do is written down."""
        append, write, sync = Log.append, DiskLog.append, DiskLog.sync

        def appended(log: Log, record: Record) -> None:
            self._note(f"log {record.lsn}: {self.names.record(record.body)}")
            append(log, record)

        def written(disk: DiskLog, record: Record) -> None:
            self._note(f"write {record.lsn} to the disk log")
            write(disk, record)

        def synced(disk: DiskLog) -> None:
            dirty = disk.dirty
            sync(disk)
            if dirty:
                self._note("sync the disk log")

        with (
            patch.object(Log, "append", appended),
            patch.object(DiskLog, "append", written),
            patch.object(DiskLog, "sync", synced),
            patch.object(Shard, "observer", _Spy(self._applied)),
        ):
            yield

    # ---- what is written down ------------------------------------------------------------------------

    @contextlib.contextmanager
    def block(self, header: str, process: Process) -> Iterator[None]:
        """What ``process`` does about one event."""
        before, self._header, self._acting = self._header, header, process
        yield
        self._header = before

    def say(self, process: Process, text: str) -> None:
        if self._header:
            self.lines.append(self._header)
            self._header = ""
        self.lines.append(f"    {_anonymous(text)}")

    def _note(self, text: str) -> None:
        self.say(self._acting, text)

    def _applied(self, shard: Shard, record: Record) -> None:
        name, changed = self._acting.name, []
        for number, table in shard.tables.items():
            key, now = (name, shard.number, number), values(table)
            if self._values.get(key) != now:
                changed.append(f"{self.names.table(number)} = {now}")
            self._values[key] = now
        self._note(f"apply {record.lsn}" + (f": {', '.join(changed)}" if changed else ""))

    def holds(self, end: End) -> str:
        return " (held)" if (end.process.name, end.there.name) in self.held else ""

    # ---- connections ---------------------------------------------------------------------------------

    def connect(self, here: Process, there: Process, peer: int | None = None) -> End:
        near, far = here.adopt(peer), there.adopt()
        near.other, far.other = far, near
        return near

    def run(self) -> None:
        """Until nothing moves any more."""
        while self.step():
            pass

    def step(self) -> bool:
        if self.dials:
            self._dial(*self.dials.popleft())
            return True
        for message in self.queue:
            if (message.source.process.name, message.source.there.name) not in self.held:
                self.queue.remove(message)
                self._deliver(message)
                return True
        return False

    def _dial(self, process: Process, dial: Dial) -> None:
        if self.processes.get(process.name) is not process:
            return
        there = self.processes.get(dial.address)
        found = "" if there is not None else ": nobody listens"
        with self.block(f"{process.name} has dialed {dial.address}{found}", process):
            process.dialed(dial, there)

    def _deliver(self, message: Message) -> None:
        end = message.source.other
        assert end is not None
        if not end.open:
            return
        process, source = end.process, message.source.process.name
        if message.frame is None:
            end.open = False
            process.ends.pop(end.peer, None)
            with self.block(f"{process.name} has lost its connection to {source}", process):
                process.closed(end)
            return
        with self.block(f"{process.name} <- {source}  {self._short(message.frame)}", process):
            process.take(end, message.frame)
            if self._header and not isinstance(process, ClientProcess | ReaderProcess):
                self.lines.append(self._header)  # nothing follows from it, or not yet

    def _short(self, frame: Frame) -> str:
        """Enough to know which of the messages above it is."""
        words = self.names.frame(frame).split()
        if frame.kind in (Kind.REQUEST, Kind.REPLY, Kind.NOTICE, Kind.RECORD, Kind.ACCEPT):
            return " ".join(words[:2]).rstrip(":")
        return f"PUSH seq {frame.seq}" if frame.kind == Kind.PUSH else frame.kind.name

    # ---- what a script can do -------------------------------------------------------------------------

    def tick(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            for process in list(self.processes.values()):
                with self.block(f"{process.name}, as time passes", process):
                    process.tick()
                self.run()

    def kill(self, name: str) -> None:
        """The process ends. What is held on its way to it or from it is lost, the rest has arrived."""
        process = self.processes.pop(name)
        for message in [q for q in self.queue if process in (q.source.process, q.source.there)]:
            self.queue.remove(message)
            if message.frame is not None:
                way = f"{message.source.process.name} -> {message.source.there.name}"
                self.lines.append(f"lost: {way}  {self.names.frame(message.frame)}")
        for end in list(process.ends.values()):
            process.hang_up(end)
        self.held = {way for way in self.held if name not in way}

    def cut(self, one: str, two: str) -> None:
        """Their connections break; what is held on them is lost."""
        for end in [e for e in self.processes[one].ends.values() if e.there.name == two]:
            assert end.other is not None
            for message in [q for q in self.queue if q.source in (end, end.other)]:
                self.queue.remove(message)
                if message.frame is not None:
                    way = f"{message.source.process.name} -> {message.source.there.name}"
                    self.lines.append(f"lost: {way}  {self.names.frame(message.frame)}")
            self.queue += [Message(end, None), Message(end.other, None)]


def _anonymous(text: str) -> str:
    """Without what another machine or another run has otherwise."""
    return re.sub(rf"\b{os.getpid()}\b", "PID", text).replace(platform.node() or "HOST", "HOST")
