"""The line to the coordinator: dialed again when it breaks, and questions asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest

from headwater.client.control import BRIEF, Control
from headwater.errors import ClusterError, HeadwaterError, LinkBroken, UnknownTable, Unreachable
from headwater.transports.stream import Handler, Link
from headwater.wire import messages as m
from tests.client.fake_links import Answer, Line, Still, joined


class Desk:
    """Dials to the coordinator: each opens the next of ``lines``, or fails with it."""

    def __init__(self, lines: Sequence[Callable[[m.Request], Answer] | HeadwaterError]) -> None:
        self.runtime = Still()
        self.heard: list[m.Request] = []
        self.dials: list[float] = []
        self._lines = list(lines)

    def dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        self.dials.append(self.runtime.now())
        line = self._lines.pop(0) if len(self._lines) > 1 else self._lines[0]
        if isinstance(line, HeadwaterError):
            raise line

        def answer(request: m.Request) -> Answer:
            self.heard.append(request)
            return line(request)

        return cast("Link", Line(handler, self.runtime, answer))

    def control(self) -> Control:
        return Control(self.dial, m.Join("worker", 7, "host", 9, None, 2), self.runtime, 60.0)


def first(request: m.Request, durable: bool = True) -> Answer:
    """A coordinator that lets a worker in and is killed by the next question."""
    if isinstance(request, m.Join):
        return joined(durable)
    raise LinkBroken("the coordinator died")


def second(request: m.Request) -> Answer:
    return joined(True) if isinstance(request, m.Join) else m.Done()


GONE = Unreachable("nobody answers")


def test_a_question_is_asked_again_after_the_coordinator_has_come_back() -> None:
    desk = Desk([first, GONE, GONE, second])
    control = desk.control()
    assert control.ask(m.Barrier("b", 1)) == m.Done()
    again, question = desk.heard[-2:]
    assert again == m.Join("worker", 7, "host", 9, 1, 2, resume=True), "as the same member, of the rank it was given"
    assert question == m.Barrier("b", 1), "with the same turn: it may be over already"
    assert len(desk.dials) == 4


def test_a_refusal_is_an_answer_and_not_asked_again() -> None:
    desk = Desk([lambda request: joined(True) if isinstance(request, m.Join) else UnknownTable("table 9")])
    with pytest.raises(UnknownTable):
        desk.control().ask(m.Initialised(9))
    assert len(desk.dials) == 1


def test_a_worker_that_was_given_up_meanwhile_is_told_so() -> None:
    desk = Desk([first, lambda request: ClusterError("worker 1 was given up while it was away")])
    with pytest.raises(ClusterError, match="given up"):
        desk.control().ask(m.Barrier("b", 1))


@pytest.mark.parametrize("durable", [False, True])
def test_a_coordinator_that_may_come_back_is_waited_for_until_the_deadline_another_only_briefly(durable: bool) -> None:
    desk = Desk([lambda request: first(request, durable), GONE])
    control = desk.control()
    begun = desk.runtime.now()
    with pytest.raises(Unreachable):
        control.ask(m.Status())
    assert desk.runtime.now() - begun == pytest.approx(60.0 if durable else BRIEF, abs=0.3)
    assert control.gone is not durable
