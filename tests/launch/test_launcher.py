"""Workers that end well, badly, by a signal, by Ctrl-C; servers that die; and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import headwater
from headwater.launch import Launcher, Outcome, Process, Rules, Shape, cores, launch
from headwater.launch.registry import running
from tests.launch.support import FOREVER, alive, python, wait_for_end
from tests.patience import PATIENCE

StandIn = Callable[..., None]


class Collected:
    """An ``on_line`` that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str]] = []

    def __call__(self, process: Process, stream: str, line: str) -> None:
        self.lines.append((process.name, stream, line))

    def of(self, name: str) -> list[str]:
        return [line for process, _, line in self.lines if process == name]


def _run(code: str, workers: int = 2, **options: object) -> tuple[Outcome, Collected]:
    collected = Collected()
    return launch(python(code), servers=0, workers=workers, on_line=collected, **options), collected  # type: ignore[arg-type]


def test_every_worker_runs_and_its_lines_arrive() -> None:
    outcome, collected = _run(
        "import os, sys; print('rank', os.environ['HEADWATER_RANK']); print('oh', file=sys.stderr)"
    )
    assert outcome == Outcome(0)
    assert sorted(collected.lines) == [
        ("w0", "stderr", "oh"),
        ("w0", "stdout", "rank 0"),
        ("w1", "stderr", "oh"),
        ("w1", "stdout", "rank 1"),
    ]


def test_the_environment_is_that_of_torchrun_with_our_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcome, collected = _run("import os; [print(name, value) for name, value in os.environ.items()]", workers=2)
    assert outcome.code == 0
    found = dict(line.split(" ", 1) for line in collected.of("w1"))
    expected = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    expected |= {f"HEADWATER_{name}": value for name, value in expected.items()}
    expected["OMP_NUM_THREADS"] = str(max(1, cores() // 2))
    assert expected.items() <= found.items()
    assert "HEADWATER_TOKEN" not in found  # no cluster, no secret


def test_a_thread_count_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    _, collected = _run("import os; print(os.environ['OMP_NUM_THREADS'])", workers=1)
    assert collected.of("w0") == ["5"]


def test_exit_code_and_traceback_of_the_worker_that_failed() -> None:
    outcome, _ = _run(
        "import os, sys, signal\n"
        "if os.environ['RANK'] == '0': signal.pause()\n"
        "import traceback\n"
        "try: raise RuntimeError('no more data')\n"
        "except RuntimeError: traceback.print_exc(); sys.exit(7)\n"
    )
    assert outcome.code == 7
    assert outcome.failed == "w1"
    assert "w1 exited with code 7" in outcome.message
    assert "w0 stopped" in outcome.message
    assert "RuntimeError: no more data" in outcome.last_words


def test_a_signal_death_counts_as_in_a_shell() -> None:
    outcome, _ = _run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", workers=1)
    assert outcome.code == 128 + signal.SIGSEGV
    assert "SIGSEGV" in outcome.message


def test_one_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    job = Launcher(0, rules=Rules(grace=0.2), on_line=Collected())
    with job:
        deaf, _ = job.start_workers(
            python(
                "import os, signal, sys\n"
                "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                "fifo = os.environ['FIFO']\n"
                "if os.environ['RANK'] == '0':\n"
                "    open(fifo, 'w').close(); signal.pause()\n"
                "open(fifo).close(); sys.exit(3)\n"
            ),
            2,
            env={"FIFO": _fifo(Path(os.environ["XDG_RUNTIME_DIR"]))},
        )
        outcome = job.wait()
    assert outcome.code == 3
    assert deaf.returncode == 128 + signal.SIGKILL


def _fifo(folder: Path) -> str:
    path = folder / "fifo"
    os.mkfifo(path)
    return str(path)


def test_the_culprit_is_named_not_the_worker_that_reports_the_loss() -> None:
    """w1 tells of a lost worker and is gone before w0, whose death it tells of, has left the interpreter."""
    code = (
        "import os, sys\n"
        "me, other = os.environ['RANK'], os.environ['FIFO']\n"
        "if me == '1': sys.exit('headwater.errors.WorkerLost: rank 0 died')\n"
        "open(other).read()\n"
        "sys.exit('ValueError: the cause')\n"
    )
    fifo = _fifo(Path(os.environ["XDG_RUNTIME_DIR"]))

    def release(process: Process) -> None:
        if process.name == "w1":
            with open(fifo, "w") as file:  # noqa: PTH123
                file.write("go")

    job = Launcher(0, on_line=Collected(), on_exit=release)
    with job:
        job.start_workers(python(code), 2, env={"FIFO": fifo})
        outcome = job.wait()
    assert (outcome.failed, outcome.code) == ("w0", 1)
    assert outcome.last_words == "ValueError: the cause"


def test_what_a_worker_started_goes_with_it() -> None:
    """A grandchild in the worker's group does not outlive it, however the worker ends."""
    outcome, collected = _run(
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-S', '-c', {FOREVER!r}]).pid)", workers=1
    )
    assert outcome.code == 0
    (pid,) = collected.of("w0")
    wait_for_end(int(pid))


def test_a_lot_of_output_is_neither_lost_nor_in_the_way() -> None:
    outcome, collected = _run("for i in range(20000): print(i)", workers=2)
    assert outcome.code == 0
    assert collected.of("w0") == collected.of("w1") == [str(i) for i in range(20000)]


def test_a_request_from_another_place_interrupts_once() -> None:
    """SIGINT reaches the worker once; it finishes and the outcome says that the job was interrupted."""
    collected = Collected()
    code = (
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "print('ready'); signal.sigwait([signal.SIGINT])\n"
        "print('saved', signal.sigpending())\n"
    )

    def on_line(process: Process, stream: str, line: str) -> None:
        collected(process, stream, line)
        if line == "ready":
            job.interrupt()

    job = Launcher(0, on_line=on_line)
    with job:
        job.start_workers(python(code), 1)
        outcome = job.wait()
    assert collected.of("w0") == ["ready", "saved set()"]
    assert outcome.interrupted
    assert outcome.code == 130


def test_a_cluster_comes_up_and_goes(stand_in: StandIn) -> None:
    stand_in()
    with Launcher(2, on_line=Collected()) as job:
        assert job.address == "tcp://127.0.0.1:7"
        assert [server.name for server in job.servers] == ["s0", "s1"]
        assert job.poll(0.0)
        (record,) = running()
        assert record.address == job.address
        assert record.token == job.environment()["HEADWATER_TOKEN"]
        assert record.token not in repr(record)
        everybody = [job.coordinator, *job.servers]
    assert [process.returncode for process in everybody if process] == [0, 0, 0]
    assert running() == []


def test_no_token_on_any_command_line(stand_in: StandIn) -> None:
    stand_in()
    collected = Collected()
    with Launcher(1, on_line=collected) as job:
        (worker,) = job.start_workers(python("print('here');" + FOREVER))
        while "here" not in collected.of("w0"):
            assert job.poll(0.01)
        token = job.environment()["HEADWATER_TOKEN"].encode()
        assert job.coordinator
        for process in (job.coordinator, *job.servers, worker):
            assert token not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert token in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_a_server_that_dies_ends_the_job(stand_in: StandIn) -> None:
    stand_in()
    with Launcher(2, on_line=Collected()) as job:
        job.start_workers(python(FOREVER), 2)
        os.kill(job.servers[1].pid, signal.SIGKILL)
        outcome = job.wait()
        assert not any(worker.running for worker in job.workers)
    assert outcome.code == 1
    assert outcome.failed == "s1"
    assert isinstance(outcome.error, headwater.LinkBroken)
    assert "server s1" in str(outcome.error)
    assert "SIGKILL" in str(outcome.error)


def test_a_server_that_does_not_come_up_says_why(stand_in: StandIn) -> None:
    stand_in("raise SystemExit('no room')")
    with pytest.raises(headwater.ClusterError, match="no room"), Launcher(1, on_line=Collected()):
        pass


def test_a_server_that_says_why_raises_that_error(stand_in: StandIn) -> None:
    stand_in("raise SystemExit('headwater coordinator: AddressInUse: port 7 is taken')")
    collected = Collected()
    with pytest.raises(headwater.AddressInUse, match="port 7 is taken"), Launcher(1, on_line=collected):
        pass
    assert collected.lines == []  # said once


def test_coming_up_has_a_deadline(stand_in: StandIn) -> None:
    stand_in("signal.pause()")
    job = Launcher(1, on_line=Collected(), rules=Rules(ready_timeout=0.2))
    with pytest.raises(headwater.DeadlineExceeded, match="coordinator"):
        job.start()
    assert job.coordinator
    assert not job.coordinator.running


def test_beyond_loopback_without_a_token_refuses_to_start() -> None:
    with pytest.raises(headwater.UsageError, match="HEADWATER_TOKEN"):
        Launcher(Shape(1, listen="tcp://192.0.2.1:0"))
    Launcher(Shape(1, listen="tcp://192.0.2.1:0"), token="a secret of ours").stop()
    with pytest.raises(headwater.UsageError, match="name one interface"):
        Launcher(Shape(1, listen="tcp://0.0.0.0:0"), token="a secret of ours")


def test_workers_of_a_running_cluster_get_its_address_and_the_callers_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN", "theirs")
    collected = Collected()
    code = "import os; print(os.environ['HEADWATER_ADDRESS'], os.environ['HEADWATER_TOKEN'], os.environ['RANK'])"
    with Launcher(Shape(address="tcp://127.0.0.1:9"), on_line=collected) as job:
        job.start_workers(python(code), 1, first_rank=3, world=4)
        assert job.wait().code == 0
    assert collected.of("w3") == ["tcp://127.0.0.1:9 theirs 3"]


@pytest.mark.parametrize(("count", "first", "world"), [(0, 0, None), (2, -1, None), (2, 3, 4)])
def test_ranks_that_do_not_fit(count: int, first: int, world: int | None) -> None:
    with Launcher(0) as job, pytest.raises(headwater.UsageError):
        job.start_workers(python("pass"), count, first_rank=first, world=world)


OUTER = """
import os, signal, sys
from headwater.launch import Launcher, Rules
def show(process, stream, line):
    print(process.pid, line, flush=True)
job = Launcher(0, on_line=show, rules=Rules(grace=60, patience=60))
with job.signals(), job:
    job.start_workers([sys.executable, "-S", "-c", sys.argv[1]], 2)
    sys.exit(job.wait().code)
"""


def _outer(code: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher in a process of its own, and the pids of its two workers once both have said a word."""
    outer = subprocess.Popen([sys.executable, "-c", OUTER, code], stdout=subprocess.PIPE, text=True)
    assert outer.stdout
    pids = [int(outer.stdout.readline().split()[0]) for _ in range(2)]
    return outer, pids


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_process_is_left_behind(number: signal.Signals, code: int) -> None:
    """Ctrl-C, SIGTERM and even SIGKILL of the launcher end its workers."""
    outer, pids = _outer("print('here', flush=True); " + FOREVER)
    with outer:
        outer.send_signal(number)
        assert outer.wait(PATIENCE) == code
    for pid in pids:
        wait_for_end(pid)
        assert not alive(pid)


def test_ctrl_c_in_a_terminal_reaches_a_worker_once() -> None:
    """The terminal signals the launcher's whole group; the workers are in groups of their own."""
    outer, pids = _outer("print('here', flush=True); " + FOREVER)
    with outer:
        groups = {os.getpgid(pid) for pid in pids}
        assert groups == set(pids)
        assert os.getpgid(outer.pid) not in groups
        outer.terminate()


def test_what_is_claimed_of_the_end_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the kernel holds outlives SIGKILL, and is named."""
    collected = Collected()
    with Launcher(0, rules=Rules(grace=0.0), on_line=collected) as job:
        (worker,) = job.start_workers(python(FOREVER), 1)
        with monkeypatch.context() as held:
            held.setattr(Process, "running", True)
            held.setattr(worker, "send_signal", lambda number: None)
            held.setattr("headwater.launch.escalation._AFTER_KILL", 0.0)
            job.stop()
        assert job.outcome.remains.startswith(f"w0 (pid {worker.pid}) did not end upon SIGKILL")
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        worker.reap()
        for _ in worker.close():
            pass
    assert Outcome().remains == "no process is left"


def test_that_somebody_asked_twice_is_remembered() -> None:
    said = Collected()
    with Launcher(0, on_line=said) as job:
        ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('here');"
        job.start_workers(python(f"{ignore} {FOREVER}"))
        while not said.lines:
            job.poll(0.1)
        job.interrupt()
        job.poll(0.1)
        assert not job.hurried
        job.interrupt()
        assert job.wait().code == 130
        assert job.hurried
