"""The seam between a job and what runs its processes: an engine without processes, and all goes as on this machine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import typer

from headwater.cli.run import run
from headwater.errors import ClusterError, DeadlineExceeded, UsageError
from headwater.launch import Launcher, Outcome, Process, Rules, Shape, engines
from headwater.launch.registry import running
from tests.launch.fake_engine import MASTER, FakeEngine, Life

INT, TERM = signal.SIGINT, signal.SIGTERM
FAILED = ["Traceback (most recent call last):", '  File "train.py", line 5, in <module>', "ValueError: no more data"]
TRAINS = Life(obeys={TERM: (1.0, 0), INT: (1.0, 0)})
"""A worker that ends within a second when it is asked to."""


class Told:
    """Keeps what a launcher says and shows."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []
        self.ended: list[str] = []
        self.on_exit: Callable[[], None] = lambda: None

    def launcher(self, shape: Shape | int, engine: FakeEngine, rules: Rules | None = None, **more: Any) -> Launcher:
        return Launcher(
            shape, rules=rules, engine=engine, on_note=self.notes.append, on_line=self._line, on_exit=self._end, **more
        )

    def _end(self, process: Process) -> None:
        self.ended.append(process.name)
        self.on_exit()

    def _line(self, process: Process, stream: str, line: str) -> None:
        self.lines.append(f"{process.name} {stream} {line}")


@pytest.fixture
def told() -> Told:
    return Told()


def test_a_job_from_its_start_over_a_loss_to_its_end(told: Told) -> None:
    """Coordinator, servers, workers; one worker dies and comes back; Ctrl-C, which one worker does not obey."""
    deaf = Life(says=[(1.0, "stdout", "again")], obeys={})
    engine = FakeEngine({"w0": [TRAINS], "w1": [Life(ends=(5.0, -signal.SIGKILL)), deaf]})
    job = told.launcher(2, engine, Rules(elastic=True, restart_workers=1))
    with job:
        assert [record.address for record in running()] == [job.address] == [MASTER]
        job.start_workers(["train"], 2)
        engine.at(10.0, job.interrupt)
        outcome = job.wait()
        assert [worker.returncode for worker in job.workers] == [0, 128 + signal.SIGKILL]
    assert engine.log == [
        (0.0, "coordinator", "start"),
        (0.1, "s0", "start"),  # once the coordinator is ready
        (0.1, "s1", "start"),
        (0.2, "w0", "start"),
        (0.2, "w1", "start"),
        (5.2, "w1", "end"),
        (5.2, "w1", "start"),
        (10.0, "w0", "SIGINT"),
        (10.0, "w1", "SIGINT"),
        (11.0, "w0", "end"),
        (30.0, "w1", "SIGTERM"),  # after its patience
        (35.0, "w1", "SIGKILL"),  # after its grace
        (35.0, "w1", "end"),
        (35.0, "s0", "SIGTERM"),
        (35.0, "s1", "SIGTERM"),
        (35.1, "s0", "end"),
        (35.1, "s1", "end"),
        (35.1, "coordinator", "SIGTERM"),
        (35.2, "coordinator", "end"),
    ]
    assert told.notes == ["w1 was killed by SIGKILL after 5.0 s; it is started again (1 of 1)"]
    assert told.lines == ["w1 stdout again"]
    assert told.ended == ["w1", "w0", "w1", "s0", "s1", "coordinator"]
    assert outcome == Outcome(130, "interrupted", interrupted=True)
    assert outcome.remains == "no process is left"
    assert engine.closed
    assert running() == []


def test_every_process_is_told_what_it_needs(told: Told) -> None:
    engine = FakeEngine({"w1": [Life(ends=(5.0, 1)), Life(ends=(5.0, 0))], "w0": [Life(ends=(20.0, 0))]})
    with told.launcher(Shape(2, 6), engine, Rules(elastic=True, restart_workers=1), env={"MINE": "1"}) as job:
        job.start_workers(["train", "--fast"], 2, stdin_rank=1)
        assert job.wait().code == 0
    coordinator, server, _, first, second, again = engine.commands
    assert " ".join(coordinator.words).endswith("--servers 2 --shards 6")
    assert f"--coordinator {MASTER}" in " ".join(server.words)
    assert server.env["OMP_NUM_THREADS"] == "4"  # of the engine's cores
    assert [first.stdin, second.stdin, again.stdin] == [False, True, True]
    assert again.words == ["train", "--fast"]
    changed = {key for key in again.env if again.env[key] != second.env[key]}
    assert changed == {"TORCHELASTIC_RESTART_COUNT"}
    for command in engine.commands:
        assert command.env["MINE"] == "1"
        assert command.env["HEADWATER_TOKEN"] == job.environment()["HEADWATER_TOKEN"]
        assert command.env["HEADWATER_TOKEN"] not in command.words


def test_a_second_ctrl_c_does_not_wait(told: Told) -> None:
    engine = FakeEngine({"w0": [Life(obeys={})]})
    with told.launcher(0, engine) as job:
        job.start_workers(["train"])
        engine.at(3.0, job.interrupt)
        engine.at(4.0, job.interrupt)
        assert job.wait().code == 130
        assert job.hurried
    assert [(time, what) for time, _, what in engine.log[1:]] == [
        (3.0, "SIGINT"), (4.0, "SIGTERM"), (5.0, "SIGKILL"), (5.0, "end"),
    ]  # fmt: skip


def test_a_worker_that_fails_ends_the_job_and_is_reported(told: Told) -> None:
    engine = FakeEngine({"w0": [TRAINS], "w1": [Life(says=[(2.0, "stderr", line) for line in FAILED], ends=(2.5, 7))]})
    with told.launcher(1, engine, once=True) as job:
        job.start_workers(["train"], 2)
        outcome = job.wait()
    assert outcome == Outcome(7, "w1 exited with code 7 after 2.5 s; w0 stopped", "\n".join(FAILED), "w1", shown=False)
    assert told.lines == []  # the report will show it


def test_a_traceback_that_does_not_end_its_worker_is_shown_after_a_while(told: Told) -> None:
    life = Life(says=[(2.0, "stderr", line) for line in FAILED], ends=(60.0, 0))
    engine = FakeEngine({"w0": [life]})
    with told.launcher(0, engine, once=True) as job:
        job.start_workers(["train"])
        engine.at(10.0, lambda: told.lines.append("ten seconds"))
        assert job.wait() == Outcome()
    assert told.lines == [*(f"w0 stderr {line}" for line in FAILED), "ten seconds"]


def test_the_last_words_of_one_that_is_not_reported_are_shown_in_the_end(told: Told) -> None:
    """It fails in the moment in which somebody asks the job to end."""
    engine = FakeEngine({"w0": [Life(says=[(4.0, "stderr", line) for line in FAILED], ends=(5.0, 1))]})
    with told.launcher(0, engine, once=True) as job:
        told.on_exit = job.terminate
        job.start_workers(["train"])
        assert job.wait().message == "terminated"
        assert told.lines == []
    assert told.lines == [f"w0 stderr {line}" for line in FAILED]


def test_a_coordinator_comes_back_at_its_address(told: Told) -> None:
    engine = FakeEngine({"coordinator": [Life(ends=(9.0, -signal.SIGKILL)), Life()], "w0": [Life(ends=(20.0, 0))]})
    with told.launcher(Shape(2, replicas=2), engine) as job:
        job.start_workers(["train"])
        assert job.wait() == Outcome()
    first, again = (command.words for command in engine.commands if command.role == "coordinator")
    assert first[first.index("--listen") + 1] == "tcp://127.0.0.1:0"
    assert again[again.index("--listen") + 1] == MASTER
    assert first[first.index("--state") + 1] == again[again.index("--state") + 1]


def test_a_server_of_a_cluster_with_copies_is_replaced(told: Told) -> None:
    engine = FakeEngine({"s1": [Life(ends=(9.0, -signal.SIGKILL)), Life()], "w0": [Life(ends=(20.0, 0))]})
    with told.launcher(Shape(2, replicas=2), engine) as job:
        job.start_workers(["train"])
        assert job.wait() == Outcome()
        new = job.servers[1]
    assert told.notes == [
        "server s1 was killed by SIGKILL; its shards go on elsewhere; a new server takes its place",
        f"server s1 is back, as a new process (pid {new.pid}, restart 1)",
    ]


def test_without_copies_the_loss_of_a_server_ends_the_job(told: Told) -> None:
    engine = FakeEngine({"s1": [Life(ends=(9.0, -signal.SIGKILL))], "w0": [TRAINS]})
    with told.launcher(2, engine) as job:
        job.start_workers(["train"])
        outcome = job.wait()
    assert (outcome.code, outcome.failed) == (1, "s1")
    assert (9.1, "w0", "SIGTERM") in engine.log


@pytest.mark.parametrize(
    ("life", "error", "told_by"),
    [
        (Life(ready=None), DeadlineExceeded, "s1 did not come up within 60 s; all were stopped"),
        (Life(ready=None, says=[(0.1, "stderr", "no room")], ends=(0.2, 1)), ClusterError, "s1 exited .*no room"),
    ],
)
def test_a_cluster_that_does_not_come_up_leaves_nobody(
    told: Told, life: Life, error: type[Exception], told_by: str
) -> None:
    engine = FakeEngine({"s1": [life]})
    with pytest.raises(error, match=f"(?s){told_by}"), told.launcher(2, engine):
        pass
    starts = {name for _, name, what in engine.log if what == "start"}
    assert starts == {name for _, name, what in engine.log if what == "end"} == {"coordinator", "s0", "s1"}


def test_one_that_nothing_ends_is_named(told: Told) -> None:
    engine = FakeEngine({"w0": [Life(ends=(1.0, 0))]})
    with told.launcher(0, engine) as job:
        job.start_workers(["train"])
        assert job.wait() == Outcome()
        engine._signal = lambda process, number: None  # type: ignore[method-assign]
        job.start_workers(["train"], first_rank=1)
    assert job.outcome.remains.startswith(f"w1 (pid {job.workers[1].pid}) did not end upon SIGKILL")


def test_an_engine_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "fake", "tests.launch.fake_engine:FakeEngine")
    with Launcher(1, engine="fake") as job:
        assert job.address == MASTER
    with pytest.raises(UsageError, match="engine='slurm': must be one of local, fake; nothing was started"):
        Launcher(1, engine="slurm")


def _run(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, **options: Any) -> int:
    """``headwater run`` with another engine in the place of this machine; its exit code."""
    monkeypatch.setattr(engines, "make", {"local": engine}.__getitem__)
    with pytest.raises(typer.Exit) as ended:
        run(["env"], **options)
    return ended.value.exit_code


def test_headwater_run_reports_as_ever(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    says = [(1.0, "stdout", "step 1"), *((2.0, "stderr", line) for line in FAILED)]
    engine = FakeEngine({"w0": [TRAINS], "w1": [Life(says=says, ends=(2.5, 7))]})  # type: ignore[arg-type]
    assert _run(monkeypatch, engine, servers=2, workers=2) == 7
    out, err = capfd.readouterr()
    assert out == "[w1] step 1\n"
    assert err.splitlines() == [
        f"headwater: 2 servers at {MASTER}, 2 workers: env",
        "--- the last words of w1:",
        *FAILED,
        "headwater: w1 exited with code 7 after 2.5 s; w0 stopped",
    ]


def test_headwater_run_tells_what_a_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine({"w0": [TRAINS]})
    engine.at(5.0, lambda: signal.raise_signal(signal.SIGINT))
    assert _run(monkeypatch, engine, servers=0) == 130
    assert capfd.readouterr().err.splitlines() == [
        "headwater: no servers, 1 worker: env",
        "headwater: the workers have 20 s to end; another Ctrl-C does not wait",
        "headwater: interrupted; no process is left",
    ]
