"""The parts that a server holds: made of one moment, handed out as memory, bytes or deltas, let go of when it may."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from headwater.errors import HeadwaterError, NotEnoughMemory, ProtocolError, VersionExpired
from headwater.server import COORDINATOR
from headwater.server.node import Setting
from headwater.server.server import Server
from headwater.transports import memory
from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec
from headwater.versions import part_answers
from headwater.versions.part_cut import PartCut
from headwater.versions.part_store import PartStore
from headwater.versions.parts import Key
from headwater.wire import delta
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.outgoing import Instruction, Outgoing
from headwater.wire.sums import checksums, digest, unpack
from tests.patience import PATIENCE
from tests.server.serving import NodeHost, Wire, serve

ELEMENTS = 700_000  # 2.7 MiB
READER = 77


def same(data: bytes, wanted: bytes) -> bool:
    """In a function, since of an assertion's own == pytest lists on CI what differs: of megabytes, for minutes."""
    return data == wanted


class Holder:
    """A server that is the primary of the only shard, with table 1; ``threads`` copy and encode, as in a process."""

    def __init__(self, *, share: bool = True, threads: bool = True, checked: bool = False, tables: int = 1) -> None:
        self.rang = threading.Event()
        wake = self.rang.set if threads else None
        self.server = Server(Setting(0, 1, share=share, threads=threads, wake=wake, checked=checked))
        self.said: list[v.PartDone] = []
        self.told: dict[int, list[Outgoing]] = {}
        self._take(self.server.adopt(m.View(0, 1, m.Endpoint(0, "", "", ""))))
        self.tell(m.Members(1, (0,), 0))
        for number in range(1, tables + 1):
            spec = DenseSpec(
                f"t{number}", (ParameterSpec("w", (ELEMENTS,)),), OptimizerSpec("SGD", ({"lr": 1.0},)), Bulk()
            )
            self.tell(m.Create(number, spec))

    @property
    def part_store(self) -> PartStore:
        return self.server.setting.part_store

    @property
    def values(self) -> torch.Tensor:
        return self.server.nodes[0].shard.tables[1].store.values

    def tell(self, message: Any) -> None:
        kind = Kind.REQUEST if isinstance(message, m.Create) else Kind.NOTICE
        frame = Frame(kind, seq=getattr(message, "table", 0), body=m.pack(message))
        self._take(self.server.receive(COORDINATOR, frame))

    def _take(self, instructions: list[Instruction]) -> None:
        for x in instructions:
            assert isinstance(x, Outgoing)
            if x.peer != COORDINATOR:
                self.told.setdefault(x.peer, []).append(x)
            elif x.frame.kind == Kind.NOTICE:
                message = m.unpack_notice(x.frame.body)
                assert isinstance(message, v.PartDone)
                self.said.append(message)

    def write(self, start: int = 0, count: int = ELEMENTS, seed: int = 1) -> None:
        """As a step does: the elements change, and the part store is told before."""
        self.server.nodes[0].memory.before_write(1, ((4 * start, 4 * (start + count)),))
        floats = self.values.view(torch.float32)
        floats[start : start + count] += torch.from_numpy(np.random.default_rng(seed).normal(size=count)).float()

    def settle(self) -> None:
        """Until no thread has anything to do for it."""
        while self.part_store._cutting or any(held.waiting for held in self.part_store.parts.values()):
            assert self.rang.wait(PATIENCE)
            self.rang.clear()
            self._take(self.server.woken())

    def publish(self, number: int, tables: tuple[int, ...] = (1,)) -> bytes:
        """A version of the present state; what it should hold."""
        before = self.values.numpy().tobytes()
        self.tell(v.CutVersion(number, 0, tables))
        self.settle()
        return before

    def ask(self, number: int, peer: int = READER, seq: int = 1, **more: Any) -> None:
        fetch = v.Fetch(number, 0, **{"table": 1, **more})
        self._take(self.server.receive(peer, Frame(Kind.REQUEST, seq=seq, body=m.pack(fetch))))

    def fetch(self, number: int, peer: int = READER, **more: Any) -> tuple[v.Part, bytes, tuple[int, ...]]:
        """A part as a reader gets it: what was said of it, its bytes, its descriptors. Raises what is refused."""
        self.ask(number, peer, **more)
        self.settle()
        first, *rest = self.told.pop(peer)
        if first.frame.kind == Kind.ERROR:
            raise m.read_error(first.frame.body)
        part = m.unpack_reply(first.frame.body)
        assert isinstance(part, v.Part)
        data = bytearray(part.nbytes)
        for piece in rest:
            assert (piece.frame.kind, piece.frame.seq, piece.frame.payload is None) == (
                Kind.PIECE,
                first.frame.seq,
                False,
            )
            assert piece.frame.payload is not None
            data[piece.frame.start : piece.frame.stop] = piece.frame.payload
        assert not rest or [bool(x.frame.flags & Flag.END) for x in rest] == [False] * (len(rest) - 1) + [True]
        return part, bytes(data), first.fds

    def unmap(self, number: int, peer: int = READER) -> None:
        self._take(self.server.receive(peer, Frame(Kind.NOTICE, body=m.pack(v.Unmap(number, 0, 1)))))


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder()
    yield made
    made.part_store.close()


# ---- parts of one moment -------------------------------------------------------------------------------


def late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Copying threads do nothing before this event."""
    gate, following = threading.Event(), PartCut._next

    def waiting(self: PartCut) -> int | None:
        if threading.current_thread() is self._thread:
            assert gate.wait(PATIENCE)
        return following(self)

    monkeypatch.setattr(PartCut, "_next", waiting)
    return gate


def versions_of_a_moving_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, whose copies all begin after the table was written to."""
    gate, holder, expected = late(monkeypatch), Holder(), {}
    for number in (1, 2, 3):
        expected[number] = holder.values.numpy().tobytes()
        holder.tell(v.CutVersion(number, 0, (1,)))
        holder.write(number * 100_000, 200_000, number)
    gate.set()
    holder.settle()
    for number, wanted in expected.items():
        part, data, _ = holder.fetch(number)
        assert same(data, wanted), f"version {number} is not of its moment"
        assert np.array_equal(unpack(part.sums), checksums(np.frombuffer(data, np.uint8)))
    holder.part_store.close()


def test_versions_are_of_their_moments_while_the_table_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    versions_of_a_moving_table(monkeypatch)


def test_a_part_store_that_is_not_told_of_writes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartStore, "before_write", lambda self, shard, table, ranges: None)
    with pytest.raises(AssertionError, match="is not of its moment"):
        versions_of_a_moving_table(monkeypatch)


def test_the_coordinator_hears_when_it_begins_and_when_it_is_there(holder: Holder) -> None:
    holder.publish(1)
    begun, done = holder.said
    assert (begun.parts, begun.clocks) == ((), ((1, 0),))
    held = holder.part_store.parts[Key(1, 0, 1)]
    assert held.sums is not None
    assert done.parts == (v.PartDigest(1, holder.values.numel(), digest(held.sums)),)
    assert done.pause >= 0
    holder.said.clear()
    holder.tell(v.CutVersion(1, 0, (1,)))  # to another coordinator
    holder.part_store.report_all()
    assert [x.parts for x in [*holder.said, *holder.part_store.outbox.reports]] == [done.parts] * 2


def test_without_threads_it_is_there_at_once() -> None:
    holder = Holder(share=False, threads=False)
    wanted = holder.publish(1)
    assert [bool(x.parts) for x in holder.said] == [True]
    assert same(holder.fetch(1)[1], wanted)


def test_memory_for_the_next_version_is_ready_before_it_begins() -> None:
    """Fresh memory takes several times as long to write to. It is found when a version is there, one for each part."""
    holder = Holder(tables=2)
    size, pool = len(holder.values), holder.part_store.pool
    holder.publish(1, (1, 2))
    thread = pool._thread
    if thread is not None:
        thread.join(PATIENCE)
    ready = list(pool._free[size])
    assert len(ready) == 2
    holder.publish(2, (1, 2))
    assert {id(holder.part_store.parts[Key(2, 0, table)].buffer) for table in (1, 2)} == {id(each) for each in ready}
    holder.part_store.close()


# ---- what cannot be made -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [NotEnoughMemory("full"), MemoryError("full"), RuntimeError("can't start new thread")]
)
def test_a_version_that_only_half_begins_is_not_held(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The second table's part is refused; the first one's copy, which goes on, must not count as the whole."""
    holder = Holder(tables=2)
    cut, gate = PartStore._cut, late(monkeypatch)

    def refusing(self: PartStore, key: Key, source: Any) -> None:
        if key.table == 2:
            raise error
        cut(self, key, source)

    monkeypatch.setattr(PartStore, "_cut", refusing)
    holder.tell(v.CutVersion(1, 0, (1, 2)))
    assert [x.error for x in holder.said] == [f"shard 0 could not begin its part: {error}"]
    gate.set()
    holder.settle()
    holder._take(holder.server.woken())
    assert all(x.error for x in holder.said)
    assert not holder.part_store.parts
    holder.part_store.report_all()
    assert all(x.error for x in holder.part_store.outbox.reports)
    holder.part_store.close()


def test_no_memory_for_a_part(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    holder.tell(v.CutVersion(1, 0, (1,)))
    assert "1000 are free on this machine" in holder.said[-1].error
    holder.tell(v.DropVersion((1,)))
    monkeypatch.undo()
    assert holder.publish(2) == holder.fetch(2)[1]


def test_a_copy_that_fails_is_said_and_leaves_nothing(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PartCut, block: int) -> None:
        raise MemoryError("no memory for a sum")

    monkeypatch.setattr(PartCut, "_sum", broken)
    holder.publish(1)
    assert holder.said[-1].error == "shard 0 could not copy its part: no memory for a sum"
    with pytest.raises(VersionExpired):
        holder.fetch(1)
    assert not holder.part_store.parts
    holder.tell(v.DropVersion((1,)))
    assert not holder.part_store._making


# ---- memory ----------------------------------------------------------------------------------------------


def test_a_part_as_memory_is_the_holders_own(holder: Holder) -> None:
    wanted = holder.publish(1)
    part, data, (fd,) = holder.fetch(1, shared=True)
    assert (part.encoding, data) == ("shared", b"")
    assert os.fstat(fd).st_ino == os.fstat(holder.part_store.parts[Key(1, 0, 1)].buffer.fd).st_ino
    with mmap.mmap(fd, part.size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        assert same(view[:], wanted)
    assert holder.part_store.sent_bytes == 0


@pytest.mark.parametrize("end", ["maps", "unmaps", "unmaps one of two", "dies", "dies later"])
def test_memory_that_a_reader_may_see_is_not_used_again(holder: Holder, end: str) -> None:
    wanted = holder.publish(1)
    part, _, (fd,) = holder.fetch(1, shared=True)
    inode = os.fstat(fd).st_ino
    if end == "unmaps one of two":
        holder.fetch(1, shared=True, seq=2)
    with mmap.mmap(os.dup(fd), part.size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        if end == "dies":
            holder.server.closed(READER)
        holder.publish(2)
        holder.tell(v.DropVersion((1,)))
        if end.startswith("unmaps"):
            holder.unmap(1)
        if end == "dies later":
            holder.server.closed(READER)
        for number in (3, 4, 5):
            holder.write(seed=number)
            holder.publish(number)
        used = {os.fstat(held.buffer.fd).st_ino for held in holder.part_store.parts.values()}
        assert (inode in used) == (end == "unmaps")
        assert same(view[:], wanted) == (end != "unmaps")


def test_memory_is_not_kept_for_versions_that_are_no_more(holder: Holder) -> None:
    holder.publish(1)
    holder.publish(2)
    free = holder.part_store.pool._free
    holder.tell(v.DropVersion((1,)))
    assert sum(map(len, free.values())) > 0  # the next one is made in it
    holder.tell(v.DropVersion((2,)))
    assert sum(map(len, free.values())) == 0


def test_words_about_what_nobody_was_given_change_nothing(holder: Holder) -> None:
    holder.publish(1)
    holder.fetch(1, shared=True)
    for number, peer in ((1, 78), (2, READER), ((1 << 64) - 1, READER), (-1, READER)):
        if peer != READER:
            holder.fetch(1, peer)
        holder.unmap(number, peer)
    assert holder.part_store.parts[Key(1, 0, 1)].buffer.readers
    holder.unmap(1)
    holder.unmap(1)
    assert not holder.part_store.parts[Key(1, 0, 1)].buffer.readers


def test_bytes_on_their_way_to_a_reader_stay(holder: Holder) -> None:
    """A socket's queue refers to the part's memory; the version is retired meanwhile."""
    wanted = holder.publish(1)
    holder.ask(1)
    _, *pieces = holder.told.pop(READER)
    holder.tell(v.DropVersion((1,)))
    for number in (2, 3, 4):
        holder.write(seed=number)
        holder.publish(number)
    assert same(b"".join(bytes(x.frame.payload or b"") for x in pieces), wanted)
    del pieces
    gc.collect()
    assert holder.part_store.pool._free


# ---- bytes and deltas ----------------------------------------------------------------------------------


def rebuilt(holder: Holder, old: bytes, number: int, base: int, peer: int = READER) -> tuple[str, bytes]:
    """What a reader makes of a delta, or got whole."""
    part, data, _ = holder.fetch(number, peer, base=base)
    if part.encoding == "whole":
        return "whole", data
    target = np.frombuffer(old, np.uint8).copy()
    delta.apply(target, data)
    assert np.array_equal(checksums(target), unpack(part.sums))
    return part.encoding, target.tobytes()


def test_a_delta_is_made_once_for_all_who_ask(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    encode = delta.encode

    def counting(*args: Any) -> bytes | None:
        made.append(1)
        return encode(*args)

    monkeypatch.setattr(delta, "encode", counting)
    old = holder.publish(1)
    holder.write(5, 1000)
    new = holder.publish(2)
    for peer in (70, 71, 72):
        holder.ask(2, peer, base=1)
    holder.settle()
    first = [holder.told.pop(peer) for peer in (70, 71, 72)]
    assert len({bytes(x[1].frame.payload or b"") for x in first}) == 1
    assert rebuilt(holder, old, 2, 1) == ("delta", new)
    assert len(made) == 1
    assert holder.part_store.sent_bytes < len(new)


def test_what_changed_too_much_or_has_no_base_is_sent_whole(holder: Holder) -> None:
    old = holder.publish(1)
    holder.write()
    new = holder.publish(2)
    assert rebuilt(holder, old, 2, 1) == ("whole", new)
    assert rebuilt(holder, old, 2, 1) == ("whole", new)  # it is known now
    for base in (0, 2, 99, -5, (1 << 64) - 1):
        assert rebuilt(holder, old, 2, base) == ("whole", new)


def test_deltas_are_bounded(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_answers, "DELTAS", 3)
    states = {number: holder.publish(number) for number in range(1, 6)}
    holder.write(0, 10)
    states[6] = holder.publish(6)
    for base in range(1, 6):
        assert rebuilt(holder, states[base], 6, base) == ("delta", states[6])
    held = holder.part_store.parts[Key(6, 0, 1)]
    assert list(held.deltas) == [3, 4, 5]
    assert not held.waiting
    size = held.buffer.size
    held.deltas.update({number: bytes(size // 3) for number in (10, 11, 12)})
    holder.part_store._answers._encoded(Key(6, 0, 1), 13, bytes(size // 2))
    assert sum(len(x or b"") for x in held.deltas.values()) <= size


def test_a_reader_that_waits_for_a_part_that_is_begun_again_is_told(
    holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that began it was rolled back with its primary."""
    gate, encode = threading.Event(), delta.encode
    monkeypatch.setattr(delta, "encode", lambda *args: gate.wait(PATIENCE) and encode(*args))
    for number in (1, 2):
        holder.write(0, 10, number)
        holder.publish(number)
    holder.ask(2, base=1)
    holder.part_store.begin(2, 0, [holder.server.nodes[0].shard.tables[1].source()])
    holder._take(holder.server.woken())
    gate.set()
    (told,) = holder.told[READER]
    assert isinstance(m.read_error(told.frame.body), VersionExpired)
    holder.settle()


def test_a_delta_that_cannot_be_made_does_not_end_the_others(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode, failures = delta.encode, iter([True])

    def failing(*args: Any) -> bytes | None:
        if next(failures, False):
            raise MemoryError("no memory for a delta")
        return encode(*args)

    monkeypatch.setattr(delta, "encode", failing)
    old = holder.publish(1)
    states = {}
    for number in (2, 3):
        holder.write(0, 100, number)
        states[number] = holder.publish(number)
    assert rebuilt(holder, old, 2, 1) == ("whole", states[2])
    assert rebuilt(holder, old, 3, 1) == ("delta", states[3])
    assert "it is sent whole" in caplog.text


def test_a_reader_asks_for_a_delta_once(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one connection's questions, all answered at once, could fill the memory."""
    gate, encode = threading.Event(), delta.encode
    monkeypatch.setattr(delta, "encode", lambda *args: gate.wait(PATIENCE) and encode(*args))
    holder.publish(1)
    holder.write(0, 10)
    holder.publish(2)
    holder.ask(2, base=1)
    with pytest.raises(ProtocolError, match="again before it was answered"):
        holder.ask(2, base=1, seq=2)
    holder.server.closed(READER)
    holder.ask(2, 78, base=1)  # another one waits for the same delta
    gate.set()
    holder.settle()
    assert [bool(x) for x in (holder.told.get(READER), holder.told.get(78))] == [False, True]


def test_what_is_dropped_while_somebody_waits_for_its_delta(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, encode = threading.Event(), delta.encode
    monkeypatch.setattr(delta, "encode", lambda *args: gate.wait(PATIENCE) and encode(*args))
    holder.publish(1)
    holder.write(0, 10)
    holder.publish(2)
    holder.ask(2, base=1)
    holder.tell(v.DropVersion((1, 2)))
    (refusal,) = holder.told.pop(READER)
    assert isinstance(m.read_error(refusal.frame.body), VersionExpired)
    gate.set()
    assert holder.rang.wait(PATIENCE)
    holder._take(holder.server.woken())
    assert not holder.told
    assert not holder.part_store.parts


def test_a_delta_to_what_was_dropped_is_not_one_to_another_of_its_number(
    holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, encode = threading.Event(), delta.encode
    monkeypatch.setattr(delta, "encode", lambda *args: gate.wait(PATIENCE) and encode(*args))
    for number in (1, 2):
        holder.write(0, 10, number)
        holder.publish(number)
    holder.ask(2, base=1)
    holder.tell(v.DropVersion((1, 2)))
    holder.write(0, 10, 7)
    holder.publish(2)
    gate.set()
    encoder = holder.part_store._answers._encoder
    assert encoder is not None
    holder.part_store._answers._jobs.put(None)
    encoder.join(PATIENCE)
    holder._take(holder.server.woken())
    assert not holder.part_store.parts[Key(2, 0, 1)].deltas


def test_a_version_that_is_dropped_before_its_moment_is_never_made(holder: Holder) -> None:
    for number in (1, 2):
        holder.tell(v.CutVersion(number, 0, (1,), ((1, 5),)))  # when the table is at step 5
    cuts = holder.server.nodes[0].cuts
    assert [cut.number for cut in cuts] == [1, 2]
    holder.tell(v.DropVersion((1,)))
    assert [cut.number for cut in holder.server.nodes[0].cuts] == [2]
    assert not holder.part_store.parts


def test_versions_whose_moments_come_together_all_begin(holder: Holder) -> None:
    for number in (1, 2, 3):
        holder.tell(v.CutVersion(number, 0, (1,), ((1, 5),)))
    assert not holder.part_store.parts
    holder.server.nodes[0].shard.tables[1].gathering.clock = 5
    holder.tell(m.Members(2, (0,), 0))  # whatever happens next
    assert not holder.server.nodes[0].cuts
    assert [key.number for key in holder.part_store.parts] == [1, 2, 3]


@pytest.mark.parametrize("when", ["copying", "copied"])
def test_what_is_dropped_is_gone(holder: Holder, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    gate = late(monkeypatch)
    if when == "copied":
        gate.set()
    holder.tell(v.CutVersion(1, 0, (1,)))
    if when == "copied":
        holder.settle()
    else:
        with pytest.raises(VersionExpired, match="not held here"):
            _now(holder, 1)
    holder.tell(v.DropVersion((1, 7)))
    gate.set()
    holder.write()
    with pytest.raises(VersionExpired, match="not held here"):
        holder.fetch(1)
    assert holder.part_store.nbytes == 0
    assert holder.publish(2) == holder.fetch(2)[1]


def _now(holder: Holder, number: int) -> None:
    holder.ask(number)
    raise m.read_error(holder.told.pop(READER)[0].frame.body)


@pytest.mark.parametrize("more", [{"table": 2}, {"table": -1}, {"number": 9}, {"shard": 5}, {"shard": (1 << 64) - 1}])
def test_what_is_not_held(holder: Holder, more: dict[str, Any]) -> None:
    holder.publish(1)
    fetch = v.Fetch(**{"number": 1, "shard": 0, "table": 1, **more})
    holder._take(holder.server.receive(READER, Frame(Kind.REQUEST, seq=1, body=m.pack(fetch))))
    with pytest.raises(VersionExpired, match="was retired, or this process has just begun"):
        raise m.read_error(holder.told.pop(READER)[0].frame.body)


@pytest.mark.parametrize("kind", [Kind.PUSH, Kind.PULL, Kind.PIECE, Kind.REPLY, Kind.ACCEPT])
def test_a_reader_says_nothing_else(holder: Holder, kind: Kind) -> None:
    holder.publish(1)
    holder.fetch(1)
    with pytest.raises(ProtocolError, match="from a reader of versions"):
        holder.server.receive(READER, Frame(kind))
    with pytest.raises(ProtocolError, match="from a reader of versions"):
        holder.server.receive(READER, Frame(Kind.REQUEST, body=m.pack(m.Slots(1))))
    with pytest.raises(ProtocolError, match="from a reader of versions"):
        holder.server.landing(READER, Frame(Kind.PIECE, stop=10, payload_length=10))


def test_checksums_of_frames_where_they_are_wanted() -> None:
    holder = Holder(checked=True)
    holder.publish(1)
    holder.ask(1)
    _, *pieces = holder.told.pop(READER)
    assert all(x.frame.flags & Flag.CHECKED for x in pieces)
    holder.part_store.close()


def test_checksums_of_odd_length_are_none() -> None:
    with pytest.raises(HeadwaterError):
        unpack(b"1234567")


def test_no_descriptors_left_ends_one_connection_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that asks for memory and does not take it; the others go on."""
    host = NodeHost()
    spec = DenseSpec("t", (ParameterSpec("w", (ELEMENTS,)),), OptimizerSpec("SGD", ({"lr": 1.0},)), Bulk())
    host.create(1, spec)
    host.server.receive(COORDINATOR, Frame(Kind.NOTICE, body=m.pack(v.CutVersion(1, 0, (1,)))))
    with serve(host, unix=f"headwater-parts-{os.getpid()}") as address, Wire(address) as greedy, Wire(address) as other:
        for wire in (greedy, other):
            wire.greet()
        dup, left = os.dup, iter(range(2))

        def few(fd: int) -> int:
            if next(left, None) is None:
                raise OSError(errno.EMFILE, "Too many open files")
            return dup(fd)

        monkeypatch.setattr(os, "dup", few)
        for _ in range(3):
            greedy.send(Frame(Kind.REQUEST, seq=1, body=m.pack(v.Fetch(1, 0, 1, shared=True))))
        assert len(greedy.ends()) <= 2
        monkeypatch.undo()
        found = other.ask(v.Fetch(1, 0, 1, shared=True))
        assert isinstance(found, v.Part)
        assert found.encoding == "shared"
