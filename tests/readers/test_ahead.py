"""Versions that are asked for before they are leased: taken, or given back; never a wrong one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import msgspec
import pytest

from headwater.errors import DeadlineExceeded, LinkBroken, VersionExpired
from headwater.readers.fetch import SILENT
from headwater.readers.line import Answer, Line
from headwater.transports import memory
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.sums import checksums, pack
from tests.patience import PATIENCE
from tests.readers.holders import SPEC, Holders, Said, leased, part_of, right, state


def given(holders: Holders) -> list[tuple[int, int]]:
    """(number, shard) of memory that was handed out and not given back."""
    left = [(fetch.number, fetch.shard) for fetch in holders.asked]
    for word in holders.unmapped:
        left.remove((word.number, word.shard))
    return sorted(left)


def test_a_version_that_was_asked_for_ahead_is_taken(holders: Holders) -> None:
    holders.shared = True
    first = holders.store(1)
    holders.fetcher.ahead(2, leased(1).parts)
    assert len(holders.asked) == 4
    second = holders.store(2)
    assert len(holders.asked) == 4
    assert right(first, 1)
    assert right(second, 2)
    del first, second
    gc.collect()
    holders.fetcher.forgo()
    holders.fetcher.settle()
    assert given(holders) == []


def test_what_was_asked_for_ahead_and_is_not_wanted_is_given_back(holders: Holders) -> None:
    holders.shared = True
    first = holders.store(1)
    for number in (2, 3):
        holders.fetcher.ahead(number, leased(1).parts)
    assert right(holders.store(3), 3)
    holders.fetcher.forgo()
    holders.fetcher.forgo()
    gc.collect()
    holders.fetcher.settle()
    assert given(holders) == [(1, 0), (1, 1)]
    assert right(first, 1)
    holders.fetcher.ahead(4, leased(1).parts)  # and nobody says anything more: the fetcher is closed


@pytest.mark.parametrize("share", [True, False])
def test_only_who_shares_memory_is_asked_ahead(holders: Holders, share: bool) -> None:
    holders.fetcher.ahead(1, leased(1).parts)  # nobody is known yet
    holders.shared = not share
    holders.store(1)
    holders.links[0].shared, holders.links[1].shared = share, False
    holders.fetcher.ahead(2, leased(1).parts)
    assert [fetch.shard for fetch in holders.asked[2:]] == ([0] if share else [])
    holders.fetcher.forgo()


def refusing(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
    memory.close_all(said[0][2])
    return [(Frame(Kind.ERROR, seq=frame.seq, body=m.error_body(VersionExpired("not here"))), b"", ())]


def of_another(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
    return part_of(said, sums=pack(checksums(state(7)[fetch.shard])))


def whole(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
    memory.close_all(said[0][2])
    return Holders().honest(frame, msgspec.structs.replace(fetch, shared=False))


def mad(frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
    memory.close_all(said[0][2])
    return part_of([(said[0][0], b"", ())], encoding="shared", nbytes=-1)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("answer", [refusing, of_another, whole, mad])
def test_a_guess_that_was_wrong_costs_a_question(
    holders: Holders, answer: Callable[[Frame, v.Fetch, list[Said]], list[Said]], wanted: bool
) -> None:
    holders.shared = True
    first = holders.store(1)
    holders.answer = answer
    holders.fetcher.ahead(2, leased(1).parts)
    holders.answer = lambda frame, fetch, said: said
    if wanted:
        assert right(holders.store(2), 2)
        assert len(holders.asked) == 6
    holders.fetcher.forgo()
    assert right(first, 1)
    assert right(holders.store(3, first), 3)


class Silence:
    """Holders say nothing until ``end``; then what they would have said comes."""

    def __init__(self, holders: Holders) -> None:
        self._holders, self._kept = holders, list[tuple[int, list[Said]]]()
        holders.answer = self._keep

    def _keep(self, frame: Frame, fetch: v.Fetch, said: list[Said]) -> list[Said]:
        self._kept.append((fetch.shard, said))
        return []

    def end(self) -> None:
        self._holders.answer = lambda frame, fetch, said: said
        for shard, said in self._kept:
            self._holders.links[shard].queue.extend(said)


def test_nobody_waits_for_the_answer_to_a_guess_that_is_not_wanted(holders: Holders) -> None:
    holders.shared = True
    first = holders.store(1)
    silence, before = Silence(holders), holders.now
    holders.fetcher.ahead(2, leased(1).parts)
    holders.fetcher.forgo()
    holders.fetcher.settle()
    assert holders.now == before
    assert len(holders.fetcher._late) == 2
    silence.end()
    holders.fetcher.settle()
    holders.fetcher.settle()
    assert not holders.fetcher._late
    assert given(holders) == [(1, 0), (1, 1)]
    assert all(link.error is None for link in holders.links)
    assert right(first, 1)


def test_what_another_thread_keeps_from_being_given_back_is_given_back_later(holders: Holders) -> None:
    holders.shared = True
    holders.store(1)
    holders.fetcher.ahead(2, leased(1).parts)
    turn, done = threading.Event(), threading.Event()

    def fetching() -> None:
        with holders.fetcher._turn:
            turn.set()
            done.wait(PATIENCE)

    other = threading.Thread(target=fetching)
    other.start()
    assert turn.wait(PATIENCE)
    holders.fetcher.forgo()
    assert len(holders.fetcher._ahead) == 2
    done.set()
    other.join()
    holders.fetcher.settle()
    gc.collect()
    holders.fetcher.settle()
    assert not holders.fetcher._ahead
    assert given(holders) == []


def test_a_lease_that_ends_while_its_thread_receives_disturbs_nothing(holders: Holders) -> None:
    """The garbage collector may end one, at any moment."""
    holders.shared = True
    holders.store(1)
    silence = Silence(holders)
    holders.fetcher.ahead(2, leased(1).parts)
    holders.fetcher.forgo()
    silence.end()
    receive, wait = Line.receive, Line.wait
    inside: list[bool] = []
    again: list[bool] = []

    def collected(self: Line, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        inside.append(True)
        holders.fetcher.settle()
        inside.pop()
        receive(self, frame, fds)

    def waited(self: Line, answer: Answer, deadline: float) -> v.Part:
        again.extend(inside)
        return wait(self, answer, deadline)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Line, "receive", collected)
        patched.setattr(Line, "wait", waited)
        holders.fetcher.settle()
        assert right(holders.store(3), 3)
    assert not again, "it received amid a frame"
    gc.collect()
    holders.fetcher.settle()
    assert given(holders) == []


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


def test_a_guess_that_is_never_answered_ends_its_connection(holders: Holders) -> None:
    holders.shared = True
    holders.store(1)
    silence = Silence(holders)
    holders.fetcher.ahead(2, leased(1).parts)
    holders.fetcher.forgo()
    holders.now += SILENT
    holders.fetcher.settle()
    assert all(link.error is not None for link in holders.links)
    silence.end()
    for link in holders.links:
        link.close()
    assert right(holders.store(2), 2)


@pytest.mark.parametrize("deadline", [SILENT / 2, 3 * SILENT])
def test_a_holder_that_is_silent_after_a_guess_is_waited_for_once(holders: Holders, deadline: float) -> None:
    holders.shared = True
    holders.store(1)
    silence = Silence(holders)
    holders.fetcher.ahead(2, leased(1).parts)
    with pytest.raises(DeadlineExceeded if deadline < SILENT else LinkBroken):
        holders.fetcher.store(leased(2), {1: SPEC}, None, holders.now + deadline)
    holders.fetcher.forgo()
    assert holders.now == min(deadline, SILENT)
    silence.end()
    for link in holders.links:
        link.close()
    assert len(holders.asked) == 4
    assert right(holders.store(2), 2)


def test_a_connection_that_is_dropped_late_takes_no_other_along(holders: Holders) -> None:
    holders.shared = True
    holders.store(1)
    Silence(holders).end()
    holders.fetcher.ahead(3, leased(1).parts)
    for link in holders.links:
        link.close()
    assert right(holders.store(2), 2)  # over new ones
    holders.fetcher.forgo()
    assert right(holders.store(4), 4)
    assert len(holders.links) == 4


def test_a_guess_dies_with_its_holder(holders: Holders) -> None:
    holders.shared = True
    holders.store(1)
    holders.fetcher.ahead(2, leased(1).parts)
    holders.links[0].close()
    assert right(holders.store(2), 2)
    holders.links[1].close()
    holders.fetcher.ahead(3, leased(1).parts)
    holders.fetcher.forgo()
    assert right(holders.store(3), 3)
