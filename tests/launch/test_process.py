"""Lines out of pipes, and how a process's end is told."""

from __future__ import annotations

import pytest

from headwater.launch.process import LineSplitter, Process
from tests.launch.support import python, wait_for_end


def test_lines_come_whole_however_the_bytes_arrive() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"on", 0.0) == []
    assert splitter.feed(b"e\ntwo\r\nth", 0.0) == ["one", "two"]
    assert splitter.feed(b"ree \xff\n", 0.0) == ["three \N{REPLACEMENT CHARACTER}"]
    assert splitter.flush() == []


def test_what_is_left_without_an_end_of_line_is_not_lost() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"tail", 0.0) == []
    assert splitter.flush() == ["tail"]


def test_a_character_split_between_reads_is_put_together() -> None:
    first, second = "β\n".encode()[:1], "β\n".encode()[1:]
    splitter = LineSplitter()
    assert splitter.feed(first, 0.0) + splitter.feed(second, 0.0) == ["β"]


def test_a_progress_bar_becomes_a_line_a_second() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b" 1%\r 2%\r", 0.0) == [" 2%"]
    assert splitter.feed(b" 3%\r", 0.5) == []
    assert splitter.feed(b" 4%\r", 1.0) == [" 4%"]
    assert splitter.feed(b"99%\r100%\n", 1.1) == ["100%"]


def test_an_endless_line_is_cut() -> None:
    splitter = LineSplitter()
    (line,) = splitter.feed(b"x" * 100_000, 0.0)
    assert len(line) == 100_000
    assert splitter.flush() == []


def _finished(code: str) -> Process:
    process = Process("w0", "worker", 0, python(code), {})
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
    process = Process("w0", "worker", 0, ["/nonexistent/trainer"], {})
    wait_for_end(process.pid)
    assert process.reap()
    assert [line for _, line in process.close()] == [
        "headwater: cannot run '/nonexistent/trainer': No such file or directory"
    ]
    assert process.returncode == 127


def test_an_unfinished_line_is_a_prompt_after_a_while() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"hello\n(Pdb) ", 5.0) == ["hello"]
    assert 5.0 < splitter.prompting < 6.0
    assert splitter.prompt() == "(Pdb) "
    assert splitter.prompting == float("inf")
    assert splitter.feed(b"42\n", 7.0) == ["42"]


def test_a_progress_bar_is_no_prompt() -> None:
    splitter = LineSplitter()
    splitter.feed(b"\r10 %\r20 %", 5.0)
    assert splitter.prompting == float("inf")
