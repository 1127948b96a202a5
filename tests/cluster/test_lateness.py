"""Who keeps others waiting, as the coordinator sees it."""

from __future__ import annotations

from headwater.errors import ClusterError
from headwater.wire import messages as m
from tests.cluster.fake_peers import SERVER, WORKER, FakePeers, spec


def late(script: FakePeers, asker: int, **question: object) -> m.Late:
    script.take(WORKER + asker)
    script.ask(WORKER + asker, m.WhoIsLate(**question))  # type: ignore[arg-type]
    return script.last(WORKER + asker, m.Late)


def reach(script: FakePeers, rank: int, *clocks: int) -> None:
    """What the heartbeat of ``rank`` says of tables 1, 2, …"""
    script.tell(WORKER + rank, m.Heartbeat(tables=tuple(enumerate(clocks, 1))))


def test_at_a_step_those_are_late_that_have_not_come_to_it_in_this_table() -> None:
    script = FakePeers(1)
    script.join(0, 1, 2, world=4)
    for number, name in enumerate(("a", "b"), 1):
        script.ask(WORKER, m.Declare(spec(name)))
        script.create(number)
    reach(script, 0, 3, 9)
    reach(script, 1, 2, 9)
    assert late(script, 0, table="a", clock=3) == m.Late(alive=(1, 2), absent=(3,))
    assert late(script, 0, table="b", clock=9) == m.Late(alive=(2,), absent=(3,))
    script.ask(WORKER + 2, m.Pause(True))
    assert late(script, 0, table="b", clock=9) == m.Late(absent=(3,)), "nobody waits for one that rests"


def test_a_worker_that_left_is_not_late() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Declare(spec()))
    script.create()
    script.ask(WORKER + 1, m.Leave())
    assert late(script, 0, table="t", clock=1) == m.Late()


def test_while_a_table_gets_its_first_values_the_one_that_gives_them_is_late() -> None:
    script = FakePeers(2)
    script.join(0, 1, world=2)
    script.ask(WORKER + 1, m.Declare(spec(init="values")))
    assert late(script, 1, table="t") == m.Late(shards=(0, 1))
    script.create()
    assert late(script, 1, table="t") == m.Late(alive=(0,))
    script.ask(WORKER, m.Declare(spec(init="values")))
    assert late(script, 1, table="t") == m.Late(alive=(0,))
    script.ask(WORKER, m.Initialised(1))
    assert late(script, 1, table="t") == m.Late()
    assert late(script, 1, table="nothing") == m.Late()


def test_who_asks_for_a_table_again_gives_the_values_when_its_time_has_come() -> None:
    """The first answer may be to a question that nobody waits for any more."""
    script = FakePeers(1)
    script.join(0, 1, world=2)
    for _ in range(2):
        script.ask(WORKER, m.Declare(spec(init="values")))
    script.create()
    assert [x for x in script.take(WORKER) if isinstance(x, m.Declared)] == [
        m.Declared(1, spec(init="values"), True, 2)
    ]


def test_at_a_barrier_those_are_late_that_are_not_there() -> None:
    script = FakePeers(1)
    script.join(0, 1, world=3)
    script.ask(WORKER, m.Barrier("x", 1))
    assert late(script, 0, barrier="x") == m.Late(alive=(1,), absent=(2,))
    script.ask(WORKER + 1, m.Barrier("x", 1))
    assert late(script, 0, barrier="x") == m.Late(absent=(2,))


def test_a_dead_server_is_nobodys_lateness() -> None:
    script = FakePeers(2)
    script.join(0, 1, world=2)
    script.ask(WORKER, m.Declare(spec()))
    script.create()
    script.hang_up(SERVER + 1)
    script.take(WORKER)
    script.ask(WORKER, m.WhoIsLate("t", 1))
    error = script.error(WORKER)
    assert isinstance(error, ClusterError)
    assert "server 1 is dead" in str(error)
