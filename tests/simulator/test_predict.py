"""Predictions against calculations by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headwater.errors import UsageError
from headwater.testing.predict import predict
from headwater.testing.times import Measured

GIGABYTE = 10**9
MACHINE = Measured(bandwidth=1e9, delay=1e-4, compute=0.1, copy=1e10, kernel=5e9)


def test_one_worker_and_one_server() -> None:
    """Compute 0.1 s; 1 GB out at 1 GB/s 1 s; taken in 0.1 s, added up 0.1 s, stepped 0.2 s; 1 GB back 1 s."""
    found = predict(MACHINE, nbytes=GIGABYTE)
    assert found.seconds == pytest.approx(0.1 + 1.0 + 0.1 + 0.1 + 0.2 + 1.0, rel=0.01)


def test_two_servers_share_the_work_and_the_worker_is_the_narrow_place() -> None:
    """The second half is out after 1 s; its server takes half as long; both halves come back over one line in 1 s."""
    found = predict(MACHINE, nbytes=GIGABYTE, servers=2)
    assert found.seconds == pytest.approx(0.1 + 1.0 + 0.05 + 0.05 + 0.1 + 1.0, rel=0.01)


def test_a_second_replica_costs_the_sending_of_one_aggregate() -> None:
    """Half a GB from each server to the other at the same time is 0.5 s; the follower takes it in within 0.05 s."""
    alone = predict(MACHINE, nbytes=GIGABYTE, servers=2)
    pair = predict(MACHINE, nbytes=GIGABYTE, servers=2, replicas=2)
    assert 0.5 < pair.seconds - alone.seconds < 0.8


def test_more_servers_carry_more_workers() -> None:
    narrow = predict(MACHINE, nbytes=GIGABYTE, workers=8, steps=3)
    wide = predict(MACHINE, nbytes=GIGABYTE, workers=8, servers=8, steps=3)
    assert wide.steps > 3 * narrow.steps


def test_what_takes_no_time_costs_nothing() -> None:
    instant = replace(MACHINE, bandwidth=1e15, delay=0.0, compute=0.5, copy=1e15, kernel=1e15)
    assert predict(instant, nbytes=GIGABYTE, steps=4).seconds == pytest.approx(0.5, rel=1e-3)


def test_a_shape_that_is_no_cluster_is_refused() -> None:
    with pytest.raises(UsageError, match="not a cluster"):
        predict(MACHINE, nbytes=GIGABYTE, servers=1, replicas=2)
