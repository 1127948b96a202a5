"""Tiny processes to launch: a stand-in for a server, and workers made of one line of Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STAND_IN = """
import argparse, json, os, signal, sys
parser = argparse.ArgumentParser()
for option in ("--role", "--listen", "--coordinator", "--servers", "--ready-fd"):
    parser.add_argument(option)
given, more = parser.parse_known_args()
assert len(os.environ["HEADWATER_TOKEN"]) == 64 and "HEADWATER_TOKEN_FILE" not in os.environ
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
said = {{"address": "tcp://127.0.0.1:7", "pid": os.getpid()}}
{behaviour}
with open(int(given.ready_fd), "w") as ready:
    ready.write(json.dumps(said) + "\\n")
if signal.sigwait([signal.SIGTERM, signal.SIGUSR1]) == signal.SIGUSR1:
    raise SystemExit({last!r})
"""


@pytest.fixture(autouse=True)
def _private_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the launcher start a stand-in for coordinator and servers.

    ``behaviour`` is code run before it is ready; ``last`` is what it exits with after SIGUSR1 (a word: code 1).
    """

    def install(
        behaviour: str = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])", last: object = 0
    ) -> None:
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN.format(behaviour=behaviour, last=last), encoding="utf-8")
        monkeypatch.setattr("headwater.launch.commands.SERVER", (sys.executable, "-I", "-S", str(script)))

    return install
