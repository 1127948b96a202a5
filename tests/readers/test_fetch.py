"""Fetching from holders that are damaged, mad or silent: typed errors, nothing kept, nothing wrong shown."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from headwater.errors import (
    DeadlineExceeded,
    DeltaCorrupt,
    HeadwaterError,
    LinkBroken,
    LinkError,
    NotEnoughMemory,
    ProtocolError,
    Unreachable,
    UsageError,
    VersionExpired,
)
from headwater.readers import fetch as fetch_module
from headwater.readers.line import Line
from headwater.readers.stored import Base, Stored
from headwater.readers.weights import Weights
from headwater.transports import memory
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.sums import checksums, pack
from tests.patience import PATIENCE
from tests.readers.holders import SPEC, Holders, Link, Said, leased, part_of, right, state

# ---- honest ones -----------------------------------------------------------------------------------------


def test_whole_parts_then_deltas(holders: Holders) -> None:
    first = holders.store(1)
    second = holders.store(2, first)
    assert right(first, 1)
    assert right(second, 2)
    assert [fetch.base for fetch in holders.asked] == [0, 0, 1, 1]
    assert (holders.fetcher.counts.whole_parts, holders.fetcher.counts.deltas) == (2, 2)
    assert len(holders.links) == 2


def test_memory_is_given_back_when_nothing_looks_at_it(holders: Holders) -> None:
    holders.shared = True
    stored = holders.store(1)
    assert right(stored, 1)
    weights = Weights(stored, lambda: None, lambda: None)
    tensor = weights["w"]
    del stored, weights
    gc.collect()
    holders.fetcher.settle()
    assert not holders.unmapped
    del tensor
    gc.collect()
    holders.fetcher.settle()
    assert sorted((word.number, word.shard) for word in holders.unmapped) == [(1, 0), (1, 1)]


# ---- the base's memory ------------------------------------------------------------------------------------


def addresses(stored: Stored | Base) -> dict[tuple[int, int], int]:
    return {key: buffer.array.ctypes.data for key, buffer in stored.buffers.items()}


def only_base(holders: Holders, number: int = 1) -> Base:
    """A version that nobody looks at any more, kept for the next delta."""
    base = Base(holders.store(number))
    gc.collect()
    return base


@pytest.mark.parametrize("whole", [False, True])
def test_a_base_that_nobody_looks_at_becomes_the_next_version(holders: Holders, whole: bool) -> None:
    base = only_base(holders)
    before = addresses(base)
    if whole:
        holders.answer = lambda frame, fetch, said: holders.honest(frame, msgspec.structs.replace(fetch, base=0))
    stored = holders.store(2, base)
    assert right(stored, 2)
    assert addresses(stored) == before
    assert base.buffers == {}
    assert holders.fetcher.counts.deltas == (0 if whole else 2)


def test_a_base_that_somebody_looks_at_stays_as_it_is(holders: Holders) -> None:
    first = holders.store(1)
    base = Base(first)
    weights = Weights(first, lambda: None, lambda: None)
    tensor = weights["w"]
    then = tensor.clone()
    del first, weights
    gc.collect()
    second = holders.store(2, base)
    assert not set(addresses(second).values()) & set(addresses(base).values())
    assert np.array_equal(tensor.numpy().view(np.uint8), then.numpy().view(np.uint8))
    kept = Base(second)
    del second
    gc.collect()
    third = holders.store(3, kept)  # in the second's, for the first's is still looked at
    assert np.array_equal(tensor.numpy().view(np.uint8), then.numpy().view(np.uint8))
    assert right(third, 3)


def test_a_version_that_is_the_base_comes_without_a_question(holders: Holders) -> None:
    base = only_base(holders)
    holders.asked.clear()
    stored = holders.store(1, base)
    again = holders.store(1, base)
    assert right(stored, 1)
    assert right(again, 1)
    assert holders.asked == []
    del stored
    gc.collect()
    assert right(holders.store(2, base), 2)
    assert right(again, 1)


def test_a_base_that_was_spoilt_by_damage_is_not_used_again(holders: Holders) -> None:
    base = only_base(holders)
    holders.answer = lambda frame, fetch, said: damage(said, 1) if fetch.shard == 1 else said
    with pytest.raises(DeltaCorrupt):
        holders.store(2, base)
    holders.answer = lambda frame, fetch, said: said
    holders.asked.clear()
    assert right(holders.store(2, base), 2)
    assert [fetch.base for fetch in holders.asked if fetch.shard == 1] == [0]


def test_the_memory_of_a_base_is_used_again_when_it_is_none_any_more(holders: Holders) -> None:
    base = only_base(holders)
    before = addresses(base)
    del base
    gc.collect()
    assert set(addresses(holders.store(3)).values()) == set(before.values())


# ---- damaged and mad ones --------------------------------------------------------------------------------


def damage(said: list[Said], piece: int) -> list[Said]:
    frame, data, fds = said[piece]
    return [*said[:piece], (frame, data[:-100] + bytes([data[-100] ^ 4]) + data[-99:], fds), *said[piece + 1 :]]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("piece", [1, 2])
def test_what_comes_damaged_is_fetched_again_whole(holders: Holders, number: int, piece: int) -> None:
    base = holders.store(1)
    holders.asked.clear()
    holders.answer = lambda frame, fetch, said: damage(said, piece) if len(holders.asked) == 1 else said
    stored = holders.store(number, base if number == 2 else None)
    assert right(stored, number)
    assert right(base, 1)
    assert holders.fetcher.counts.damaged == 1
    assert [fetch.base for fetch in holders.asked if fetch.shard == 0] == [number - 1, 0]


def test_a_delta_to_another_version_is_found_out(holders: Holders) -> None:
    base = holders.store(1)

    def other(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
        if not fetch.base:
            return said
        wrong = holders.honest(frame, msgspec.structs.replace(fetch, base=3))
        return part_of(wrong, sums=pack(checksums(state(2)[fetch.shard])))

    holders.answer = other
    assert right(holders.store(2, base), 2)
    assert holders.fetcher.counts.damaged == 2


def test_what_comes_damaged_twice_is_an_error_and_the_version_before_stays(holders: Holders) -> None:
    base = holders.store(1)
    holders.answer = lambda frame, fetch, said: damage(said, 1) if fetch.shard == 1 else said
    with pytest.raises(DeltaCorrupt, match=r"The version that was here before stays|fetch it again"):
        holders.store(2, base)
    assert right(base, 1)
    holders.answer = lambda frame, fetch, said: said
    assert right(holders.store(2, base), 2)


def fds_of(said: list[Said], *fds: int) -> list[Said]:
    memory.close_all(said[0][2])
    return [(said[0][0], b"", fds), *said[1:]]


def unsealed() -> int:
    fd = os.memfd_create("open", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 22)
    return fd


MAD: dict[str, Callable[[list[Said]], list[Said]]] = {
    "another size": lambda s: part_of(s, size=4096),
    "a negative size": lambda s: part_of(s, size=-1),
    "a huge size": lambda s: part_of(s, size=(1 << 64) - 1),
    "few checksums": lambda s: part_of(s, sums=b""),
    "odd checksums": lambda s: part_of(s, sums=b"1234567"),
    "other checksums": lambda s: part_of(s, sums=bytes(len(m.unpack_reply(s[0][0].body).sums))),  # type: ignore[union-attr]
    "negative bytes": lambda s: part_of(s, nbytes=-1),
    "huge bytes": lambda s: part_of(s, nbytes=1 << 62),
    "a huge delta": lambda s: part_of(s, encoding="delta", nbytes=1 << 62),
    "a negative delta": lambda s: part_of(s, encoding="delta", nbytes=-(1 << 63)),
    "an empty delta": lambda s: part_of(s, encoding="delta", nbytes=0),
    "no bytes": lambda s: part_of(s, nbytes=0)[:1],
    "bytes of memory": lambda s: part_of(s, encoding="shared", nbytes=0),
    "no memory": lambda s: part_of(s, encoding="shared", nbytes=0)[:1],
    "another reply": lambda s: [(replace(s[0][0], body=m.pack(m.Done())), b"", ()), *s[1:]],
    "no reply": lambda s: [(replace(s[0][0], body=b"\xc1"), b"", ()), *s[1:]],
    "two replies": lambda s: [s[0], *s],
    "bytes before": lambda s: s[1:],
    "bytes beyond": lambda s: [s[0], (replace(s[1][0], start=1 << 62), s[1][1], ()), *s[2:]],
    "bytes after the end": lambda s: [*s, s[1]],
    "an answer to nothing": lambda s: [(replace(s[0][0], seq=99), b"", ()), *s],
    "another kind": lambda s: [s[0], (Frame(Kind.DATA, seq=s[0][0].seq), b"", ()), *s[1:]],
    "a word": lambda s: [(Frame(Kind.NOTICE), b"", ()), *s],
    "an error for all": lambda s: [(Frame(Kind.ERROR, body=m.error_body(ProtocolError("go away"))), b"", ()), *s],
}
GONE = m.error_body(VersionExpired("it was retired"))
MAD_MEMORY: dict[str, Callable[[list[Said]], list[Said]]] = {
    "none": lambda s: fds_of(s),
    "two": lambda s: [(s[0][0], b"", (*s[0][2], memory.create("two", 4096)))],
    "a pipe": lambda s: fds_of(s, *os.pipe()),
    "too little": lambda s: fds_of(s, memory.create("small", 4096)),
    "not sealed": lambda s: fds_of(s, unsealed()),
    "beside bytes": lambda s: [s[0], (Frame(Kind.PIECE, seq=s[0][0].seq), b"", (memory.create("more", 4096),))],
    "beside an error": lambda s: [(Frame(Kind.ERROR, seq=s[0][0].seq, body=GONE), b"", s[0][2])],
    "another version": lambda s: part_of(s, sums=bytes(len(m.unpack_reply(s[0][0].body).sums))),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("way", MAD)
def test_mad_answers_are_refused(holders: Holders, way: str) -> None:
    base = holders.store(1)
    taken = len(holders.fetcher.pool._fresh)
    holders.answer = lambda frame, fetch, said: MAD[way](list(said)) if fetch.shard == 0 else said
    if way == "bytes after the end":  # it is known too late for this one, and ends the connection
        assert right(holders.store(2), 2)
    else:
        with pytest.raises(LinkError):
            holders.store(2)
    assert len(holders.fetcher.pool._fresh) == taken
    holders.answer = lambda frame, fetch, said: said
    for _ in range(2):  # the first may find out that a connection is broken
        try:
            found = holders.store(3, base)
        except LinkError:
            continue
    assert right(found, 3)


@pytest.mark.parametrize("way", MAD_MEMORY)
def test_mad_memory_is_refused_and_no_descriptor_kept(holders: Holders, way: str) -> None:
    holders.shared = True
    holders.answer = lambda frame, fetch, said: MAD_MEMORY[way](list(said)) if fetch.shard == 1 else said
    if way == "beside bytes":
        holders.store(1)
        return
    with pytest.raises((LinkError, VersionExpired)):
        holders.store(1)


def test_what_later_parts_brought_is_closed_when_an_earlier_one_fails(holders: Holders) -> None:
    """All are asked for at once, here over one connection, so answers come that nobody waits for any more."""
    holders.shared = True
    one = leased(1)
    parts = tuple(msgspec.structs.replace(at, holders=one.parts[0].holders) for at in one.parts)

    def late(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
        if fetch.shard == 1:
            return said
        memory.close_all(said[0][2])
        return []

    holders.answer = late
    with pytest.raises(LinkBroken, match="has sent nothing for 20 s"):
        holders.store(1, parts=parts)


# ---- leases that cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": leased().parts[:1]},
        {"parts": leased().parts * 2},
        {"parts": (leased().parts[0], leased().parts[0])},
        {"parts": (leased().parts[0], msgspec.structs.replace(leased().parts[1], size=4096))},
        {"parts": (leased().parts[0], msgspec.structs.replace(leased().parts[1], size=1 << 60))},
        {"parts": (leased().parts[0], msgspec.structs.replace(leased().parts[1], shard=7))},
        {"parts": (leased().parts[0], msgspec.structs.replace(leased().parts[1], table=2))},
        {"tables": (1, 2)},
        {"shards": 0},
        {"shards": -1},
        {"shards": (1 << 64) - 1},
        {"shards": 1},
    ],
)
def test_a_lease_that_does_not_fit_its_tables_is_refused_before_anything_is_fetched(
    holders: Holders, changes: dict[str, Any]
) -> None:
    with pytest.raises(ProtocolError):
        holders.store(1, **changes)
    assert not holders.asked


# ---- silent and absent ones ------------------------------------------------------------------------------


def test_a_holder_that_sends_nothing_is_left(holders: Holders) -> None:
    holders.answer = lambda frame, fetch, said: [] if fetch.shard == 1 else said
    with pytest.raises(LinkBroken, match="inproc://1 has sent nothing for 20 s"):
        holders.store(1)
    assert holders.now == fetch_module.SILENT
    holders.answer = lambda frame, fetch, said: said
    assert right(holders.store(1), 1)


def test_the_deadline_comes_first_where_it_is_earlier(holders: Holders) -> None:
    holders.answer = lambda frame, fetch, said: []
    with pytest.raises(DeadlineExceeded):
        holders.fetcher.store(leased(), {1: SPEC}, None, 5.0)
    assert holders.now == 5.0


def test_a_holder_that_is_slow_is_not_left(holders: Holders) -> None:
    following: deque[Said] = deque()

    def slowly(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
        if fetch.shard == 1:
            return said
        following.extend(said[1:])
        return said[:1]

    holders.answer = slowly
    pump = Link.pump

    def dripping(self: Link, done: Callable[[], bool], deadline: float) -> None:
        if following:
            self.queue.append(following.popleft())
        pump(self, done, deadline)

    Link.pump = dripping  # type: ignore[method-assign]
    try:
        assert right(holders.fetcher.store(leased(), {1: SPEC}, None, math.inf), 1)
    finally:
        Link.pump = pump  # type: ignore[method-assign]
    assert holders.now >= fetch_module.SILENT


@pytest.mark.parametrize("error", [Unreachable, UsageError, LinkBroken])  # also an address that is none
def test_another_holder_is_tried_where_one_cannot_be_reached(holders: Holders, error: type[HeadwaterError]) -> None:
    both = tuple(v.Holder(f"inproc://{n}", "", "") for n in (5, 6))
    parts = tuple(msgspec.structs.replace(at, holders=both) for at in leased().parts)
    holders.refused = error("not here")
    assert right(holders.store(1, parts=parts), 1)
    assert len(holders.links) == 1
    with pytest.raises(VersionExpired, match="nobody holds shard 0"):
        holders.store(2, parts=tuple(msgspec.structs.replace(at, holders=()) for at in leased(2).parts))


def test_no_memory_here(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 5000)
    with pytest.raises(NotEnoughMemory, match="5000 are free on this machine"):
        holders.store(1)
    monkeypatch.undo()
    assert right(holders.store(1), 1)


def test_what_a_holder_refuses_is_raised(holders: Holders) -> None:
    holders.answer = lambda frame, fetch, said: [(Frame(Kind.ERROR, seq=frame.seq, body=GONE), b"", ())]
    with pytest.raises(VersionExpired, match="it was retired"):
        holders.store(1)


def test_threads_that_give_back_at_once_do_not_wait_for_each_other(holders: Holders) -> None:
    holders.shared = True
    notes = holders.fetcher._unmapped
    for number in range(200):
        notes.put((Line(holders._dial, v.Holder("inproc://0", "", "")), (number, 0, 1)))
    threads = [threading.Thread(target=holders.fetcher.settle, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(word.number for word in holders.unmapped) == list(range(200))
