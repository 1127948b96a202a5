"""Coordinators, servers and workers that die in a job that goes on without them, or with others in their place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import headwater
from headwater.launch import Launcher, Outcome, Process, Rules, Shape, registry
from tests.launch.support import FOREVER, python

StandIn = Callable[..., None]

WAIT = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
"""What a stand-in does before it says that it is ready: nothing that ends it."""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.launch.revival._PAUSE", 0.0)


class Job(Launcher):
    """A launcher that keeps what it says."""

    def __init__(self, shape: Shape, rules: Rules | None = None, token: str | None = None) -> None:
        self.notes: list[str] = []
        super().__init__(shape, rules=rules, token=token, on_line=self.hear, on_note=self.notes.append)
        self.lines: list[tuple[str, str]] = []

    def hear(self, process: Process, stream: str, line: str) -> None:
        del stream
        self.lines.append((process.name, line))

    def until(self, condition: Callable[[], bool]) -> None:
        """Poll until it holds; the job must not end before."""
        while not condition():
            assert self.poll(0.05), (self.outcome, self.notes)


def _command(process: Process) -> str:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_another_server_takes_the_place_of_one_that_dies(stand_in: StandIn) -> None:
    stand_in()
    with Job(Shape(3, replicas=2)) as job:
        job.start_workers(python(FOREVER), 2)
        first = job.servers[1]
        os.kill(first.pid, signal.SIGKILL)
        job.until(lambda: len(job.notes) == 2)
        new = job.servers[1]
        assert (new.name, new.restarts, new.running) == ("s1", 1, True)
        assert new is not first
        assert job.notes == [
            "server s1 was killed by SIGKILL; its shards go on elsewhere; a new server takes its place",
            f"server s1 is back, as a new process (pid {new.pid}, restart 1)",
        ]
        assert all(worker.running for worker in job.workers)
        os.kill(new.pid, signal.SIGKILL)
        job.until(lambda: len(job.notes) == 4)
        assert job.servers[1].restarts == 2
    assert not any(process.running for process in [*job.servers, *job.workers])


def test_servers_are_called_by_the_numbers_that_status_shows(stand_in: StandIn, tmp_path: Path) -> None:
    tally = tmp_path / "tally"
    tally.mkdir()
    # The first to make the folder 0 is server 0, and so on: in another order than that of their start, perhaps.
    stand_in(
        f"{WAIT}\nnumber = 0\nwhile given.role == 'server' and 'server' not in said:\n"
        f"    try: os.mkdir({str(tally)!r} + f'/{{number}}'); said['server'] = number\n"
        "    except FileExistsError: number += 1"
    )
    with Job(Shape(3, replicas=2)) as job:
        assert [server.name for server in job.servers] == ["s0", "s1", "s2"]
        os.kill(job.servers[1].pid, signal.SIGKILL)
        job.until(lambda: len(job.notes) == 2)
        assert job.servers[1].name == "s3"
        assert job.notes[1] == f"server s3 has taken the place of s1 (pid {job.servers[1].pid}, restart 1)"
        os.kill(job.servers[1].pid, signal.SIGKILL)
        job.until(lambda: len(job.notes) == 4)
        assert job.notes[3] == f"server s4 has taken the place of s3 (pid {job.servers[1].pid}, restart 2)"


def test_the_reason_that_a_server_gave_is_passed_on(stand_in: StandIn) -> None:
    stand_in(last="headwater server: NotEnoughMemory: 3 GB too few")
    with Job(Shape(2, replicas=2)) as job:
        os.kill(job.servers[0].pid, signal.SIGUSR1)
        job.until(lambda: len(job.notes) == 2)
    assert job.notes[0].startswith("server s0 exited with code 1 (NotEnoughMemory: 3 GB too few); its shards go on")


@pytest.fixture
def third_time(tmp_path: Path) -> str:
    """A stand-in whose first three processes (coordinator, two servers) live; later ones end at once."""
    tally = tmp_path / "tally"
    return (
        f"{WAIT}\ntally = open({str(tally)!r}, 'a'); tally.write('x'); tally.flush()\n"
        "if tally.tell() > 3: raise SystemExit('headwater server: AddressInUse: no')"
    )


def test_a_server_that_cannot_live_is_given_up_and_the_others_go_on(stand_in: StandIn, third_time: str) -> None:
    stand_in(third_time)
    with Job(Shape(2, replicas=2)) as job:
        os.kill(job.servers[1].pid, signal.SIGKILL)
        job.until(lambda: len(job.notes) == 3)
        assert job.poll(0.0)
        assert job.notes[-1] == (
            "server s1 exited with code 1 (AddressInUse: no) right after its start, 3 times in a row; "
            "it is not started again"
        )
        assert job.servers[1].restarts == 2


def test_without_any_server_the_job_ends(stand_in: StandIn, third_time: str) -> None:
    stand_in(third_time)
    with Job(Shape(2, replicas=2)) as job:
        job.start_workers(python(FOREVER))
        for server in job.servers:
            os.kill(server.pid, signal.SIGKILL)
        outcome = job.wait()
    assert outcome.code == 1
    assert isinstance(outcome.error, headwater.LinkBroken)
    assert "no server is left" in outcome.message


@pytest.mark.parametrize("copies", [1, 2])
def test_a_coordinator_with_a_state_is_started_again_at_its_address(
    stand_in: StandIn, tmp_path: Path, copies: int
) -> None:
    stand_in()
    state = tmp_path / "state"
    with Job(Shape(2, replicas=copies, state=state)) as job:
        first = job.coordinator
        assert first
        assert f"--state {state}" in _command(first)
        os.kill(first.pid, signal.SIGKILL)
        job.until(lambda: len(job.notes) == 2)
        new = job.coordinator
        assert new
        assert new.restarts == 1
        assert f"--listen {job.address} " in _command(new)
        assert f"--state {state}" in _command(new)
        assert job.notes[0].startswith("coordinator was killed by SIGKILL; training goes on")
    assert state.is_dir()  # it is the user's


def test_a_coordinator_that_cannot_live_ends_the_job(stand_in: StandIn, third_time: str) -> None:
    stand_in(third_time)
    with Job(Shape(2, replicas=2)) as job:
        assert job.coordinator
        os.kill(job.coordinator.pid, signal.SIGKILL)
        outcome = job.wait()
    assert (outcome.failed, outcome.code) == ("coordinator", 1)


def test_one_copy_and_no_state_as_ever(stand_in: StandIn) -> None:
    stand_in()
    with Job(Shape(2)) as job:
        assert job.coordinator
        assert "--state" not in _command(job.coordinator)
        os.kill(job.coordinator.pid, signal.SIGKILL)
        assert job.wait().failed == "coordinator"
    assert job.notes == []


@pytest.mark.parametrize(
    ("copies", "said"), [(2, ""), (1, "print('headwater server: Drained: gone', file=sys.stderr)")]
)
def test_a_server_that_leaves_is_not_replaced(stand_in: StandIn, copies: int, said: str) -> None:
    stand_in(f"{WAIT}\n{said}")
    with Job(Shape(2, replicas=copies)) as job:
        os.kill(job.servers[0].pid, signal.SIGUSR1)
        job.until(lambda: bool(job.notes))
        assert job.poll(0.0)
    assert job.notes == ["server s0 has left the cluster"]


def test_a_server_more(stand_in: StandIn) -> None:
    stand_in()
    with Job(Shape(1)) as job:
        more = job.add_server()
        assert more.name == "s1"
        assert job.servers[1] is more
        assert f"--coordinator {job.address}" in _command(more)
    assert more.returncode == 0
    with Job(Shape(address="tcp://127.0.0.1:9"), token="t" * 64) as job:
        os.kill(job.add_server().pid, signal.SIGKILL)
        outcome = job.wait()
    assert outcome.message.endswith("what only it held is lost; shards with a copy elsewhere go on there")


def test_a_server_more_that_is_drained_ends_well(stand_in: StandIn) -> None:
    stand_in(f"{WAIT}\nprint('headwater server: Drained: gone', file=sys.stderr)")
    with Job(Shape(address="tcp://127.0.0.1:9"), token="t" * 64) as job:
        os.kill(job.add_server().pid, signal.SIGUSR1)
        assert job.wait() == Outcome()


def test_the_private_state_goes_with_the_job(stand_in: StandIn) -> None:
    stand_in()
    with Job(Shape(2, replicas=2)) as job:
        (state,) = registry.folder().glob("*.state")
        assert state.stat().st_mode & 0o777 == 0o700
        assert job.coordinator
        assert f"--state {state}" in _command(job.coordinator)
    assert not state.exists()


def test_the_private_state_of_a_launcher_that_was_killed_is_removed() -> None:
    gone = subprocess.run(
        [sys.executable, "-S", "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    left = registry.folder() / f"{int(gone.stdout)}-abc.state"
    left.mkdir()
    mine = registry.private_state()
    assert not left.exists()
    other = registry.private_state()
    assert mine.is_dir()
    assert other != mine


# ---- workers ---------------------------------------------------------------------------------------


DIES = "import os, signal\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n"


def test_an_elastic_job_goes_on_without_a_worker() -> None:
    code = DIES + "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); print('here', flush=True)\n"
    with Job(Shape(0), Rules(elastic=True)) as job:
        job.start_workers(python(code + "signal.sigwait([signal.SIGUSR1])"), 3)
        job.until(lambda: len(job.lines) == 2 and bool(job.notes))
        assert job.poll(0.0)
        for worker in (job.workers[0], job.workers[2]):
            os.kill(worker.pid, signal.SIGUSR1)
        outcome = job.wait()
    (note,) = job.notes
    assert note.startswith("w1 was killed by SIGKILL after ")
    assert note.endswith("; w0, w2 go on")
    assert outcome.code == 0


def test_when_no_worker_remains_the_first_that_failed_is_told() -> None:
    with Job(Shape(0), Rules(elastic=True)) as job:
        job.start_workers(python("import sys; sys.exit('ValueError: no')"), 2)
        outcome = job.wait()
    assert outcome.code == 1
    assert outcome.last_words == "ValueError: no"


def test_one_that_finished_is_enough() -> None:
    with Job(Shape(0), Rules(elastic=True)) as job:
        job.start_workers(python(DIES), 2)
        assert job.wait().code == 0


def test_a_worker_is_started_again_with_its_rank() -> None:
    code = "import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE']); sys.exit(3)"
    with Job(Shape(0), Rules(elastic=True, restart_workers=2)) as job:
        job.start_workers(python(code), 1, first_rank=1, world=4)
        outcome = job.wait()
    assert outcome.code == 3
    assert job.lines == [("w1", "1 4")] * 3
    assert [note.rpartition("; ")[2] for note in job.notes] == [
        "it is started again (1 of 2)",
        "it is started again (2 of 2)",
    ]


def test_ctrl_c_starts_nobody_again() -> None:
    with Job(Shape(0), Rules(elastic=True, restart_workers=5)) as job:
        job.start_workers(python("print('here', flush=True);" + FOREVER), 2)
        job.until(lambda: len(job.lines) == 2)
        job.interrupt()
        outcome = job.wait()
    assert (outcome.code, outcome.interrupted) == (130, True)
    assert job.notes == []
