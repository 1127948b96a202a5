"""Which records wait for whom."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from headwater.server.replication.log import Log
from headwater.server.replication.records import Drop, Record

SEEDS = st.integers(0, 2**32).map(random.Random)


def filled(*required: int, records: int = 3) -> Log:
    log = Log(10)
    for server in required:
        log.required[server] = 10
    for lsn in range(11, 11 + records):
        log.append(Record(lsn, Drop(1)))
    return log


def taken(log: Log) -> list[int]:
    found = []
    while (record := log.next_accepted()) is not None:
        found.append(record.lsn)
    return found


def test_without_followers_nothing_waits() -> None:
    log = filled()
    assert not log.replicated
    assert taken(log) == [11, 12, 13]
    assert log.accepted_by_all == log.last == 13


def test_a_record_waits_for_the_slowest_follower() -> None:
    log = filled(1, 2)
    log.accepted(1, 13)
    assert taken(log) == []
    log.accepted(2, 12)
    assert taken(log) == [11, 12]
    assert log.accepted_by_all == 12
    assert log.behind() == {1: 0, 2: 1}
    del log.required[2]
    assert taken(log) == [13], "nobody waits for one that does not follow any more"


def test_acceptances_neither_go_back_nor_beyond_what_was_given_out() -> None:
    log = filled(1)
    log.accepted(1, 12)
    log.accepted(1, 11)
    assert log.required == {1: 12}
    log.accepted(1, 99)
    log.append(Record(14, Drop(1)))
    assert taken(log) == [11, 12, 13], "it cannot have accepted what did not exist"
    log.accepted(7, 14)
    assert 7 not in log.required, "one that nobody waits for does not become one that is waited for"


def test_with_too_few_copies_nothing_goes_on() -> None:
    log = filled()
    log.blocked = True
    assert log.replicated
    assert taken(log) == []
    log.blocked = False
    assert taken(log) == [11, 12, 13]


@given(SEEDS)
def test_on_any_schedule_a_taken_record_is_with_everyone_and_in_order(chance: random.Random) -> None:
    log, has, last = Log(), {1: 0, 2: 0}, 0
    log.required = dict(has)
    for _ in range(100):
        match chance.randrange(4):
            case 0:
                log.append(Record(log.last + 1, Drop(1)))
            case 1:
                server = chance.choice((1, 2))
                has[server] = chance.randint(has[server], log.last)
                log.accepted(server, has[server])
            case 2 if 2 in log.required:
                del log.required[2]
            case 3 if 2 not in log.required and chance.random() < 0.3:
                has[2] = log.required[2] = last
        for lsn in taken(log):
            assert lsn == last + 1
            assert all(has[server] >= lsn for server in log.required)
            last = lsn
