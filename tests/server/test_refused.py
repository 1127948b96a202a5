"""What a server refuses its clients, and which refusals it counts for ``headwater status``."""

from __future__ import annotations

import pytest

from headwater.errors import ProtocolError
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Outgoing
from tests.server.serving import NodeHost


def answers(host: NodeHost, peer: int, frame: Frame) -> list[Kind]:
    return [out.frame.kind for out in host.server.receive(peer, frame) if isinstance(out, Outgoing)]


def test_refused_pushes_are_counted_by_session_and_refused_pulls_are_not() -> None:
    host = NodeHost()
    for peer, session in ((1, 70), (2, 80)):
        opening = Frame(Kind.REQUEST, seq=1, body=m.pack(m.Open(session, 0 if peer == 1 else -1, 0, 1)))
        assert answers(host, peer, opening) == [Kind.REPLY]
    assert host.server.heartbeat().refused == ()
    for seq in (1, 2):
        assert answers(host, 1, Frame(Kind.PUSH, table=5, epoch=1, members=1, seq=seq, clock=1)) == [Kind.ERROR]
    assert answers(host, 1, Frame(Kind.PULL, table=5, epoch=1, members=1, seq=1)) == [Kind.ERROR]
    assert answers(host, 2, Frame(Kind.PUSH, table=5, epoch=1, members=1, seq=1, clock=1)) == [Kind.ERROR]
    assert sorted(host.server.heartbeat().refused) == [(70, 2), (80, 1)]
    host.server.closed(2)  # a reader's session ends with its connection
    assert host.server.heartbeat().refused == ((70, 2),)


def test_a_connection_that_its_session_has_left_is_heard_no_more() -> None:
    host = NodeHost()
    for peer in (1, 2):  # the client has lost the first connection before the server did
        opening = Frame(Kind.REQUEST, seq=1, body=m.pack(m.Open(70, 0, 0, 1)))
        assert answers(host, peer, opening) == [Kind.ERROR, Kind.REPLY][2 - peer :]
    (refusal,) = host.server.receive(1, Frame(Kind.PULL, table=5, epoch=1, members=1, seq=1))
    assert isinstance(refusal, Outgoing)
    assert (refusal.peer, refusal.close) == (1, True)
    assert "a session must be opened first" in str(m.read_error(refusal.frame.body))
    with pytest.raises(ProtocolError, match="before a session was opened"):
        host.server.landing(1, Frame(Kind.PUSH, table=5, epoch=1, members=1, seq=1, clock=1, stop=4, payload_length=4))
    host.server.closed(1)
    assert host.server.heartbeat().sessions == 1
