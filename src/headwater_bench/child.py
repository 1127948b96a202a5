"""A benchmark's other processes, told what to do by lines of JSON.

One is started as ``python -m headwater_bench.child ROLE``. A line ``{"do": name, "with": {...}}`` on its standard
input calls ``role.name(**with)``; the answer is one line of JSON. A child ends when its input does, so none outlives
the benchmark.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

ROLES = {
    "kernel": "headwater_bench.kernel:KernelAlone",
    "gloo": "headwater_bench.gloo:GlooRank",
    "echo": "headwater_bench.sockets:Echo",
    "trainer": "headwater_bench.trainer:StepTrainer",
    "pusher": "headwater_bench.memory:MemoryWorker",
    "steady": "headwater_bench.saved:Steady",
    "generator": "headwater_bench.serve:Generator",
    "loader": "headwater_bench.saved:Loader",
    "copier": "headwater_bench.plain:Copier",
    "source": "headwater_bench.plain:RawSource",
    "relay": "headwater_bench.relayed:RelayProcess",
    "readers": "headwater_bench.relayed:Readers",
    "reading": "headwater_bench.published:Reading",
}
"""What a child may be: its name and the class that answers."""

ANSWER_SECONDS = 600.0
"""How long one request may take before the child is taken for dead."""


class ChildFailed(Exception):
    """A benchmark's child process ended or raised; the benchmark has no result. Its traceback is on stderr."""


class Child:
    """One child process. ``ask`` is ``tell`` followed by ``answer``; two children told before either answers run
    side by side."""

    def __init__(
        self,
        role: str,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        **arguments: Any,
    ) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headwater_bench.child", role, msgspec.json.encode(arguments).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(environment or {}),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **arguments: Any) -> None:
        """Ask for something without waiting for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode({"do": do, "with": arguments}) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()

    def answer(self, timeout: float = ANSWER_SECONDS) -> Any:
        """What the last ``tell`` came to; ``ChildFailed`` if the child ended or raised, or took ``timeout`` seconds."""
        assert self._process.stdout is not None
        watch = threading.Timer(timeout, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            self._failed()
        return msgspec.json.decode(line)

    def ask(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.answer()

    def close(self) -> None:
        """End it: first by closing its input, then by force."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=2)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _failed(self) -> None:
        code = self._process.wait()
        raise ChildFailed(f"the benchmark's {self.role} process ended with code {code}; its output is above")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(role: str, arguments: dict[str, Any]) -> None:
    """The child's side: build the role, then answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent closes our input
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between our lines
    module, _, name = ROLES[role].partition(":")
    actor = getattr(importlib.import_module(module), name)(**arguments)
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line)
        answer = getattr(actor, request["do"])(**request["with"])
        channel.write(msgspec.json.encode(answer) + b"\n")
        channel.flush()


if __name__ == "__main__":
    serve(sys.argv[1], msgspec.json.decode(sys.argv[2]))
