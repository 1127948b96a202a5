"""A server that has become a copy of a shard fetches the shard's part of a version from one that holds it."""

from __future__ import annotations

from itertools import count

import msgspec
import numpy as np
import pytest

from headwater.errors import ProtocolError
from headwater.layout.dense import layout
from headwater.layout.words import spans
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec
from headwater.versions.backfill import Backfills
from headwater.versions.part_store import PartStore
from headwater.versions.parts import Key
from headwater.wire import messages as m
from headwater.wire import sums
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing

SPECS = (
    (1, DenseSpec("w", (ParameterSpec("w", (700, 1000)),), OptimizerSpec("SGD", ({"lr": 0.1},)))),
    (2, DenseSpec("b", (ParameterSpec("b", (33,), "bfloat16"),), OptimizerSpec("SGD", ({"lr": 0.1},)))),
)
HOLDER = v.Holder("tcp://127.0.0.1:1", "", "")


def holding() -> tuple[PartStore, v.Hold]:
    """A part store with version 7 of shard 0, and the order to hold it too."""
    part_store = PartStore(0)
    parts = []
    for number, spec in SPECS:
        plan = layout(spec, 1)
        buffer = part_store.pool.take(plan.size)
        buffer.array[:] = np.random.default_rng(number).integers(0, 256, plan.size, dtype=np.uint8)
        checks = sums.checksums(buffer.array)
        part_store.put(Key(7, 0, number), buffer, checks, spans(spec, plan.segments[0], plan.size))
        parts.append(v.PartDigest(number, plan.size, sums.digest(checks)))
    return part_store, v.Hold(7, 0, tuple(parts), SPECS, HOLDER)


class Pair:
    """A server that fetches and one that holds, connected: ``run`` carries frames to and fro."""

    def __init__(self) -> None:
        self.theirs, self.order = holding()
        self.mine = PartStore(1)
        self.backfills = Backfills(self.mine, count(1), None)
        self.closed = False

    def begin(self) -> None:
        (dial,) = self.backfills.begin(self.order)
        assert isinstance(dial, Dial)
        self.run(self.backfills.dialed(dial.key, 5))

    def run(self, out: list[Instruction]) -> None:
        while out:
            x = out.pop(0)
            assert isinstance(x, Outgoing)
            if x.close:
                self.closed = True
                continue
            for answer in self._answers(x.frame):
                assert isinstance(answer, Outgoing)
                self.hear(answer.frame, out)

    def _answers(self, question: Frame) -> list[Instruction]:
        self.theirs.receive(9, question)
        answers, self.theirs.outbox.frames = self.theirs.outbox.frames, []
        return answers

    def hear(self, frame: Frame, out: list[Instruction]) -> None:
        if 5 not in self.backfills:
            return
        if frame.payload is not None:
            frame.payload_length = len(frame.payload)
            self.backfills.landing(5, frame)[:] = frame.payload
        out += self.backfills.receive(5, frame)


def test_all_tables_are_fetched_checked_and_said() -> None:
    pair = Pair()
    pair.begin()
    assert pair.closed
    assert 5 not in pair.backfills
    (said,) = pair.mine.outbox.reports
    assert (said.number, said.shard, said.server, said.parts) == (7, 0, 1, pair.order.parts)
    for number, _ in SPECS:
        key = Key(7, 0, number)
        assert np.array_equal(pair.mine.parts[key].buffer.array, pair.theirs.parts[key].buffer.array)


def test_what_is_held_already_is_only_said() -> None:
    pair = Pair()
    pair.begin()
    pair.mine.outbox.reports.clear()
    assert pair.backfills.begin(pair.order) == []
    assert [done.parts for done in pair.mine.outbox.reports] == [pair.order.parts]


def test_damaged_bytes_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    hear = pair.hear

    def flip(frame: Frame, out: list[Instruction]) -> None:
        if frame.payload is not None:
            frame.payload = memoryview(bytes([frame.payload[0] ^ 1]) + bytes(frame.payload[1:]))
        hear(frame, out)

    monkeypatch.setattr(pair, "hear", flip)
    pair.begin()
    assert pair.closed
    assert not pair.mine.parts
    assert not pair.mine.outbox.reports


def test_another_part_than_the_one_asked_for_is_refused() -> None:
    pair = Pair()
    wrong = tuple(v.PartDigest(part.table, part.size, part.digest ^ 1) for part in pair.order.parts)
    pair.order = v.Hold(7, 0, wrong, SPECS, HOLDER)
    with pytest.raises(ProtocolError, match="another part"):
        pair.begin()


def test_a_holder_that_has_it_no_more_ends_the_fill() -> None:
    pair = Pair()
    pair.theirs.drop([7])
    pair.begin()
    assert pair.closed
    assert not pair.mine.outbox.reports
    assert pair.backfills.begin(pair.order)  # and it can be asked for again


def test_bytes_that_nobody_asked_for_are_refused_before_they_land() -> None:
    pair = Pair()
    (dial,) = pair.backfills.begin(pair.order)
    assert isinstance(dial, Dial)
    pair.backfills.dialed(dial.key, 5)
    with pytest.raises(ProtocolError, match="nobody asked for"):
        pair.backfills.landing(5, Frame(Kind.PIECE, seq=1, stop=10, payload_length=10))


def test_one_fill_per_part_at_a_time_and_none_for_a_dropped_version() -> None:
    pair = Pair()
    (dial,) = pair.backfills.begin(pair.order)
    assert pair.backfills.begin(pair.order) == []
    assert isinstance(dial, Dial)
    pair.backfills.dialed(dial.key, 5)
    (bye,) = pair.backfills.drop([7])
    assert isinstance(bye, Outgoing)
    assert bye.close
    assert 5 not in pair.backfills


def test_a_holder_that_went_without_a_word_is_not_waited_for() -> None:
    pair = Pair()
    (dial,) = pair.backfills.begin(pair.order)
    assert isinstance(dial, Dial)
    pair.backfills.dialed(dial.key, 5)
    other = msgspec.structs.replace(pair.order, holder=v.Holder("tcp://127.0.0.1:2", "", ""))
    bye, again = pair.backfills.begin(other)
    assert isinstance(bye, Outgoing)
    assert (bye.peer, bye.close) == (5, True)
    assert isinstance(again, Dial)
    assert again.address == other.holder.address
    assert 5 not in pair.backfills
    pair.run(pair.backfills.dialed(again.key, 5))
    assert pair.mine.has_begun(7, 0, pair.order.parts)


def test_an_order_travels() -> None:
    _, order = holding()
    assert m.unpack_notice(m.pack(order)) == order
