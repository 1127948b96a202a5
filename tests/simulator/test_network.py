"""Connections of the simulator behave as TCP's: ordered, silent when blocked, broken as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from headwater.client.session import Session
from headwater.errors import DeadlineExceeded, LinkBroken, Unreachable
from headwater.testing.links import SimRuntime
from headwater.testing.network import End, Network
from headwater.testing.processes import Process
from headwater.testing.scheduler import Scheduler, Stuck
from headwater.testing.times import Jitter
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind


@dataclass
class Sink:
    frames: list[Frame] = field(default_factory=list)
    hung: int = 0

    def arrived(self, end: End, frame: Frame) -> None:
        self.frames.append(frame)

    def hung_up(self, end: End) -> None:
        self.hung += 1


class Stage:
    """Two processes and a connection between them."""

    def __init__(self, seed: int = 1) -> None:
        self.scheduler = Scheduler()
        self.network = Network(self.scheduler, Jitter(), Random(seed))
        self.a, self.b = Process(self.scheduler, "a"), Process(self.scheduler, "b")
        self.sinks = Sink(), Sink()
        self.far: list[End] = []
        self.near: list[End] = []
        self.network.listen("sim://b", self.b, self._accept)
        self.network.connect(self.a, "sim://b", self._connected)
        self.settle()

    def _accept(self, end: End) -> None:
        end.receiver = self.sinks[1]
        self.far.append(end)

    def _connected(self, end: End | None) -> None:
        assert end is not None
        end.receiver = self.sinks[0]
        self.near.append(end)

    def settle(self, seconds: float = 1.0) -> None:
        with pytest.raises(Stuck):
            self.scheduler.run(lambda: False, limit=self.scheduler.now + seconds, events=10_000)

    def send(self, *seqs: int) -> None:
        for seq in seqs:
            self.network.send(self.near[0], Frame(Kind.NOTICE, seq=seq))

    @property
    def got(self) -> list[int]:
        return [frame.seq for frame in self.sinks[1].frames]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_sent_arrives_in_order(seed: int) -> None:
    stage = Stage(seed)
    stage.send(*range(50))
    stage.settle()
    assert stage.got == list(range(50))


def test_a_blocked_direction_is_silent_and_loses_nothing() -> None:
    stage = Stage()
    stage.network.block("a", "b")
    stage.send(1, 2)
    stage.settle()
    assert stage.got == []
    stage.network.heal("a", "b")
    stage.send(3)
    stage.settle()
    assert stage.got == [1, 2, 3]
    assert stage.sinks[1].hung == 0


def test_a_broken_connection_loses_what_is_on_its_way_and_tells_both() -> None:
    stage = Stage()
    stage.send(1)
    stage.network.cut(stage.near[0])
    stage.send(2)
    stage.settle()
    assert stage.got == []
    assert (stage.sinks[0].hung, stage.sinks[1].hung) == (1, 1)


def test_a_killed_process_sent_what_it_sent_and_a_machine_that_is_gone_says_nothing() -> None:
    stage = Stage()
    stage.send(1)
    stage.a.die()
    stage.network.hang_up(stage.a)
    stage.settle()
    assert (stage.got, stage.sinks[1].hung) == ([1], 1)
    stage = Stage()
    stage.a.die(vanish=True)
    stage.network.abandon(stage.a)
    stage.settle()
    assert (stage.got, stage.sinks[1].hung) == ([], 0)


def test_a_payload_is_read_late_as_a_sender_thread_does_and_not_after_a_close() -> None:
    stage = Stage()
    memory = bytearray(b"old")
    stage.near[0].late = True
    stage.network.send(stage.near[0], Frame(Kind.PUSH, stop=3, payload=memoryview(memory)))
    memory[:] = b"new"
    stage.settle()
    assert bytes(stage.sinks[1].frames[0].payload or b"") == b"new"
    stage.network.block("a", "b")
    stage.network.send(stage.near[0], Frame(Kind.PUSH, stop=3, payload=memoryview(memory)))
    stage.network.close(stage.near[0])
    memory[:] = b"xxx"
    stage.network.heal("a", "b")
    stage.settle()
    assert bytes(stage.sinks[1].frames[1].payload or b"") == b"new"


class Echo:
    """Answers every request with Done, a little later."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        network.listen("sim://coordinator", process, self._accept)

    def _accept(self, end: End) -> None:
        end.receiver = self

    def arrived(self, end: End, frame: Frame) -> None:
        self._network.send(end, Frame(Kind.REPLY, seq=frame.seq, body=m.pack(m.Done())))

    def hung_up(self, end: End) -> None:
        self._network.close(end)


def _asks(block: bool, cut: bool) -> tuple[list[object], float]:
    scheduler = Scheduler()
    network = Network(scheduler, Jitter(), Random(1))
    server, client = Process(scheduler, "coordinator"), Process(scheduler, "w", offset=500.0, rate=1.01)
    Echo(network, server)
    found: list[object] = []

    def body() -> None:
        runtime = SimRuntime(scheduler, network, client, Random(2), lambda frame: None)
        session = Session("echo", 7, runtime)
        session.link = runtime.dial(None, session)
        if block:
            network.block("coordinator", "w")
        if cut:
            scheduler.after(0.0, network.cut, client.ends[0])
        session.link.send(Frame(Kind.REQUEST, seq=1, body=m.pack(m.Status())))
        answer: list[bool] = []
        session.receive = lambda frame, fds=(): answer.append(True)  # type: ignore[method-assign,assignment]
        try:
            session.link.pump(lambda: bool(answer), runtime.now() + 3.0)
            found.append(True)
        except (DeadlineExceeded, LinkBroken) as error:
            found.append(type(error))

    client.fibre(body)
    scheduler.run(lambda: bool(found), limit=60.0, events=1000)
    return found, scheduler.now


def test_a_client_that_waits_is_a_fibre_that_waits() -> None:
    found, now = _asks(block=False, cut=False)
    assert found == [True]
    assert now < 0.1


def test_a_client_keeps_its_deadline_when_nobody_answers() -> None:
    found, now = _asks(block=True, cut=False)
    assert found == [DeadlineExceeded]
    assert 2.9 < now < 3.1


def test_a_client_is_told_of_a_broken_connection() -> None:
    found, now = _asks(block=False, cut=True)
    assert found == [LinkBroken]
    assert now < 0.1


def test_nobody_listens() -> None:
    scheduler = Scheduler()
    network = Network(scheduler, Jitter(), Random(1))
    client = Process(scheduler, "w")
    found: list[str] = []

    def body() -> None:
        try:
            runtime = SimRuntime(scheduler, network, client, Random(2), lambda frame: None)
            runtime.dial(None, Session("x", 1, runtime))
        except Unreachable as error:
            found.append(str(error))

    client.fibre(body)
    scheduler.run(lambda: bool(found), limit=10.0, events=100)
    assert "nobody answers" in found[0]
