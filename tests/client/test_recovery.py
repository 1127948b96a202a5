"""What a client sends again, and whom it asks, when links break. No sockets: links are scripted, time stands still."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import pytest

from headwater.client.client import UNSERVED, Client
from headwater.client.control import BRIEF, Control
from headwater.client.dense.memory import Mapped
from headwater.client.dense.part import Part
from headwater.client.session import Session
from headwater.errors import (
    ClusterError,
    DeadlineExceeded,
    HeadwaterError,
    LinkBroken,
    ProtocolError,
    StaleEpoch,
    UnknownTable,
    Unreachable,
    WorkerLost,
)
from headwater.layout.dense import layout
from headwater.testing import FakeClock
from headwater.transports.stream import Handler, Link
from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

Answer = m.Reply | HeadwaterError | None
SHARED = cast("Mapped", object())  # only whether there is one matters here


class Still:
    """A runtime whose time moves by sleeping only."""

    def __init__(self) -> None:
        self.now = FakeClock(100.0)

    def sleep(self, seconds: float) -> None:
        self.now.advance(seconds)

    def every(self, period: float, act: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def lock(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def token(self) -> int:
        return 7


class Line:
    """A link; ``answer`` says what comes back for a request (None: nothing, and time runs out)."""

    shared = False

    def __init__(self, handler: Handler, runtime: Still, answer: Callable[[m.Request], Answer] | None = None) -> None:
        self.sent: list[Frame] = []
        self.error: HeadwaterError | None = None
        self.closed = False
        self._handler, self._runtime, self._answer = handler, runtime, answer

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(replace(frame))
        if frame.kind == Kind.REQUEST and self._answer is not None:
            try:
                answer = self._answer(m.unpack_request(frame.body))
            except LinkBroken as error:
                self.error = error
                return
            if isinstance(answer, HeadwaterError):
                self._handler.receive(Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(answer)), ())
            elif answer is not None:
                self._handler.receive(Frame(Kind.REPLY, seq=frame.seq, body=m.pack(answer)), ())

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        if self.error is not None and not done():
            raise self.error
        if not done():
            self._runtime.now.advance(max(0.0, deadline - self._runtime.now()))
            raise DeadlineExceeded("nothing came")

    def prefetch(self, done: Callable[[], bool]) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.error = self.error or LinkBroken("closed")


# ---- parts -------------------------------------------------------------------------------------------

SPEC = DenseSpec("t", (ParameterSpec("w", (1_200_000,)),), OptimizerSpec("SGD", ({"lr": 1.0},)), Bulk())
PLAN = layout(SPEC, 1)


@pytest.fixture
def part() -> Part:
    """A part of three blocks on one shard."""
    runtime = Still()
    session = Session("shard 0", 7, runtime)
    made = Part(session, 1, PLAN.blocks_of(0), PLAN.segments[0])
    assert len(made.blocks) == 3
    made.flat_gradients = made.flat_values = memoryview(bytearray(PLAN.size))
    session.parts[1] = made
    mend(made)
    return made


def mend(part: Part) -> Line:
    """A new link; the old one is forgotten."""
    line = Line(part.session, Still())
    part.session.link = cast("Link", line)
    return line


def sent(part: Part) -> list[tuple[int, int, int, int]]:
    """What has gone out over the present link: number, first byte, length, flags."""
    line = cast("Line", part.session.link)
    return [(f.seq, f.start, f.length, f.flags) for f in line.sent]


def ack(part: Part, seq: int, flags: int = Flag.END) -> None:
    part.session.receive(Frame(Kind.ACK, flags, table=1, seq=seq, lsn=seq))


def push(part: Part, flags: int = Flag.END) -> None:
    part.push([(0, part.size)], 1, 1, flags, b"")


SIZES = [block.size for block in PLAN.blocks_of(0)]
STARTS = [block.local for block in PLAN.blocks_of(0)]


def test_what_the_shard_has_not_applied_is_sent_again_under_the_same_numbers(part: Part) -> None:
    push(part)
    whole = sent(part)
    assert [seq for seq, *_ in whole] == [1, 2, 3]
    assert part.base == 1
    line = mend(part)
    part.resume(1)
    assert sent(part) == whole[1:]
    assert all(frame.payload is not None for frame in line.sent)
    ack(part, 3)
    assert part.settled()
    assert part.base == 4


def test_what_is_acknowledged_is_not_sent_again(part: Part) -> None:
    push(part)
    ack(part, 3)
    mend(part)
    part.resume(3)
    assert sent(part) == []
    assert part.settled()


def test_of_an_applied_step_only_its_end_goes_once_more_and_empty(part: Part) -> None:
    """The acknowledgement was lost; it tells the norm."""
    push(part)
    mend(part)
    part.resume(3)
    assert sent(part) == [(3, STARTS[2], 0, Flag.END)]
    assert not part.settled()
    ack(part, 3)
    assert part.settled()


def test_values_that_were_on_their_way_are_asked_for_again(part: Part) -> None:
    push(part, Flag.END | Flag.WANT)
    line = mend(part)
    part.resume(0)
    assert [f.flags for f in line.sent] == [0, 0, Flag.END | Flag.WANT], "they come with the step"
    assert not part.current()
    line = mend(part)
    part.resume(3)
    assert [f.kind for f in line.sent] == [Kind.PUSH, Kind.PULL], "the step is applied: ask for them"
    assert line.sent[-1].length == part.size
    ack(part, 3)
    assert not part.current()
    part.arrived(Frame(Kind.DATA, Flag.END, table=1, start=0, length=part.size))
    assert part.current()


def test_an_assignment_is_sent_again_too(part: Part) -> None:
    segment = part.segments[0]
    data = memoryview(bytearray(segment.end - segment.offset))
    part.assign([(segment, data)])
    assert not part.assigned_or_failed()
    line = mend(part)
    part.resume(0)
    assert [(f.kind, f.seq, f.length) for f in line.sent] == [(Kind.ASSIGN, 1, len(data))]
    ack(part, 1)
    assert part.assigned_or_failed()


def test_from_shared_memory_to_bytes_the_frames_are_numbered_anew(part: Part) -> None:
    """The new primary is on another host: a doorbell becomes a frame per block."""
    part.mapped = SHARED
    push(part, Flag.NONE)
    push(part)
    assert sent(part) == [(1, 0, part.size, Flag.SHARED), (2, 0, part.size, Flag.SHARED | Flag.END)]
    part.mapped = None
    line = mend(part)
    part.resume(1)
    assert sent(part) == [
        (2, STARTS[0], SIZES[0], 0),
        (3, STARTS[1], SIZES[1], 0),
        (4, STARTS[2], SIZES[2], Flag.END),
    ]
    assert all(frame.payload is not None for frame in line.sent)
    ack(part, 4)
    assert part.settled()


def test_from_bytes_to_shared_memory_they_become_doorbells(part: Part) -> None:
    push(part)
    part.mapped = SHARED
    line = mend(part)
    part.resume(1)
    assert sent(part) == [(2, STARTS[1], SIZES[1], Flag.SHARED), (3, STARTS[2], SIZES[2], Flag.SHARED | Flag.END)]
    assert all(frame.payload is None for frame in line.sent)


def test_a_step_that_a_death_undid_is_pushed_again_with_new_numbers_under_the_new_membership(part: Part) -> None:
    push(part, Flag.END | Flag.WANT)
    part.failed(Frame(Kind.ERROR, seq=3, table=1, members=2), WorkerLost("worker 1 died"))
    assert part.lost is not None
    assert part.error is None
    assert part.finished(), "whoever waits looks now"
    line = mend(part)
    part.push_again(2)
    assert [(f.seq, f.members, f.flags) for f in line.sent] == [(4, 2, 0), (5, 2, 0), (6, 2, Flag.END | Flag.WANT)]
    for seq in (1, 2, 3):  # the others of the old step are refused, too
        part.failed(Frame(Kind.ERROR, seq=seq, table=1, members=2), WorkerLost("worker 1 died"))
    assert part.lost is None, "that is old news"
    ack(part, 6)
    assert part.settled()
    part.failed(Frame(Kind.ERROR, seq=9, table=1, members=3), WorkerLost("worker 2 died"))
    assert part.lost is not None, "and this is not"


def test_any_other_refusal_is_an_error_and_giving_up_forgets_what_was_sent(part: Part) -> None:
    push(part)
    part.failed(Frame(Kind.ERROR, seq=3, table=1), UnknownTable("no such table"))
    assert isinstance(part.error, UnknownTable)
    assert part.settled()
    part.give_up()
    mend(part)
    part.resume(0)
    assert sent(part) == []
    push(part)
    assert [seq for seq, *_ in sent(part)] == [4, 5, 6], "numbers are never used twice"


def test_a_primary_that_was_replaced_is_a_broken_link(part: Part) -> None:
    for seq in (0, 1):
        with pytest.raises(LinkBroken):
            part.session.receive(Frame(Kind.ERROR, table=1, seq=seq, body=m.error_body(StaleEpoch("go elsewhere"))))
    assert part.error is None


def test_damaged_pushes_are_counted_until_an_answer_comes(part: Part) -> None:
    for _ in range(3):
        with pytest.raises(LinkBroken):
            part.session.receive(Frame(Kind.ERROR, body=m.error_body(ProtocolError("damaged"))))
    assert part.session.damaged == 3
    ack(part, 0)
    assert part.session.damaged == 0


# ---- the coordinator ---------------------------------------------------------------------------------


class Desk:
    """Dials to the coordinator: each opens the next of ``lines``, or fails with it."""

    def __init__(self, lines: Sequence[Callable[[m.Request], Answer] | HeadwaterError]) -> None:
        self.runtime = Still()
        self.heard: list[m.Request] = []
        self.dials: list[float] = []
        self._lines = list(lines)

    def dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        self.dials.append(self.runtime.now())
        line = self._lines.pop(0) if len(self._lines) > 1 else self._lines[0]
        if isinstance(line, HeadwaterError):
            raise line

        def answer(request: m.Request) -> Answer:
            self.heard.append(request)
            return line(request)

        return cast("Link", Line(handler, self.runtime, answer))

    def control(self) -> Control:
        return Control(self.dial, m.Join("worker", 7, "host", 9, None, 2), self.runtime, 60.0)


def joined(durable: bool) -> m.Joined:
    return m.Joined(1, 2, 0.5, (m.ShardView(0, 1, "tcp://a:1", "", ""),), 1, durable)


def first(request: m.Request, durable: bool = True) -> Answer:
    """A coordinator that lets a worker in and is killed by the next question."""
    if isinstance(request, m.Join):
        return joined(durable)
    raise LinkBroken("the coordinator died")


def second(request: m.Request) -> Answer:
    return joined(True) if isinstance(request, m.Join) else m.Done()


GONE = Unreachable("nobody answers")


def test_a_question_is_asked_again_after_the_coordinator_has_come_back() -> None:
    desk = Desk([first, GONE, GONE, second])
    control = desk.control()
    assert control.ask(m.Barrier("b", 1)) == m.Done()
    again, question = desk.heard[-2:]
    assert again == m.Join("worker", 7, "host", 9, 1, 2, resume=True), "as the same member, of the rank it was given"
    assert question == m.Barrier("b", 1), "with the same turn: it may be over already"
    assert len(desk.dials) == 4


def test_a_refusal_is_an_answer_and_not_asked_again() -> None:
    desk = Desk([lambda request: joined(True) if isinstance(request, m.Join) else UnknownTable("table 9")])
    with pytest.raises(UnknownTable):
        desk.control().ask(m.Initialised(9))
    assert len(desk.dials) == 1


def test_a_worker_that_was_given_up_meanwhile_is_told_so() -> None:
    desk = Desk([first, lambda request: ClusterError("worker 1 was given up while it was away")])
    with pytest.raises(ClusterError, match="given up"):
        desk.control().ask(m.Barrier("b", 1))


@pytest.mark.parametrize("durable", [False, True])
def test_a_coordinator_that_may_come_back_is_waited_for_until_the_deadline_another_only_briefly(durable: bool) -> None:
    desk = Desk([lambda request: first(request, durable), GONE])
    control = desk.control()
    begun = desk.runtime.now()
    with pytest.raises(Unreachable):
        control.ask(m.Status())
    assert desk.runtime.now() - begun == pytest.approx(60.0 if durable else BRIEF, abs=0.3)
    assert control.gone is not durable


# ---- shards ------------------------------------------------------------------------------------------


class Town:
    """A coordinator that always answers, and servers by address. ``view`` says who leads shard 0."""

    def __init__(self) -> None:
        self.runtime = Still()
        self.view: m.ShardView | HeadwaterError = m.ShardView(0, 1, "tcp://a:1", "", "")
        self.servers: dict[str, Callable[[m.Request], Answer]] = {"tcp://a:1": self.serve}
        self.dialed: list[str] = []
        self.opened: list[m.Open] = []
        self.epoch = 1

    def dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        if view is None:
            return cast("Link", Line(handler, self.runtime, self.coordinate))
        self.dialed.append(view.address)
        if view.address not in self.servers:
            raise Unreachable(f"nobody answers at {view.address}")
        return cast("Link", Line(handler, self.runtime, self.servers[view.address]))

    def coordinate(self, request: m.Request) -> Answer:
        if isinstance(request, m.Join):
            return joined(True)
        return self.view if isinstance(request, m.Find) else m.Done()

    def serve(self, request: m.Request) -> Answer:
        if isinstance(request, m.Open):
            self.opened.append(request)
            return m.Opened(self.epoch, 5)
        return m.Done()

    def client(self) -> Client:
        return Client(self.dial, timeout=60.0, runtime=self.runtime)

    def moves(self, address: str) -> None:
        """Another server takes over."""
        self.servers = {address: self.serve}
        self.epoch += 1
        self.view = m.ShardView(0, self.epoch, address, "", "")


def test_a_shard_is_dialed_when_it_is_needed_and_not_before() -> None:
    town = Town()
    client = town.client()
    assert town.dialed == []
    client.reach(client.servers[0])
    client.reach(client.servers[0])
    assert town.dialed == ["tcp://a:1"]


def test_after_a_failover_the_client_finds_the_new_primary_and_opens_the_same_session_there() -> None:
    town = Town()
    client = town.client()
    session = client.servers[0]
    client.reach(session)
    attached: list[float] = []
    session.parts[1] = cast("Part", type("P", (), {"attach": lambda self, deadline: attached.append(deadline)})())
    town.moves("tcp://b:1")
    client.recover(session, town.runtime.now() + 60, LinkBroken("reset"))
    assert town.dialed == ["tcp://a:1", "tcp://b:1"]
    assert [(o.session, o.rank) for o in town.opened] == [(7, 1), (7, 1)]
    assert (session.epoch, session.address) == (2, "tcp://b:1")
    assert len(attached) == 1, "its tables are attached again"


def test_a_server_that_does_not_know_of_its_promotion_is_asked_again() -> None:
    town = Town()
    refusals = [StaleEpoch("not the primary")] * 3

    def late(request: m.Request) -> Answer:
        return refusals.pop() if refusals else town.serve(request)

    town.servers = {"tcp://a:1": late}
    client = town.client()
    client.reach(client.servers[0])
    assert len(town.dialed) == 4


def test_a_view_older_than_what_the_client_has_seen_is_not_followed() -> None:
    town = Town()
    client = town.client()
    session = client.servers[0]
    client.reach(session)
    session.epoch = 3
    with pytest.raises(DeadlineExceeded, match="this client has seen 3"):
        client.recover(session, town.runtime.now() + 1, LinkBroken("reset"))
    assert town.dialed == ["tcp://a:1"]


def test_a_shard_that_nobody_serves_is_waited_for_a_while_and_then_broken() -> None:
    town = Town()
    client = town.client()
    town.view = ClusterError("server 0 is dead and shard 0 has no other copy")
    begun = town.runtime.now()
    with pytest.raises(LinkBroken, match=r"no other copy; pushes .* may or may not be applied"):
        client.recover(client.servers[0], begun + 60, LinkBroken("reset"))
    assert town.runtime.now() - begun == pytest.approx(UNSERVED, abs=0.2)


def test_a_dead_primary_is_asked_for_until_somebody_takes_over_or_the_deadline() -> None:
    town = Town()
    client = town.client()
    town.servers = {}
    begun = town.runtime.now()
    with pytest.raises(DeadlineExceeded, match="shard 0 could not be reached within HEADWATER_TIMEOUT"):
        client.recover(client.servers[0], begun + 1.0, LinkBroken("reset"))
    assert len(town.dialed) > 10


def test_a_server_that_accepts_and_says_nothing_is_left_after_some_seconds() -> None:
    town = Town()
    town.servers = {"tcp://a:1": lambda request: None}
    client = town.client()
    begun = town.runtime.now()
    with pytest.raises(DeadlineExceeded, match="accepted the connection and did not answer"):
        client.recover(client.servers[0], begun + 12.0, LinkBroken("reset"))
    assert len(town.dialed) == 3
