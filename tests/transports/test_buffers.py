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
from headwater.transports import buffers as buffers_module
from headwater.transports import memory
from headwater.transports.buffers import SPARE, Buffer, BufferPool
from tests.patience import PATIENCE

SIZE = 3 * mmap.PAGESIZE


def seen(buffer: Buffer) -> mmap.mmap:
    """What a reader maps that was given the buffer's descriptor."""
    return mmap.mmap(buffer.fd, buffer.size, mmap.MAP_SHARED, mmap.PROT_READ)


@pytest.mark.parametrize("share", [True, False])
def test_a_room_is_used_again(share: bool) -> None:
    pool = BufferPool(share)
    buffer = pool.take(SIZE)
    buffer.array[:] = 7
    pool.give(buffer)
    assert pool.take(SIZE + 1) is not buffer
    assert pool.take(SIZE) is buffer
    assert pool.take(SIZE) is not buffer
    assert (buffer.fd >= 0) == share


def test_few_free_rooms_are_kept() -> None:
    pool = BufferPool(share=True)
    taken = [pool.take(SIZE) for _ in range(SPARE + 3)]
    for buffer in taken:
        pool.give(buffer)
    assert [buffer.fd >= 0 for buffer in taken] == [True] * SPARE + [False] * 3
    pool.close()
    assert all(buffer.fd < 0 for buffer in taken)
    last = BufferPool(share=True)
    buffer = last.take(SIZE)
    last.close()
    last.give(buffer)
    assert buffer.fd < 0


def test_of_a_size_that_nobody_wants_none_are_kept() -> None:
    pool = BufferPool(share=True)
    first, second, other = pool.take(SIZE), pool.take(SIZE), pool.take(2 * SIZE)
    pool.give(first)
    pool.give(other)
    view = second.lend()
    pool.give(second)
    pool.unwanted(SIZE)
    assert (first.fd < 0, second.fd < 0, other.fd < 0) == (True, False, False)
    pool.prepare(SIZE)  # asked for while it was wanted
    del view
    gc.collect()
    assert second.fd < 0
    third = pool.take(SIZE)
    assert third.fd >= 0
    pool.give(third)
    assert pool.take(SIZE) is third  # it is wanted again
    pool.unwanted(SIZE)
    pool.written(third)  # as when another version of it has come
    pool.give(third)
    assert pool.take(SIZE) is third


@pytest.mark.parametrize("share", [True, False])
def test_a_room_that_is_lent_is_not_used_again_before_the_last_view_is_gone(share: bool) -> None:
    pool = BufferPool(share)
    buffer = pool.take(SIZE)
    buffer.array[:] = 1
    view = buffer.lend()
    piece = view[10:20]
    other = buffer.lend()
    pool.give(buffer)
    del view
    assert pool.take(SIZE) is not buffer
    del other
    assert pool.take(SIZE) is not buffer
    assert bytes(piece) == b"\1" * 10
    with pytest.raises(TypeError):
        piece[0] = 2
    del piece
    gc.collect()
    assert pool.take(SIZE) is buffer


def test_a_room_waits_for_every_reader_to_say_that_it_maps_it_no_more() -> None:
    pool = BufferPool(share=True)
    buffer = pool.take(SIZE)
    buffer.readers |= {1, 2}
    pool.give(buffer)
    buffer.forget(1, clean=True)
    buffer.forget(3, clean=True)
    assert pool.take(SIZE) is not buffer
    buffer.forget(2, clean=True)
    assert pool.take(SIZE) is buffer


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_reader_sees_that_died_without_a_word_never_changes(when: str) -> None:
    pool = BufferPool(share=True)
    buffer = pool.take(SIZE)
    buffer.array[:] = 5
    buffer.readers.add(1)
    with seen(buffer) as view:
        if when == "before":
            buffer.forget(1, clean=False)
        pool.give(buffer)
        if when == "after":
            buffer.forget(1, clean=False)
        assert buffer.fd < 0
        for _ in range(4):
            another = pool.take(SIZE)
            assert another is not buffer
            another.array[:] = 9
        del buffer
        gc.collect()
        assert view[:] == b"\5" * SIZE


def test_readers_cannot_write_shrink_or_grow_it() -> None:
    buffer = BufferPool(share=True).take(SIZE)
    with pytest.raises(PermissionError):
        mmap.mmap(buffer.fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for act in (
        lambda: os.pwrite(buffer.fd, b"x", 0),
        lambda: os.ftruncate(buffer.fd, 1),
        lambda: os.ftruncate(buffer.fd, 1 << 20),
    ):
        with pytest.raises(PermissionError):
            act()
    memory.verify(buffer.fd, SIZE)
    with mmap.mmap(buffer.fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        view[0] = 99  # stays in this mapping
        assert buffer.array[0] == 0
        buffer.array[1] = 7  # the owner still writes
        with seen(buffer) as other:
            assert (other[0], other[1]) == (0, 7)


def test_memory_that_is_promised_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages come with the first write, so each of several buffers alone may seem to fit."""
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * SIZE)
    pool = BufferPool(share=True)
    first, _second = pool.take(SIZE), pool.take(SIZE)
    with pytest.raises(NotEnoughMemory, match="but 0 are free on this machine; none were taken"):
        pool.take(SIZE)
    pool.written(first)  # the machine knows of it now
    pool.take(SIZE)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    pool.prepare(2 * SIZE)  # makes none, and says nothing
    pool.give(first)
    assert pool.take(SIZE) is first  # takes nothing


def test_no_descriptors_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none)
    with pytest.raises(NotEnoughMemory, match="Too many open files"):
        BufferPool(share=True).take(SIZE)


def settled(pool: BufferPool) -> None:
    """Wait until the thread that makes buffers ready has nothing more to do."""
    thread = pool._thread
    if thread is not None:
        thread.join(PATIENCE)
    assert pool._thread is None


def test_a_buffer_that_was_made_ready_is_taken() -> None:
    pool = BufferPool(share=True)
    pool.prepare(SIZE)
    pool.prepare(SIZE)
    settled(pool)
    (ready,) = pool._free[SIZE]
    assert os.fstat(ready.fd).st_blocks * 512 >= SIZE, "its pages are not there"
    assert pool.take(SIZE) is ready
    settled(pool)
    assert not pool._free[SIZE], "one was asked for, and no second one"


def test_as_many_are_made_ready_as_a_version_takes() -> None:
    pool = BufferPool(share=True)
    pool.prepare(SIZE, SPARE + 2)
    pool.prepare(2 * SIZE)
    settled(pool)
    assert {size: len(free) for size, free in pool._free.items()} == {SIZE: SPARE + 2, 2 * SIZE: 1}
    taken = [pool.take(SIZE) for _ in range(SPARE + 2)]
    pool.prepare(SIZE, 1)
    settled(pool)
    for buffer in taken:
        pool.give(buffer)
    assert len(pool._free[SIZE]) == SPARE


class Halfway:
    """Holds the thread that makes a buffer ready up when it has the first of its pages."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.steps: list[int] = []
        populate = Buffer.populate
        patch.setattr(buffers_module, "STEP", SIZE // 4)

        def slow(buffer: Buffer, start: int, stop: int) -> bool:
            done = populate(buffer, start, stop)
            self.steps.append(start)
            self.reached.set()
            return self.go_on.wait(PATIENCE) and done

        patch.setattr(Buffer, "populate", slow)

    def end(self, pool: BufferPool) -> None:
        self.go_on.set()
        settled(pool)


def test_a_buffer_that_is_half_ready_is_taken_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two buffers' pages would be found at once, and whoever takes one would wait for both."""
    pool, halfway = BufferPool(share=True), Halfway(monkeypatch)
    pool.prepare(SIZE)
    assert halfway.reached.wait(PATIENCE)
    coming = pool._coming
    other = pool.take(2 * SIZE)
    taken = pool.take(SIZE)
    assert taken is coming is not other
    taken.array[:] = 7
    halfway.end(pool)
    assert halfway.steps == [0], "it went on with pages that somebody else has"
    assert taken.array.tobytes() == b"\7" * SIZE
    assert pool.take(SIZE) is not taken


@pytest.mark.parametrize("close", [False, True])
def test_a_buffer_that_is_not_wanted_any_more_is_not_made_ready(close: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, halfway = BufferPool(share=True), Halfway(monkeypatch)
    pool.prepare(SIZE)
    assert halfway.reached.wait(PATIENCE)
    if close:
        pool.close()
    else:
        pool.unwanted(SIZE)
    halfway.end(pool)
    assert halfway.steps == [0]
    assert not pool._free.get(SIZE)
    pool.prepare(SIZE)
    assert pool._thread is None


@pytest.mark.parametrize("error", [NotEnoughMemory("full"), MemoryError("full"), OSError("no descriptors left")])
def test_no_memory_for_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends, and begins again when there is some."""

    def full(*args: object) -> None:
        raise error

    pool = BufferPool(share=True)
    with monkeypatch.context() as patched:
        patched.setattr(buffers_module, "Buffer", full)
        pool.prepare(SIZE)
        settled(pool)
    pool.prepare(SIZE)
    settled(pool)
    assert len(pool._free[SIZE]) == 1


def test_no_thread_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = BufferPool(share=True)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        pool.prepare(SIZE)
    assert pool.take(SIZE).size == SIZE
    pool.prepare(SIZE)
    settled(pool)
    assert len(pool._free[SIZE]) == 1


def look_at_everything(seed: int, steps: int = 300) -> None:
    """BufferPool are taken, filled, shared, lent and given; what anybody sees never changes."""
    chance = random.Random(seed)
    pool = BufferPool(share=True)
    held: list[tuple[Buffer, int]] = []
    mapped: list[tuple[Buffer, int, mmap.mmap, int]] = []  # buffer, reader, view, content
    lent: list[tuple[memoryview, int]] = []
    for step in range(steps):
        act = chance.randrange(6)
        if act == 0 or not held:
            buffer, content = pool.take(SIZE), 1 + step % 255
            buffer.array[:] = content
            held.append((buffer, content))
        elif act == 1:
            pool.give(held.pop(chance.randrange(len(held)))[0])
        elif act == 2:
            buffer, content = chance.choice(held)
            buffer.readers.add(step)
            mapped.append((buffer, step, seen(buffer), content))
        elif act == 3 and mapped:
            buffer, reader, view, _ = mapped.pop(chance.randrange(len(mapped)))
            view.close()
            buffer.forget(reader, clean=True)
        elif act == 4 and mapped:
            buffer, reader, view, content = mapped.pop(chance.randrange(len(mapped)))
            buffer.forget(reader, clean=False)
            lent.append((memoryview(view), content))  # it is gone, and looks on
        elif act == 5:
            buffer, content = chance.choice(held)
            lent.append((buffer.lend()[:10], content))
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


@pytest.mark.parametrize("bug", ["readers", "lent", "tainted"])
def test_memory_that_changes_under_a_reader_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Buffer._release

    def careless(self: Buffer) -> None:
        if bug == "readers":
            self.readers = set()
        elif bug == "lent":
            self._lent = 0
        else:
            self.tainted = False
        settle(self)

    monkeypatch.setattr(Buffer, "_release", careless)
    with pytest.raises(AssertionError, match="changed under a reader"):
        test_what_anybody_can_see_never_changes()


def test_rooms_are_taken_and_given_by_many_threads() -> None:
    pool = BufferPool(share=False)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(300):
            buffer = pool.take(64)
            buffer.array[:] = mark
            view = buffer.lend()
            if not np.array_equal(np.frombuffer(view, np.uint8), np.full(64, mark, np.uint8)):
                wrong.append(mark)
            pool.give(buffer)
            del view

    threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
    assert sum(map(len, pool._free.values())) <= SPARE
