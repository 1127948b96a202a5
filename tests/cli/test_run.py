"""``headwater run``: what it executes, and what the shell gets back."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwater.cli.run import command_line
from headwater.errors import UsageError
from tests.patience import PATIENCE

Command = Callable[..., Any]


def _script(folder: Path, code: str) -> str:
    path = folder / "script.py"
    path.write_text(code, encoding="utf-8")
    return str(path)


def test_a_script_a_module_or_a_program(tmp_path: Path) -> None:
    script = _script(tmp_path, "")
    assert command_line([script, "--lr", "1"], module=False) == [sys.executable, script, "--lr", "1"]
    assert command_line(["timeit", "-n", "1"], module=True) == [sys.executable, "-m", "timeit", "-n", "1"]
    assert command_line(["env"], module=False)[0].endswith("/env")


@pytest.mark.parametrize("word", ["missing.py", "no-such-program"])
def test_what_does_not_exist_is_said_before_anything_starts(word: str) -> None:
    with pytest.raises(UsageError, match=word):
        command_line([word], module=False)


def test_options_after_the_script_are_its_own(headwater_command: Command, tmp_path: Path) -> None:
    script = _script(tmp_path, "import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1:])")
    answer = headwater_command("run", "--servers", "0", "--workers", "2", script, "--workers", "9", "-m", "--", "x")
    assert answer.code == 0
    assert sorted(answer.out.splitlines()) == [
        "[w0] 0 2 ['--workers', '9', '-m', '--', 'x']",
        "[w1] 1 2 ['--workers', '9', '-m', '--', 'x']",
    ]


def test_exit_code_and_traceback_reach_the_caller(headwater_command: Command, tmp_path: Path) -> None:
    script = _script(
        tmp_path,
        "import os, signal, sys, traceback\n"
        "if os.environ['RANK'] == '0': signal.pause()\n"
        "try: raise RuntimeError('the [data] ran out')\n"
        "except RuntimeError: traceback.print_exc(); sys.exit(7)\n",
    )
    answer = headwater_command("run", "-s", "0", "-w", "2", script)
    assert answer.code == 7
    *_, traceback, last = answer.err.splitlines()
    assert traceback == "RuntimeError: the [data] ran out"
    assert last.startswith("headwater: w1 exited with code 7 after")
    assert last.endswith("w0 stopped")


_FAILS = """
import os
print("from", os.environ["RANK"])
def deep():
    raise RuntimeError("the data ran out")
if os.environ["RANK"] in os.environ["FAILING"]: deep()
"""


@pytest.mark.parametrize("more", [[], ["--only-rank0"], ["--stdin-rank", "1"]])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_script_that_fails_everywhere_shows_one_traceback(
    headwater_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, more: list[str]
) -> None:
    monkeypatch.setenv("FAILING", "0123")
    if "1" in more and workers == 1:
        pytest.skip("there is no rank 1")
    answer = headwater_command("run", "-s", "0", "-w", str(workers), *more, _script(tmp_path, _FAILS))
    assert answer.code == 1
    assert (answer.out + answer.err).count("Traceback") == 1
    assert (answer.out + answer.err).count("the data ran out") == 2  # the source line, and the message
    *_, words, last = answer.err.splitlines()
    assert words == "RuntimeError: the data ran out"
    assert last.startswith("headwater: w")
    assert "exited with code 1" in last


@pytest.mark.parametrize(
    ("code", "once"),
    [("print('here'\n", "SyntaxError: "), ("raise ExceptionGroup('several', [ValueError(3)])", "| ValueError: 3"),
     ("try: raise KeyError(1)\nexcept KeyError as e: raise ValueError(2) from e", "ValueError: 2")],
)  # fmt: skip
def test_so_do_scripts_that_cannot_be_read_and_other_tracebacks(
    headwater_command: Command, tmp_path: Path, code: str, once: str
) -> None:
    answer = headwater_command("run", "-s", "0", "-w", "3", _script(tmp_path, code))
    assert answer.code == 1
    assert (answer.out + answer.err).count(once) == 1, answer.err
    assert "--- the last words of w" in answer.err


def test_only_rank_0_is_shown_and_why_another_fails(
    headwater_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "")
    script = _script(tmp_path, _FAILS)
    assert headwater_command("run", "-s", "0", "-w", "3", "--only-rank0", script).out == "[w0] from 0\n"
    monkeypatch.setenv("FAILING", "2")
    answer = headwater_command("run", "-s", "0", "-w", "3", "--only-rank0", script)
    assert answer.code == 1
    assert set(answer.out.splitlines()) <= {"[w0] from 0"}  # it may be stopped before it says so
    assert "--- the last words of w2:\nTraceback" in answer.err
    assert "headwater: w2 exited with code 1" in answer.err


_READS = (
    "import os, sys\n{}\nif os.environ['RANK'] in os.environ['READING']: print('read', sys.stdin.readline().strip())"
)


def _piped(script: str, *options: str, reading: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", *options, script]
    env = {**os.environ, "READING": reading, **more}
    return subprocess.run(
        command, input="some words\n", capture_output=True, text=True, env=env, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize(
    ("options", "rank"),
    [([], 0), (["-w", "2", "--only-rank0"], 0), (["-w", "3", "--stdin-rank", "2"], 2), (["--first-rank", "4"], 4)],
)
def test_one_worker_reads_the_standard_input(tmp_path: Path, options: list[str], rank: int) -> None:
    found = _piped(_script(tmp_path, _READS), *options, reading=str(rank))
    assert (found.returncode, found.stdout) == (0, f"[w{rank}] read some words\n"), found.stderr


@pytest.mark.parametrize(
    "read", ["input('? ')", "sys.stdin.read()", "list(sys.stdin)", "sys.stdin.buffer.read()", "breakpoint()"]
)
def test_a_worker_without_input_says_how_it_gets_one(tmp_path: Path, read: str) -> None:
    script = _script(tmp_path, f"import sys, headwater\n{read}\nprint('went', 'on')")
    found = _piped(script, "-w", "2", reading="")
    assert found.returncode == 1
    assert "went on" not in found.stdout
    assert "reads its standard input and has none; headwater run --stdin-rank" in found.stderr
    assert found.stderr.count("Traceback") == 1


@pytest.mark.parametrize("read", ["input('? ')", "breakpoint()"])
def test_so_does_the_launcher_for_one_that_knows_nothing_of_us(tmp_path: Path, read: str) -> None:
    found = _piped(_script(tmp_path, f"{read}\nprint('went on')"), "-w", "2", reading="")
    assert found.returncode == 1
    assert "It read its standard input and has none; headwater run --stdin-rank" in found.stderr.splitlines()[-1]


def test_a_script_that_opens_its_own_input_keeps_it(tmp_path: Path) -> None:
    script = _script(tmp_path, "import os, sys\nos.dup2(os.open(__file__, os.O_RDONLY), 0)\nimport headwater\n"
                               "print(len(sys.stdin.read()))")  # fmt: skip
    found = _piped(script, "-w", "2", reading="")
    assert found.returncode == 0, found.stderr
    assert sorted(found.stdout.split())[:1] == [str(len(Path(script).read_text(encoding="utf-8")))]


@pytest.mark.parametrize("rank", ["2", "7"])
def test_a_rank_that_is_not_here_cannot_read(headwater_command: Command, tmp_path: Path, rank: str) -> None:
    answer = headwater_command("run", "-s", "0", "-w", "2", "--stdin-rank", rank, _script(tmp_path, ""))
    assert answer.code == 1
    assert "the workers here are 0 to 1; nothing was started" in answer.err


def test_a_prompt_is_shown_before_it_is_answered(tmp_path: Path) -> None:
    """On a terminal: the unfinished line appears, what is typed is the answer."""
    script = _script(tmp_path, "print('hello', input('your name? '))\nimport pdb; pdb.set_trace()\nprint('over')")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", script]
    # A session of its own, whose terminal this is: so it is in the foreground.
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = ""
        for wanted, answer in (("your name? ", "Ann\n"), ("hello Ann", ""), ("(Pdb) ", "c\n"), ("over", "")):
            while wanted not in shown:
                assert select.select([ours], [], [], 30)[0], shown
                shown += os.read(ours, 4096).decode()
            shown = shown.partition(wanted)[2]
            os.write(ours, answer.encode())
        assert process.wait(PATIENCE) == 0
    os.close(ours)


def test_workers_train_through_servers(headwater_command: Command, tmp_path: Path) -> None:
    """The whole way: coordinator, two servers, two workers, one table."""
    script = _script(
        tmp_path,
        "import headwater, torch\n"
        "torch.set_num_threads(1)\n"
        "with headwater.connect() as ps:\n"
        "    w = ps.dense('w', (4,), optimizer=torch.optim.SGD, lr=0.5, sync=headwater.Bulk())\n"
        "    print(w.push_pull(torch.full((4,), 1.0 + ps.rank)).tolist())\n",
    )
    answer = headwater_command("run", "--servers", "2", "--workers", "2", script)
    assert answer.code == 0, answer.err
    assert sorted(answer.out.splitlines()) == [f"[w{rank}] {[-0.75] * 4}" for rank in range(2)]


def test_when_nobody_reads_any_more_the_job_ends(tmp_path: Path) -> None:
    """``headwater run … | head -1``: the workers are stopped, without a complaint of Python's own."""
    script = _script(tmp_path, "while True: print('more')")
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "[w0] more\n"
        process.stdout.close()
        assert process.wait(PATIENCE) == 143
        said = process.stderr.read().splitlines()
    assert said[-1] == "headwater: terminated; no process is left"
    assert "nobody reads what this command prints any more" in said[-2]
    assert len(said) == 3


def test_when_nobody_reads_the_errors_either_the_job_ends_with_its_own_code(tmp_path: Path) -> None:
    script = _script(tmp_path, "while True: print('more')")
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE) == 143


def test_with_closed_outputs_a_cluster_comes_up_and_the_workers_code_is_returned(tmp_path: Path) -> None:
    """What is opened next must not be taken for the standard output."""
    script = _script(
        tmp_path,
        "import headwater, sys\nwith headwater.connect() as ps: print(ps.status().servers)\nsys.exit(5)\n",
    )
    command = f"exec {sys.executable} -m headwater run {script} <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command], timeout=PATIENCE, check=False).returncode == 5


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_bytes_of_any_kind_pass_through(tmp_path: Path, encoding: str) -> None:
    script = _script(
        tmp_path, "import os; os.write(1, b'caf\\xc3\\xa9 \\xff\\n' * 3); os.write(2, b'\\xe2\\x9c\\x93\\n')"
    )
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", script]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    expected = {"ascii": rb"caf\xe9 \ufffd", "utf-8": "caf\u00e9 \ufffd".encode()}[encoding]
    assert done.stdout.splitlines() == [b"[w0] " + expected] * 3
    assert b"[w0] " + {"ascii": rb"\u2713", "utf-8": "\u2713".encode()}[encoding] in done.stderr


def test_a_terminal_that_is_gone_lets_the_workers_save(tmp_path: Path) -> None:
    """As when an ssh connection breaks: the kernel says SIGHUP, and every write fails from then on."""
    saved = tmp_path / "saved"
    script = _script(
        tmp_path,
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    for i in range(20): print('saving', i); time.sleep(0.05)\n"
        f"    pathlib.Path({str(saved)!r}).touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready')\n"
        "while True: time.sleep(0.1)\n",
    )
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "headwater", "run", "-s", "0", script])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert saved.exists()


_STUBBORN = """
import select, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("here", flush=True)
while True: select.select([], [], [], 1)
"""


def test_ctrl_c_again_and_again_ends_what_will_not_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", _script(tmp_path, _STUBBORN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "[w0] here\n"
        assert process.stderr.readline().startswith("headwater: no servers, 1 worker")
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "headwater: the workers have 20 s to end; another Ctrl-C does not wait\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130  # a second is enough
        assert process.stderr.read() == "headwater: interrupted; no process is left\n"


def test_who_was_interrupted_shows_no_traceback(tmp_path: Path) -> None:
    script = _script(tmp_path, "import select\nprint('here', flush=True)\nwhile True: select.select([], [], [], 1)")
    command = [sys.executable, "-m", "headwater", "run", "-s", "0", "-w", "2", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert {process.stdout.readline() for _ in range(2)} == {"[w0] here\n", "[w1] here\n"}
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert "Traceback" not in process.stderr.read()
