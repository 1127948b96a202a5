"""A process that has imported everything, and forks the cluster's processes: a restart costs 20 ms, not 2 s of a core.

What is forked runs ``python -m MODULE`` as it would from a shell. Requests are lines of JSON on standard input, answers
and the ends of children are lines on standard output. All of them die with it, and it with the harness.
"""

from __future__ import annotations

import gc
import importlib
import os
import queue
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from headwater.errors import DeadlineExceeded, InternalError
from headwater.launch.engines.entry import die_with

PRELOADED = (
    "torch",
    "headwater.client",
    "headwater.cluster.coordinator",
    "headwater.server.hosts",
    "headwater.transports.loop",
    "headwater_bench.chaos.ledger",
    "headwater.readers.weights",
    "headwater.wire.delta_kernels",
)
PATIENCE = 60.0  # seconds that it may take to import everything


class ForkRequest(msgspec.Struct, frozen=True):
    """Run a module. ``log`` takes its output; ``ready`` is a file that ``--ready-fd`` is opened on."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    log: str
    ready: str = ""


class ForkReply(msgspec.Struct, frozen=True):
    """Started (``code`` is None) or ended, by ``code`` or, if negative, by a signal."""

    pid: int
    code: int | None = None


class ForkServer:
    """The harness's end. Start it from the thread that lives longest: it dies with that."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "headwater_bench.rig.forkserver", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            )
        self._started: queue.Queue[int] = queue.Queue()
        self._ended: queue.Queue[ForkReply] = queue.Queue()
        threading.Thread(target=self._read, name="headwater-forkserver", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word = msgspec.json.decode(line, type=ForkReply)
            if word.code is None:
                self._started.put(word.pid)
            else:
                self._ended.put(word)

    def start(self, order: ForkRequest) -> int:
        """Returns the process id."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
            return self._started.get(timeout=PATIENCE)
        except (BrokenPipeError, queue.Empty):
            raise DeadlineExceeded("the process that starts the others did not answer; see forkserver.log") from None

    def ended(self) -> list[ForkReply]:
        """Processes that have ended since the last call."""
        found = []
        while not self._ended.empty():
            found.append(self._ended.get())
        return found

    def close(self) -> None:
        """End it, and with it all its children."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main(parent: int) -> None:
    """Serve until standard input ends."""
    die_with(parent)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or the first collection of each child would copy every page
    rest = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _say(ForkReply(_fork(msgspec.json.decode(line, type=ForkRequest))))
        while (word := _reap()) is not None:
            _say(word)


def _say(word: ForkReply) -> None:
    os.write(1, msgspec.json.encode(word) + b"\n")


def _reap() -> ForkReply | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return ForkReply(pid, os.waitstatus_to_exitcode(status)) if pid else None


def _fork(order: ForkRequest) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        die_with(parent)
        code = _run(order)
    except BaseException:  # noqa: BLE001 - nothing may return into the forkserver's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(order: ForkRequest) -> int:
    os.setsid()
    signal.set_wakeup_fd(-1)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(order.environment)
    arguments = list(order.arguments)
    if order.ready:
        arguments += ["--ready-fd", str(os.open(order.ready, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))]
    sys.argv = [order.module, *arguments]
    try:
        runpy.run_module(order.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Of this process, without what is meant for another cluster, and ``extra``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
    return kept | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | dict(extra)


def check(arguments: Sequence[str]) -> int:
    """The parent's process id from the command line."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        raise InternalError("usage: python -m headwater_bench.rig.forkserver PARENT")
    return int(arguments[1])


if __name__ == "__main__":
    main(check(sys.argv))
