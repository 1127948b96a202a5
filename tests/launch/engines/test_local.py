"""Processes of this machine: how their end is told."""

from __future__ import annotations

import pytest

from headwater.launch.engines.local import LocalProcess
from headwater.launch.process import Command
from tests.launch.support import python, wait_for_end


def _finished(code: str) -> LocalProcess:
    process = LocalProcess(Command("w0", "worker", 0, python(code), {}))
    wait_for_end(process.pid)
    assert process.reap()
    for _ in process.close():
        pass
    return process


@pytest.mark.parametrize(
    ("code", "returncode", "told"),
    [
        ("raise SystemExit(7)", 7, "exited with code 7"),
        ("import os; os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL"),
        ("raise SystemExit(137)", 137, "exited with code 137"),
        ("pass", 0, "exited with code 0"),
    ],
)
def test_how_it_ended(code: str, returncode: int, told: str) -> None:
    process = _finished(code)
    assert (process.returncode, process.how_it_ended) == (returncode, told)


def test_last_words_are_the_last_traceback_with_its_causes() -> None:
    process = _finished(
        "import sys, traceback\n"
        "try: 1 / 0\n"
        "except Exception: traceback.print_exc()\n"
        "print('it goes on', file=sys.stderr)\n"
        "try: {}['first']\n"
        "except KeyError as error: raise ValueError('second') from error\n"
    )
    assert process.last_words.startswith("Traceback")
    assert "ZeroDivisionError" not in process.last_words
    assert "KeyError: 'first'" in process.last_words
    assert process.last_words.endswith("ValueError: second")


def test_last_words_without_a_traceback_are_the_last_lines() -> None:
    process = _finished("import sys; print('no such file', file=sys.stderr); sys.exit(2)")
    assert process.last_words == "no such file"


def test_a_command_that_does_not_exist() -> None:
    process = LocalProcess(Command("w0", "worker", 0, ["/nonexistent/trainer"], {}))
    wait_for_end(process.pid)
    assert process.reap()
    assert [line for _, line in process.close()] == [
        "headwater: cannot run '/nonexistent/trainer': No such file or directory"
    ]
    assert process.returncode == 127
