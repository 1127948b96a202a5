"""Which refusals a server counts, session by session, for ``headwater status``."""

from __future__ import annotations

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
