"""How long a wait for other workers goes on: under a clock that the test moves."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from headwater.client.patience import Patience
from headwater.errors import ClusterError, DeadlineExceeded, HeadwaterError, LinkBroken
from headwater.testing import FakeClock
from headwater.wire.data_plan import ANY, Late, WhoIsLate

STEP = WhoIsLate("model", 7)


class FakeClient:
    """Worker 3; the coordinator says ``answer``."""

    rank = 3
    timeout, step_timeout = 300.0, 1800.0

    def __init__(self) -> None:
        self.clock = FakeClock(50.0)
        self.answer: Late | HeadwaterError = Late()
        self.asked: list[WhoIsLate] = []

    @property
    def runtime(self) -> Any:
        return self

    def now(self) -> float:
        return self.clock()

    def ask(self, message: WhoIsLate, timeout: float) -> Late:
        assert timeout <= 2.0, "a coordinator that is away does not hold this up"
        self.asked.append(message)
        if isinstance(self.answer, HeadwaterError):
            raise self.answer
        return self.answer


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def ends(client: FakeClient, patience: Patience, limit: float = 10_000.0) -> tuple[float, str]:
    """After how many seconds of quarter-second turns the wait was given up, and with which words."""
    begun = client.clock()
    while client.clock() - begun < limit:
        client.clock.advance(0.25)
        try:
            patience.look("shard 1")
        except DeadlineExceeded as error:
            return client.clock() - begun, str(error)
    return limit, ""


def patience(client: FakeClient, timeout: float | None = None, question: WhoIsLate = STEP) -> Patience:
    return Patience(client, timeout, lambda: question)  # type: ignore[arg-type]


def test_who_is_alive_is_waited_for_until_the_step_timeout(
    client: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.answer = Late(alive=(0, 2))
    with caplog.at_level(logging.WARNING, "headwater"):
        seconds, words = ends(client, patience(client))
    assert seconds == 1800.0
    assert words.startswith("workers 0, 2 did not come to step 7 of table 'model' within 1.8e+03 s")
    assert "(HEADWATER_STEP_TIMEOUT); what was pushed may still be applied" in words
    assert len(caplog.messages) == 5, "once in HEADWATER_TIMEOUT"
    assert caplog.messages[0] == (
        "worker 3 waits for workers 0, 2 at step 7 of table 'model', for 300 s now; alive, so this goes on until "
        "HEADWATER_STEP_TIMEOUT (1800 s)"
    )
    assert len(client.asked) < 30, "it is not asked all the time"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Late(), "shard 1 did not answer for step 7 of table 'model' within 300 s (HEADWATER_TIMEOUT), and no worker"),
        (Late(absent=(1,)), "worker 1 did not come to step 7 of table 'model' within 300 s (HEADWATER_TIMEOUT) and is"),
        (Late(alive=(0,), absent=(1,)), "worker 1 did not come"),
        (Late(shards=(0, 1)), "server of shard 0, 1 did not answer"),
        (LinkBroken("the connection ended"), "shard 1 did not answer .* (the connection ended)"),
        (ClusterError("server 1 is dead"), "(server 1 is dead)"),
    ],
)
def test_for_all_else_the_timeout_counts(client: FakeClient, answer: Late | HeadwaterError, says: str) -> None:
    client.answer = answer
    seconds, words = ends(client, patience(client))
    assert seconds == 300.0
    for part in says.split(" .* "):
        assert part in words


def test_when_the_last_has_come_the_servers_have_the_timeout_again(client: FakeClient) -> None:
    client.answer, wait = Late(alive=(0,)), patience(client)
    assert ends(client, wait, 500.0) == (500.0, "")
    client.answer = Late()
    seconds, words = ends(client, wait)
    assert 225.0 <= seconds <= 300.0
    assert words.startswith("shard 1 did not answer")


@pytest.mark.parametrize("timeout", [0.5, 20.0])
def test_a_caller_who_says_how_long_means_it(client: FakeClient, timeout: float) -> None:
    client.answer = Late(alive=(0,))
    seconds, words = ends(client, patience(client, timeout))
    assert seconds == timeout
    assert "worker 0 did not come to step 7" in words
    assert "(the timeout of this call)" in words


@pytest.mark.parametrize(
    ("question", "place"),
    [
        (WhoIsLate(barrier="ready"), "barrier 'ready'"),
        (WhoIsLate(barrier=""), "the barrier"),
        (WhoIsLate("model", ANY), "table 'model'"),
        (WhoIsLate("model"), "table 'model'"),
    ],
)
def test_it_says_where(client: FakeClient, question: WhoIsLate, place: str) -> None:
    client.answer = Late(alive=(0,))
    assert f"worker 0 did not come to {place} within" in ends(client, patience(client, 1.0, question))[1]
