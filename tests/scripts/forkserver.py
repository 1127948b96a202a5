"""A process that has imported everything and forks what the suite runs: a Python costs 20 ms instead of 2 s of a core.

What is forked runs ``python FILE …`` or ``python -m MODULE …`` as from a shell, its exit handlers too; processes that
`headwater run` starts are forked as well. A request is a line of JSON, a list of orders that run side by side; the
answer their exit codes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

from headwater.launch.engines.entry import die_with

PRELOADED = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "headwater.cli.run",
    "headwater.client",
    "headwater.cluster.coordinator",
    "headwater.integrations.torch.optimizer",
    "headwater.server.hosts",
    "headwater.transports.loop",
    "tests.scripts.outcome",
)


class Forked(subprocess.Popen[bytes]):
    """``Popen`` of a Python, without exec: what the launcher in a forked process starts."""

    def _execute_child(self, args: Any, *rest: Any) -> None:  # type: ignore[override]
        pass_fds, cwd, env = rest[3:6]
        pipes = rest[9:15]  # both ends of three, the child's first, then ours
        command = list(args)
        if len(command) < 6 or not str(command[3]).endswith("entry.py"):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            die_with(parent)
            os.setsid()
            for fd, target in zip((pipes[0], pipes[3], pipes[5]), range(3), strict=True):
                if fd != -1:  # else the launcher's own
                    os.dup2(fd, target)
            _close_all_but(set(pass_fds))
            become(command[5:], dict(env), cwd)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - the listing's own descriptor is closed meanwhile
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def become(command: list[str], environment: dict[str, str], cwd: str | None) -> None:
    """Run ``command`` in this process and end it."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd or ".")
        code = _run([word for word in command[1:] if word != "-P"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: list[str]) -> int:
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(words[0]))  # noqa: PTH120 - as Python does
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001 - as Python's own end
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        traceback.print_exc()
        return 1
    return 0


def _order(command: list[str], environment: dict[str, str], cwd: str, out: str) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with(parent)
        os.setsid()
        log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        subprocess.Popen = Forked  # type: ignore[misc,assignment]
        _close_all_but(set())
        become(command, environment, cwd)
    return pid


def main() -> None:
    die_with(int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()  # or the first collection of each child would copy every page
    for line in sys.stdin:
        pids = [_order(*order) for order in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
