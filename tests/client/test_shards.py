"""Whom a client asks when the link to a shard breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from headwater.client.client import Client
from headwater.client.part import TablePart
from headwater.client.session import Session
from headwater.client.shards import UNSERVED
from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, LinkBroken, StaleEpoch, Unreachable
from headwater.transports.stream import Handler, Link
from headwater.wire import messages as m
from tests.client.fake_links import Answer, Line, Still, joined


class Town:
    """A coordinator that always answers, and servers by address. ``view`` says who leads shard 0."""

    def __init__(self) -> None:
        self.runtime = Still()
        self.view: m.ShardView | HeadwaterError = m.ShardView(0, 1, "tcp://a:1", "", "")
        self.servers: dict[str, Callable[[m.Request], Answer]] = {"tcp://a:1": self.serve}
        self.dialed: list[str] = []
        self.opened: list[m.Open] = []
        self.epoch = 1

    def dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        if view is None:
            return cast("Link", Line(handler, self.runtime, self.coordinate))
        self.dialed.append(view.address)
        if view.address not in self.servers:
            raise Unreachable(f"nobody answers at {view.address}")
        return cast("Link", Line(handler, self.runtime, self.servers[view.address]))

    def coordinate(self, request: m.Request) -> Answer:
        if isinstance(request, m.Join):
            return joined(True)
        return self.view if isinstance(request, m.Find) else m.Done()

    def serve(self, request: m.Request) -> Answer:
        if isinstance(request, m.Open):
            self.opened.append(request)
            return m.Opened(self.epoch, 5)
        return m.Done()

    def client(self) -> Client:
        return Client(self.dial, timeout=60.0, runtime=self.runtime)

    def moves(self, address: str) -> None:
        """Another server takes over."""
        self.servers = {address: self.serve}
        self.epoch += 1
        self.view = m.ShardView(0, self.epoch, address, "", "")


class Attached:
    """A table that is attached."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def attach(self, session: Session, deadline: float) -> None:
        self.sessions.append(session)

    def push_again(self, session: Session) -> None:
        raise AssertionError("nobody has died")


def test_a_shard_is_dialed_when_it_is_needed_and_not_before() -> None:
    town = Town()
    client = town.client()
    assert town.dialed == []
    client.shards.reach(client.shards.sessions[0])
    client.shards.reach(client.shards.sessions[0])
    assert town.dialed == ["tcp://a:1"]


def test_after_a_failover_the_client_finds_the_new_primary_and_opens_the_same_session_there() -> None:
    town = Town()
    client = town.client()
    session = client.shards.sessions[0]
    client.shards.reach(session)
    table = Attached()
    session.parts[1], client.shards.tables[1] = cast("TablePart", object()), table
    town.moves("tcp://b:1")
    client.shards.recover(session, town.runtime.now() + 60, LinkBroken("reset"))
    assert town.dialed == ["tcp://a:1", "tcp://b:1"]
    assert [(o.session, o.rank) for o in town.opened] == [(7, 1), (7, 1)]
    assert (session.epoch, session.address) == (2, "tcp://b:1")
    assert table.sessions == [session], "its tables are attached again"


def test_a_server_that_does_not_know_of_its_promotion_is_asked_again() -> None:
    town = Town()
    refusals = [StaleEpoch("not the primary")] * 3

    def late(request: m.Request) -> Answer:
        return refusals.pop() if refusals else town.serve(request)

    town.servers = {"tcp://a:1": late}
    client = town.client()
    client.shards.reach(client.shards.sessions[0])
    assert len(town.dialed) == 4


def test_a_view_older_than_what_the_client_has_seen_is_not_followed() -> None:
    town = Town()
    client = town.client()
    session = client.shards.sessions[0]
    client.shards.reach(session)
    session.epoch = 3
    with pytest.raises(DeadlineExceeded, match="this client has seen 3"):
        client.shards.recover(session, town.runtime.now() + 1, LinkBroken("reset"))
    assert town.dialed == ["tcp://a:1"]


def test_a_shard_that_nobody_serves_is_waited_for_a_while_and_then_broken() -> None:
    town = Town()
    client = town.client()
    town.view = ClusterError("server 0 is dead and shard 0 has no other copy")
    begun = town.runtime.now()
    with pytest.raises(LinkBroken, match=r"no other copy; pushes .* may or may not be applied"):
        client.shards.recover(client.shards.sessions[0], begun + 60, LinkBroken("reset"))
    assert town.runtime.now() - begun == pytest.approx(UNSERVED, abs=0.2)


def test_a_dead_primary_is_asked_for_until_somebody_takes_over_or_the_deadline() -> None:
    town = Town()
    client = town.client()
    town.servers = {}
    begun = town.runtime.now()
    with pytest.raises(DeadlineExceeded, match="shard 0 could not be reached within HEADWATER_TIMEOUT"):
        client.shards.recover(client.shards.sessions[0], begun + 1.0, LinkBroken("reset"))
    assert len(town.dialed) > 10


def test_a_server_that_accepts_and_says_nothing_is_left_after_some_seconds() -> None:
    town = Town()
    town.servers = {"tcp://a:1": lambda request: None}
    client = town.client()
    begun = town.runtime.now()
    with pytest.raises(DeadlineExceeded, match="accepted the connection and did not answer"):
        client.shards.recover(client.shards.sessions[0], begun + 12.0, LinkBroken("reset"))
    assert len(town.dialed) == 3
