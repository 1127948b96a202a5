"""What a table's part on one shard sends again, and under which numbers, when its link breaks or a worker dies."""

from __future__ import annotations

from typing import cast

import pytest

from headwater.client.dense.geometry import ShardGeometry
from headwater.client.dense.memory import Mapped
from headwater.client.dense.part import DensePart
from headwater.client.session import Session
from headwater.errors import LinkBroken, ProtocolError, StaleEpoch, UnknownTable, WorkerLost
from headwater.layout.dense import layout
from headwater.transports.stream import Link
from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind
from tests.client.fake_links import Line, Still

SHARED = cast("Mapped", object())  # only whether there is one matters here
SPEC = DenseSpec("t", (ParameterSpec("w", (1_200_000,)),), OptimizerSpec("SGD", ({"lr": 1.0},)), Bulk())
PLAN = layout(SPEC, 1)


@pytest.fixture
def part() -> DensePart:
    """A part of three blocks on one shard."""
    runtime = Still()
    session = Session("shard 0", 7, runtime)
    made = DensePart(session, 1, ShardGeometry(PLAN.blocks_of(0), PLAN.segments[0]), memoryview(bytearray(PLAN.size)))
    assert len(made.geometry.blocks) == 3
    session.parts[1] = made
    mend(made)
    return made


def mend(part: DensePart) -> Line:
    """A new link; the old one is forgotten."""
    line = Line(part.session, Still())
    part.session.link = cast("Link", line)
    return line


def sent(part: DensePart) -> list[tuple[int, int, int, int]]:
    """What has gone out over the present link: number, first byte, length, flags."""
    line = cast("Line", part.session.link)
    return [(f.seq, f.start, f.length, f.flags) for f in line.sent]


def ack(part: DensePart, seq: int, flags: int = Flag.END) -> None:
    part.session.receive(Frame(Kind.ACK, flags, table=1, seq=seq, lsn=seq))


def push(part: DensePart, flags: int = Flag.END) -> None:
    part.push_spans([(0, part.size)], 1, 1, flags, b"")


SIZES = [block.size for block in PLAN.blocks_of(0)]
STARTS = [block.local for block in PLAN.blocks_of(0)]


def test_what_the_shard_has_not_applied_is_sent_again_under_the_same_numbers(part: DensePart) -> None:
    push(part)
    whole = sent(part)
    assert [seq for seq, *_ in whole] == [1, 2, 3]
    assert part.base == 1
    line = mend(part)
    part.send_again(1)
    assert sent(part) == whole[1:]
    assert all(frame.payload is not None for frame in line.sent)
    ack(part, 3)
    assert part.settled()
    assert part.base == 4


def test_what_is_acknowledged_is_not_sent_again(part: DensePart) -> None:
    push(part)
    ack(part, 3)
    mend(part)
    part.send_again(3)
    assert sent(part) == []
    assert part.settled()


def test_of_an_applied_step_only_its_end_goes_once_more_and_empty(part: DensePart) -> None:
    """The acknowledgement was lost; it tells the norm."""
    push(part)
    mend(part)
    part.send_again(3)
    assert sent(part) == [(3, STARTS[2], 0, Flag.END)]
    assert not part.settled()
    ack(part, 3)
    assert part.settled()


def test_values_that_were_on_their_way_are_asked_for_again(part: DensePart) -> None:
    push(part, Flag.END | Flag.WANT)
    line = mend(part)
    part.send_again(0)
    assert [f.flags for f in line.sent] == [0, 0, Flag.END | Flag.WANT], "they come with the step"
    assert not part.current()
    line = mend(part)
    part.send_again(3)
    assert [f.kind for f in line.sent] == [Kind.PUSH, Kind.PULL], "the step is applied: ask for them"
    assert line.sent[-1].length == part.size
    ack(part, 3)
    assert not part.current()
    part.arrived(Frame(Kind.DATA, Flag.END, table=1, stop=part.size))
    assert part.current()


def test_an_assignment_is_sent_again_too(part: DensePart) -> None:
    segment = part.geometry.segments[0]
    data = memoryview(bytearray(segment.end - segment.offset))
    part.assign([(segment, data)])
    assert not part.assigned()
    line = mend(part)
    part.send_again(0)
    assert [(f.kind, f.seq, f.length) for f in line.sent] == [(Kind.ASSIGN, 1, len(data))]
    ack(part, 1)
    assert part.assigned()


def test_from_shared_memory_to_bytes_the_frames_are_numbered_anew(part: DensePart) -> None:
    """The new primary is on another host: a doorbell becomes a frame per block."""
    part.mapped = SHARED
    push(part, Flag.NONE)
    push(part)
    assert sent(part) == [(1, 0, part.size, Flag.SHARED), (2, 0, part.size, Flag.SHARED | Flag.END)]
    part.mapped = None
    line = mend(part)
    part.send_again(1)
    assert sent(part) == [
        (2, STARTS[0], SIZES[0], 0),
        (3, STARTS[1], SIZES[1], 0),
        (4, STARTS[2], SIZES[2], Flag.END),
    ]
    assert all(frame.payload is not None for frame in line.sent)
    ack(part, 4)
    assert part.settled()


def test_from_bytes_to_shared_memory_they_become_doorbells(part: DensePart) -> None:
    push(part)
    part.mapped = SHARED
    line = mend(part)
    part.send_again(1)
    assert sent(part) == [(2, STARTS[1], SIZES[1], Flag.SHARED), (3, STARTS[2], SIZES[2], Flag.SHARED | Flag.END)]
    assert all(frame.payload is None for frame in line.sent)


def test_a_step_that_a_death_undid_is_pushed_again_with_new_numbers_under_the_new_membership(part: DensePart) -> None:
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


def test_any_other_refusal_is_an_error_and_giving_up_forgets_what_was_sent(part: DensePart) -> None:
    push(part)
    part.failed(Frame(Kind.ERROR, seq=3, table=1), UnknownTable("no such table"))
    assert isinstance(part.error, UnknownTable)
    assert part.settled()
    part.give_up()
    mend(part)
    part.send_again(0)
    assert sent(part) == []
    push(part)
    assert [seq for seq, *_ in sent(part)] == [4, 5, 6], "numbers are never used twice"


def test_a_primary_that_was_replaced_is_a_broken_link(part: DensePart) -> None:
    for seq in (0, 1):
        with pytest.raises(LinkBroken):
            part.session.receive(Frame(Kind.ERROR, table=1, seq=seq, body=m.error_body(StaleEpoch("go elsewhere"))))
    assert part.error is None


def test_damaged_pushes_are_counted_until_an_answer_comes(part: DensePart) -> None:
    for _ in range(3):
        with pytest.raises(LinkBroken):
            part.session.receive(Frame(Kind.ERROR, body=m.error_body(ProtocolError("damaged"))))
    assert part.session.damaged == 3
    ack(part, 0)
    assert part.session.damaged == 0
