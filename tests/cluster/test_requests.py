"""The tables of requests and notices: each kind has one line, and a new one needs no more than that."""

from __future__ import annotations

from typing import get_args

import pytest

from headwater.cluster import requests
from headwater.cluster.coordinator import Coordinator
from headwater.errors import ProtocolError
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker
from tests.cluster.fake_peers import WORKER, FakePeers

TO_A_SERVER = {m.Create, m.Open, m.Attach, m.Slots, m.SlotPart, m.Follow, m.Lend, m.PauseTable, v.Fetch}


def test_every_request_is_for_the_coordinator_or_for_a_server() -> None:
    assert set(get_args(m.Request)) - set(requests.REQUESTS) == TO_A_SERVER
    assert set(requests.NOTICES) <= set(get_args(m.Notice))


def test_a_new_kind_of_request_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lend(c: Coordinator, asker: Asker, _: m.Lend) -> None:
        c.membership.require(asker.peer)
        c.outbox.reply(asker, m.Done())

    peers = FakePeers(1)
    peers.join(0)
    peers.take(WORKER)
    peers.ask(WORKER, m.Lend(1, 0, 64))
    assert isinstance(error := peers.error(WORKER), ProtocolError)
    assert "Lend does not go to the coordinator" in str(error)
    monkeypatch.setitem(requests.REQUESTS, m.Lend, lend)
    peers.ask(WORKER, m.Lend(1, 0, 64))
    assert peers.take(WORKER) == [m.Done()]
    peers.ask(WORKER + 1, m.Lend(1, 0, 64))
    assert "join first" in str(peers.error(WORKER + 1))


def test_a_notice_that_is_not_for_the_coordinator_is_refused() -> None:
    peers = FakePeers(1)
    peers.join(0)
    peers.take(WORKER)
    peers.tell(WORKER, m.Drop(1))
    assert "Drop does not go to the coordinator" in str(peers.error(WORKER))
