"""What becomes of a job, with the times passed in: no engine, no process."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from headwater.errors import LinkBroken, UsageError
from headwater.launch.job import Closing, Decision, Opening, Rules, Supervisor
from headwater.launch.process import Command, Process, Role
from headwater.launch.shape import Shape
from tests.launch.fake_engine import FakeProcess

HUP, INT, TERM, KILL = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL
NEVER = float("inf")


def process(role: Role, rank: int, restarts: int = 0, now: float = 0.0) -> FakeProcess:
    name = role if role == "coordinator" else f"{role[0]}{rank}"
    return FakeProcess(Command(name, role, rank, [], {}, restarts), now, 1, lambda process, number: None)


def ready(each: Process, server: int = -1, now: float = 1.0) -> None:
    each.has_reported(b'{"address": "tcp://h:1", "pid": 1, "server": %d}\n' % server, now)


def running(
    shape: Shape | int = 0, workers: int = 0, rules: Rules | None = None, shown: Callable[[Process], bool] = bool
) -> Supervisor:
    """A job whose cluster is ready and whose workers run."""
    job = Supervisor(Shape(shape) if isinstance(shape, int) else shape, rules or Rules(), shown)
    while places := job.opening():
        for place in places:
            job.started(process(*place))
            ready(job.hosts[-1])
    for rank in range(workers):
        job.started(process("worker", rank))
    return job


def named(decision: Decision) -> list[tuple[str, signal.Signals]]:
    return [(each.name, number) for each, number in decision.signals]


def test_the_coordinator_is_started_before_its_servers() -> None:
    job = Supervisor(Shape(2), Rules(), bool)
    assert job.opening() == [("coordinator", 0)]
    job.started(process("coordinator", 0))
    assert job.opening() == [("server", 0), ("server", 1)]
    job.started(process("server", 0))
    assert job.opening() == []
    assert Supervisor(Shape(0), Rules(), bool).opening() == []


def test_nothing_is_to_be_done_while_all_run() -> None:
    job = running(2, 2)
    assert job.look(100.0) == Decision()
    assert job.goes_on(100.0)
    for worker in job.workers:
        worker.has_ended(0, 101.0)
    assert job.look(101.0) == Decision()
    assert not job.goes_on(101.0)


def test_one_that_fails_ends_the_others() -> None:
    job = running(0, 3)
    job.workers[1].has_ended(7, 5.0)
    decision = job.look(5.0)
    assert named(decision) == [("w0", TERM), ("w2", TERM)]
    assert decision.due == 10.0
    assert job.outcome.message == "w1 exited with code 7 after 5.0 s; w0, w2 stopped"
    assert job.goes_on(5.0)
    job.workers[0].has_ended(0, 6.0)
    assert named(job.look(10.0)) == [("w2", KILL)]
    assert not job.goes_on(20.0)  # the kernel holds it


def test_who_only_lost_another_is_not_at_fault() -> None:
    job = running(0, 3)
    job.workers[1].has_written("stderr", ["headwater.errors.WorkerLost: rank 0 died"])
    job.workers[1].has_ended(1, 5.0)
    assert job.look(5.0) == Decision(due=7.0)
    job.workers[0].has_ended(-KILL, 5.5)
    job.look(5.5)
    assert (job.outcome.failed, job.outcome.code) == ("w0", 137)


def test_without_a_culprit_the_victim_is_named_in_the_end() -> None:
    job = running(0, 2)
    job.workers[1].has_written("stderr", ["headwater.errors.WorkerLost: rank 7 died"])
    job.workers[1].has_ended(1, 5.0)
    assert job.look(6.9).due == 7.0
    assert named(job.look(7.0)) == [("w0", TERM)]
    assert job.outcome.failed == "w1"


def test_an_elastic_worker_that_never_worked_waits_longer_each_time() -> None:
    job = running(0, 2, Rules(elastic=True, restart_workers=9))
    now = 10.0
    for restarts in (0, 1):
        worker = job.workers[1]
        worker.started = worker._ready_since = now
        worker.has_ended(1, now)
        decision = job.look(now)
        assert not decision.replace
        assert now < decision.due < now + 2.0
        now = decision.due
        assert job.goes_on(now)
        assert job.look(now).replace == [worker]
        job.started(process("worker", 1, restarts + 1, now), worker)
    job.workers[1].has_ended(1, now)
    assert job.look(now).due == NEVER  # the third time: given up
    assert job.goes_on(now)  # w0 runs
    job.workers[0].has_ended(0, now)
    assert not job.goes_on(now)
    assert job.outcome.code == 0


def test_a_server_that_is_replaced_may_get_another_number() -> None:
    job = running(Shape(2, replicas=2), 1)
    old = job.servers[1]
    old.has_ended(-KILL, 50.0)
    decision = job.look(50.0)
    assert decision.replace == [old]
    assert decision.notes == [
        "server s1 was killed by SIGKILL; its shards go on elsewhere; a new server takes its place"
    ]
    new = process("server", 1, 1, 50.0)
    job.started(new, old)
    assert job.look(50.0) == Decision()
    ready(new, server=2)
    assert job.look(51.0).notes == ["server s2 has taken the place of s1 (pid 1, restart 1)"]
    assert job.look(51.0) == Decision()


@pytest.mark.parametrize("shape", [Shape(1), Shape(1, state="somewhere")])  # type: ignore[arg-type]
def test_a_coordinator_comes_back_where_it_has_a_state(shape: Shape) -> None:
    job = running(shape, 1)
    (coordinator, _) = job.hosts
    coordinator.has_ended(-KILL, 50.0)
    decision = job.look(50.0)
    if shape.state:
        assert decision.replace == [coordinator]
        assert job.outcome.code == 0
    else:
        assert named(decision) == [("w0", TERM)]
        assert isinstance(job.outcome.error, LinkBroken)


def test_a_hangup_that_is_said_three_times_is_one() -> None:
    job = running(0, 1)
    assert named(job.look(10.0, HUP)) == [("w0", TERM)]
    job.look(10.1, HUP)
    job.look(10.9, HUP)
    assert not job.hurried
    assert job.outcome.code == 129
    assert named(job.look(12.0, HUP)) == [("w0", KILL)]
    assert job.hurried


def test_once_it_ends_nobody_comes_back() -> None:
    job = running(Shape(2, replicas=2), 2, Rules(elastic=True, restart_workers=5))
    job.look(10.0, INT)
    job.workers[0].has_ended(1, 10.5)
    job.servers[0].has_ended(-KILL, 10.5)
    decision = job.look(11.0)
    assert (decision.replace, decision.notes) == ([], [])
    assert job.outcome.code == 130


def test_who_was_to_come_back_does_not_hold_up_the_end() -> None:
    job = running(0, 1, Rules(elastic=True, restart_workers=5))
    job.workers[0].has_ended(1, 0.5)
    assert job.look(0.5).due > 0.5
    assert job.goes_on(0.5)
    job.look(0.6, INT)
    assert not job.goes_on(0.6)


def test_restarts_are_for_elastic_jobs() -> None:
    with pytest.raises(UsageError, match="restart_workers=1: 0 or more, and above 0 only for an elastic job"):
        Rules(restart_workers=1)


def test_opening_ends_with_a_signal_as_python_does() -> None:
    server = process("server", 0)
    opening = Opening([server], [server], 10.0, 60.0)
    assert opening.look(10.0) == 70.0
    with pytest.raises(KeyboardInterrupt):
        opening.look(11.0, INT)
    with pytest.raises(SystemExit) as ended:
        opening.look(11.0, TERM)
    assert ended.value.code == 143
    ready(server, server=4)
    assert opening.look(12.0, INT) is None
    assert server.name == "s4"


def test_closing_ends_one_group_after_the_other() -> None:
    worker, server, coordinator = process("worker", 0), process("server", 0), process("coordinator", 0)
    closing = Closing([[worker], [server], [coordinator]], grace=5.0)

    def look(now: float, *, hurry: bool = False) -> list[tuple[str, signal.Signals]] | None:
        decision = closing.look(now, hurry)
        return None if decision is None else named(decision)

    assert look(0.0) == [("w0", TERM)]
    assert look(1.0) == []
    assert look(2.0, hurry=True) == [("w0", KILL)]
    worker.has_ended(-KILL, 2.1)
    assert look(2.1) == [("s0", TERM)]
    assert look(7.1) == [("s0", KILL)]
    assert look(17.1) == [("coordinator", TERM)]  # the kernel holds s0
    coordinator.has_ended(0, 17.2)
    assert look(17.2) is None
