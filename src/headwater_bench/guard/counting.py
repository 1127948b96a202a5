"""How many calls one operation makes, and how much memory it takes at once: what most of many operations show.

Now and then one shows more: a heartbeat falls into it, or a table of the interpreter's grows.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import statistics
import sys
import threading
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import headwater

OURS = str(Path(headwater.__file__).parent) + "/"
WARM_UP, REPEATS = 20, 31
COMPILING = "headwater-warm"
"""The thread that compiles kernels ahead of their use: memory is not counted beside it."""


class Counts(NamedTuple):
    """Of one operation. A call counts if Headwater makes it or is called by it.

    ``functions``: Python's; ``builtins``: C's; ``sockets``: of these, methods of sockets, each a system call;
    ``blocks``: pieces of memory that it leaves behind; ``memory``: bytes of Python's that it holds at once, at most.
    """

    functions: int
    builtins: int
    sockets: int
    blocks: int
    memory: int


class Profile:
    """Counts in every thread that begins after ``watch``, while ``on``."""

    def __init__(self) -> None:
        self.counting = False
        self.functions: Counter[CodeType] = Counter()
        self.builtins = self.sockets = 0

    def watch(self) -> None:
        threading.setprofile(self._event)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Count from here on, in this thread and those that are watched."""
        self.functions, self.builtins, self.sockets = Counter(), 0, 0
        sys.setprofile(self._event)
        self.counting = True
        try:
            yield
        finally:
            self.counting = False
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, given: Any) -> None:
        if not self.counting:
            return
        if event == "call":
            code, caller = frame.f_code, frame.f_back
            if code.co_filename.startswith(OURS) or (caller is not None and caller.f_code.co_filename.startswith(OURS)):
                self.functions[code] += 1
        elif event == "c_call" and frame.f_code.co_filename.startswith(OURS):
            self.builtins += 1
            if isinstance(getattr(given, "__self__", None), socket.socket):
                self.sockets += 1


def count(operation: Callable[[], None], profile: Profile) -> tuple[Counts, list[tuple[str, float]]]:
    """The counts of an operation; and the functions that are called most, with how often in one operation."""
    for _ in range(WARM_UP):
        operation()
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    gc.collect()
    gc.disable()
    try:
        calls, functions = _calls(operation, profile)
        memory = _memory(operation)
    finally:
        gc.enable()
    called, builtins, sockets = (statistics.mode(found) for found in zip(*calls, strict=True))
    most_called = [(_name(code), number / REPEATS) for code, number in functions.most_common()]
    return Counts(called, builtins, sockets, *memory), most_called


def _calls(operation: Callable[[], None], profile: Profile) -> tuple[list[tuple[int, int, int]], Counter[CodeType]]:
    found, functions = [], Counter[CodeType]()
    for _ in range(REPEATS):
        with profile.on():
            operation()
        found.append((profile.functions.total(), profile.builtins, profile.sockets))
        functions += profile.functions
    return found, functions


def _memory(operation: Callable[[], None]) -> tuple[int, int]:
    """Blocks that one operation leaves behind (also those that only the collector would find), and bytes at once."""
    blocks, peaks = array("q", bytes(8 * REPEATS)), array("q", bytes(8 * REPEATS))  # what is counted leaves none itself
    tracemalloc.start()
    try:
        for _ in range(WARM_UP):
            operation()
        for i in range(REPEATS):
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            before = sys.getallocatedblocks()
            operation()
            blocks[i] = sys.getallocatedblocks() - before
            peaks[i] = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    return statistics.mode(blocks), statistics.mode(peaks)


def _name(code: CodeType) -> str:
    return f"{code.co_filename.removeprefix(OURS)}:{code.co_firstlineno} {code.co_qualname}"
