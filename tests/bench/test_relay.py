"""``headwater bench relay``: its figures, and its processes' work, done in this one."""

from __future__ import annotations

import pytest

import headwater
from headwater_bench.relay import CROWDS, JoinTimes, RelayedTable, _late_figures
from headwater_bench.relayed import Readers, RelayProcess


def test_the_late_joiner_is_the_anchor_and_the_delta_beside_a_dense_fetch() -> None:
    rounds = [
        JoinTimes(1.0, 1.0, 0.1, 2.0, 500, 505),
        JoinTimes(2.0, 1.8, 0.2, 2.0, 500, 505),
        JoinTimes(1.0, 1.2, 0.3, 1.5, 500, 505),
    ]
    found = {figure.name: figure for figure in _late_figures(rounds, 500 * 2**20)}
    ratio = found["late joiner: anchor + chain / dense fetch"]
    assert ratio.value == pytest.approx(1.1)  # the median of 1.1, 1.0 and 1.5
    assert (ratio.target, ratio.met) == ("<= 1.1", ratio.value <= 1.1)
    assert found["late joiner: the delta alone"].value == pytest.approx(0.2)
    assert found["late joiner: bytes / dense fetch"].value == pytest.approx(1.01)
    assert found["joiner while a version is published / dense fetch"].value == pytest.approx(1.5)
    assert found["size"].value == 500


def test_readers_behind_a_relay_do_what_the_bench_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", "tcp")
    with headwater.connect("inproc://bench-relay", servers=2, rank=0, world=1) as client:
        publisher = RelayedTable(client, 1)
        relay, readers = RelayProcess(), Readers()
        try:
            address = relay.begin("inproc://bench-relay")
            first = publisher.publish()
            assert relay.wait(first)
            assert readers.join(address) > 0
            assert relay.wait(publisher.publish())
            assert readers.catch_up() > 0
            fetched, deltas = readers.leave()
            assert deltas == 2
            assert 2**20 < fetched < 1.1 * 2**20
            assert readers.current(address) > 0
            readers.leave()
            assert readers.crowd(address, CROWDS[1]) == CROWDS[1]
            sent = relay.sent()
            assert readers.lease() == first + 1
            assert relay.sent() - sent == CROWDS[1] * 2**20
            readers.part()
        finally:
            relay.end()
