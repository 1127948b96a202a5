"""Memory of versions: used again, but never while somebody may look at it; written by its owner alone."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import threading

import numpy as np
import pytest

from headwater.errors import NotEnoughMemory
from headwater.transports import memory
from headwater.transports.rooms import SPARE, Room, Rooms
from tests.patience import PATIENCE

SIZE = 3 * mmap.PAGESIZE


def seen(room: Room) -> mmap.mmap:
    """What a reader maps that was given the room's descriptor."""
    return mmap.mmap(room.fd, room.size, mmap.MAP_SHARED, mmap.PROT_READ)


@pytest.mark.parametrize("share", [True, False])
def test_a_room_is_used_again(share: bool) -> None:
    rooms = Rooms(share)
    room = rooms.take(SIZE)
    room.array[:] = 7
    rooms.give(room)
    assert rooms.take(SIZE + 1) is not room
    assert rooms.take(SIZE) is room
    assert rooms.take(SIZE) is not room
    assert (room.fd >= 0) == share


def test_few_free_rooms_are_kept() -> None:
    rooms = Rooms(share=True)
    taken = [rooms.take(SIZE) for _ in range(SPARE + 3)]
    for room in taken:
        rooms.give(room)
    assert [room.fd >= 0 for room in taken] == [True] * SPARE + [False] * 3
    rooms.close()
    assert all(room.fd < 0 for room in taken)
    last = Rooms(share=True)
    room = last.take(SIZE)
    last.close()
    last.give(room)
    assert room.fd < 0


def test_of_a_size_that_nobody_wants_none_are_kept() -> None:
    rooms = Rooms(share=True)
    first, second, other = rooms.take(SIZE), rooms.take(SIZE), rooms.take(2 * SIZE)
    rooms.give(first)
    rooms.give(other)
    view = second.lend()
    rooms.give(second)
    rooms.unwanted(SIZE)
    assert (first.fd < 0, second.fd < 0, other.fd < 0) == (True, False, False)
    rooms.prepare(SIZE)  # asked for while it was wanted
    del view
    gc.collect()
    assert second.fd < 0
    third = rooms.take(SIZE)
    assert third.fd >= 0
    rooms.give(third)
    assert rooms.take(SIZE) is third  # it is wanted again
    rooms.unwanted(SIZE)
    rooms.written(third)  # as when another version of it has come
    rooms.give(third)
    assert rooms.take(SIZE) is third


@pytest.mark.parametrize("share", [True, False])
def test_a_room_that_is_lent_is_not_used_again_before_the_last_view_is_gone(share: bool) -> None:
    rooms = Rooms(share)
    room = rooms.take(SIZE)
    room.array[:] = 1
    view = room.lend()
    piece = view[10:20]
    other = room.lend()
    rooms.give(room)
    del view
    assert rooms.take(SIZE) is not room
    del other
    assert rooms.take(SIZE) is not room
    assert bytes(piece) == b"\1" * 10
    with pytest.raises(TypeError):
        piece[0] = 2
    del piece
    gc.collect()
    assert rooms.take(SIZE) is room


def test_a_room_waits_for_every_reader_to_say_that_it_maps_it_no_more() -> None:
    rooms = Rooms(share=True)
    room = rooms.take(SIZE)
    room.readers |= {1, 2}
    rooms.give(room)
    room.forget(1, clean=True)
    room.forget(3, clean=True)
    assert rooms.take(SIZE) is not room
    room.forget(2, clean=True)
    assert rooms.take(SIZE) is room


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_reader_sees_that_died_without_a_word_never_changes(when: str) -> None:
    rooms = Rooms(share=True)
    room = rooms.take(SIZE)
    room.array[:] = 5
    room.readers.add(1)
    with seen(room) as view:
        if when == "before":
            room.forget(1, clean=False)
        rooms.give(room)
        if when == "after":
            room.forget(1, clean=False)
        assert room.fd < 0
        for _ in range(4):
            another = rooms.take(SIZE)
            assert another is not room
            another.array[:] = 9
        del room
        gc.collect()
        assert view[:] == b"\5" * SIZE


def test_readers_cannot_write_shrink_or_grow_it() -> None:
    room = Rooms(share=True).take(SIZE)
    with pytest.raises(PermissionError):
        mmap.mmap(room.fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for act in (
        lambda: os.pwrite(room.fd, b"x", 0),
        lambda: os.ftruncate(room.fd, 1),
        lambda: os.ftruncate(room.fd, 1 << 20),
    ):
        with pytest.raises(PermissionError):
            act()
    memory.verify(room.fd, SIZE)
    with mmap.mmap(room.fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        view[0] = 99  # stays in this mapping
        assert room.array[0] == 0
        room.array[1] = 7  # the owner still writes
        with seen(room) as other:
            assert (other[0], other[1]) == (0, 7)


def test_memory_that_is_promised_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages come with the first write, so each of several rooms alone may seem to fit."""
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * SIZE)
    rooms = Rooms(share=True)
    first, _second = rooms.take(SIZE), rooms.take(SIZE)
    with pytest.raises(NotEnoughMemory, match="but 0 are free on this machine; none were taken"):
        rooms.take(SIZE)
    rooms.written(first)  # the machine knows of it now
    rooms.take(SIZE)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    rooms.prepare(2 * SIZE)  # makes none, and says nothing
    rooms.give(first)
    assert rooms.take(SIZE) is first  # takes nothing


def test_no_descriptors_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none)
    with pytest.raises(NotEnoughMemory, match="Too many open files"):
        Rooms(share=True).take(SIZE)


def test_a_room_that_was_made_ready_is_taken() -> None:
    rooms = Rooms(share=True)
    rooms.prepare(SIZE)
    rooms.prepare(SIZE)
    assert len(rooms._free[SIZE]) == 1
    rooms.take(SIZE)
    assert not rooms._free[SIZE]


def look_at_everything(seed: int, steps: int = 300) -> None:
    """Rooms are taken, filled, shared, lent and given; what anybody sees never changes."""
    chance = random.Random(seed)
    rooms = Rooms(share=True)
    held: list[tuple[Room, int]] = []
    mapped: list[tuple[Room, int, mmap.mmap, int]] = []  # room, reader, view, content
    lent: list[tuple[memoryview, int]] = []
    for step in range(steps):
        act = chance.randrange(6)
        if act == 0 or not held:
            room, content = rooms.take(SIZE), 1 + step % 255
            room.array[:] = content
            held.append((room, content))
        elif act == 1:
            rooms.give(held.pop(chance.randrange(len(held)))[0])
        elif act == 2:
            room, content = chance.choice(held)
            room.readers.add(step)
            mapped.append((room, step, seen(room), content))
        elif act == 3 and mapped:
            room, reader, view, _ = mapped.pop(chance.randrange(len(mapped)))
            view.close()
            room.forget(reader, clean=True)
        elif act == 4 and mapped:
            room, reader, view, content = mapped.pop(chance.randrange(len(mapped)))
            room.forget(reader, clean=False)
            lent.append((memoryview(view), content))  # it is gone, and looks on
        elif act == 5:
            room, content = chance.choice(held)
            lent.append((room.lend()[:10], content))
            if chance.random() < 0.7:
                del lent[chance.randrange(len(lent))]
        sights = [(view[0], view[-1], content) for _, _, view, content in mapped]
        sights += [(view[0], view[-1], content) for view, content in lent]
        assert all(first == last == content for first, last, content in sights), (
            f"seed {seed}, step {step}: memory changed under a reader"
        )


def test_what_anybody_can_see_never_changes() -> None:
    for seed in range(6):
        look_at_everything(seed)


@pytest.mark.parametrize("bug", ["readers", "lent", "spoilt"])
def test_memory_that_changes_under_a_reader_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Room._settle

    def careless(self: Room) -> None:
        if bug == "readers":
            self.readers = set()
        elif bug == "lent":
            self._lent = 0
        else:
            self.spoilt = False
        settle(self)

    monkeypatch.setattr(Room, "_settle", careless)
    with pytest.raises(AssertionError, match="changed under a reader"):
        test_what_anybody_can_see_never_changes()


def test_rooms_are_taken_and_given_by_many_threads() -> None:
    rooms = Rooms(share=False)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(300):
            room = rooms.take(64)
            room.array[:] = mark
            view = room.lend()
            if not np.array_equal(np.frombuffer(view, np.uint8), np.full(64, mark, np.uint8)):
                wrong.append(mark)
            rooms.give(room)
            del view

    threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
    assert sum(map(len, rooms._free.values())) <= SPARE
