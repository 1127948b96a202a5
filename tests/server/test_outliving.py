"""A server whose job is signalled as a whole: only its launcher ends it at once."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.patience import PATIENCE

SERVER = """
import os, sys, threading
from headwater.server.outliving import Outliving
outliving = Outliving(float(sys.argv[1]))
ended = threading.Event()
if sys.argv[2] == "serving":
    outliving.stop = ended.set
print("ready", flush=True)
ended.wait()
"""


@contextmanager
def _server(seconds: float, stage: str = "serving") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(seconds), stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        yield server
        server.kill()


def _by_another(number: signal.Signals, pid: int) -> None:
    subprocess.run(["kill", f"-{number:d}", str(pid)], check=True)


def test_a_process_of_a_cluster_has_one_thread_when_it_blocks_the_signals() -> None:
    """NumPy starts some; a signal that one of them gets ends the process, whoever sent it."""
    code = "import os, headwater.server.__main__; print(len(os.listdir('/proc/self/task')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_another_process_does_not_end_it_and_the_launcher_does(number: signal.Signals) -> None:
    with _server(1000.0) as server:
        _by_another(number, server.pid)
        fd = os.pidfd_open(server.pid)
        assert not select.select([fd], [], [], 0.3)[0]
        os.close(fd)
        server.terminate()
        assert server.wait(PATIENCE) == 0


def test_without_a_word_of_the_launcher_it_ends_in_the_end() -> None:
    with _server(0.1) as server:
        _by_another(signal.SIGTERM, server.pid)
        assert server.wait(PATIENCE) == 0


def test_one_that_is_not_serving_yet_just_ends() -> None:
    with _server(1000.0, "starting") as server:
        server.terminate()
        assert server.wait(PATIENCE) == 128 + signal.SIGTERM
