"""``headwater run``: what it executes, and what the shell gets back."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
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
