"""Which lines of the processes are shown, and when: a script that fails on every worker shows one traceback, not W."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from headwater.launch.outcome import TYPED, is_victim
from headwater.launch.process import begins_traceback

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headwater.launch.process import Process, Stream

HOLD = 3.0
"""Seconds that a traceback is held back: what the script catches and logs is shown so much later."""

Line = tuple["Stream", str]


class Lines:
    """Pure: the time is passed in.

    A traceback on a worker's stderr is held back for a moment. If the worker ends with it, it is the worker's last
    words, and who reports how the job ended shows them, last on the screen and once. Other workers that fail at the
    same place say nothing more, nor do those that only report that one was lost, nor those that a Ctrl-C ended.

    Args:
        once: do so; otherwise every line is shown as it comes.
        only_rank0: of the other workers nothing is shown but the last words of one that fails.
        stdout: that is true of their stdout too; otherwise who is given it chooses.
        elastic: a worker that fails does not end the job: nobody reports it later.
    """

    def __init__(self, *, once: bool, only_rank0: bool = False, stdout: bool = True, elastic: bool = False) -> None:
        self._once, self._only_rank0, self._stdout, self._elastic = once, only_rank0, stdout, elastic
        self._held: dict[Process, tuple[float, list[str]]] = {}
        self._known: dict[Process, list[str]] = {}  # the tracebacks that are shown, or will be in the end
        self._unseen: set[Process] = set()

    def take(self, process: Process, stream: Stream, line: str, now: float) -> list[Line]:
        """A line has come; what is to be shown at once."""
        if process.role != "worker":
            return [] if TYPED.match(line) else [(stream, line)]  # the exception or the outcome will say it
        if self._mute(process) and (self._stdout or stream == "stderr"):
            return []
        if stream == "stderr" and self._once and (process in self._held or begins_traceback(line)):
            self._held.setdefault(process, (now + HOLD, []))[1].append(line)
            return []
        return [(stream, line)]

    @property
    def due(self) -> float:
        """When to ask for what was held long enough."""
        return min((due for due, _ in self._held.values()), default=float("inf"))

    def late(self, now: float) -> list[tuple[Process, Line]]:
        """What was held long enough: its worker goes on, or takes its time to end."""
        found = [process for process, (due, _) in self._held.items() if due <= now]
        return [(process, line) for process in found for line in self._release(process)]

    def ended(self, process: Process) -> list[Line]:
        """A process has ended; what is to be shown of what was held."""
        if process.role != "worker":
            return []
        if self._mute(process):
            return self._of_muted(process)
        held = self.held(process)
        if not held or not process.returncode or self._elastic:
            return self._release(process)
        if is_victim(process):
            self._unseen.add(process)
            del self._held[process]
            return []
        if self._told(process):  # two that fail at once: the report may be about either
            self._unseen.add(process)
            self._known[process] = process.last_words.splitlines()
            del self._held[process]
            return []
        if self._known or process.signalled:  # the report is about another
            return self._release(process)
        self._unseen.add(process)
        self._known[process] = words = process.last_words.splitlines()
        del self._held[process]
        return [("stderr", line) for line in held[: len(held) - len(words)]]

    def held(self, process: Process) -> list[str]:
        """The lines of a process that are held back."""
        return self._held[process][1] if process in self._held else []

    def seen(self, process: Process) -> bool:
        """Whether the last words of a process that has ended were shown already."""
        return process not in self._unseen

    def rest(self, reported: str) -> list[tuple[Process, Line]]:
        """The job is over, and what is reported is the end of the process of this name: others' last words, but for
        those that are the same as what is reported, or as another's.
        """
        told = [known for process, known in self._known.items() if process.name == reported]
        found = []
        for process, known in self._known.items():
            if process in self._unseen and process.name != reported and not _same(known, told):
                told.append(known)
                found.append(process)
        self._unseen.difference_update(found)
        return [(process, ("stderr", line)) for process in found for line in self._known[process]]

    def _told(self, process: Process) -> bool:
        """Whether what a process has ended with, by itself, is what another will be reported with."""
        unseen = [known for each, known in self._known.items() if each in self._unseen]
        return not process.signalled and _same(process.last_words.splitlines(), unseen)

    def _mute(self, process: Process) -> bool:
        return self._only_rank0 and process.rank != 0

    def _of_muted(self, process: Process) -> list[Line]:
        words = process.last_words.splitlines()
        if process.returncode and self._elastic:
            return [("stderr", line) for line in words]
        shown = [known for each, known in self._known.items() if each not in self._unseen and known[-1] in words[-1:]]
        if any(_alike(words, known) for known in shown):
            return []
        self._unseen.add(process)
        if words and process.returncode and not process.signalled and not is_victim(process):
            self._known.setdefault(process, words)
        return []

    def _release(self, process: Process) -> list[Line]:
        """What was held, unless it is known, or a Ctrl-C's."""
        lines = self._held.pop(process, (0.0, []))[1]
        if not lines or _interrupted(process, lines):
            return []
        like = [each for each, known in self._known.items() if each is not process and _alike(lines, known)]
        if not like or self._elastic:
            self._known.setdefault(process, lines)
            return [("stderr", line) for line in lines]
        same = lines[-1] == self._known[like[0]][-1]
        if process.returncode and (process.signalled or same):  # perhaps stopped amid its traceback, as another failed
            return []
        what = "the same traceback as" if same else f"{lines[-1]}: at the same place as"
        return [("stderr", f"{what} {like[0].name}")]


def _alike(lines: list[str], known: list[str]) -> bool:
    """Whether two tracebacks are of one place, or the first of as much of it as was written when a signal came."""
    frames, others = ([line for line in each if line.lstrip(" |").startswith("File ")] for each in (lines, known))
    return bool(frames) and frames == others[: len(frames)]


def _same(words: list[str], others: Iterable[list[str]]) -> bool:
    """Whether last words are of the same place and reason as some of the others."""
    return any(_alike(words, known) and words[-1] == known[-1] for known in others)


def _interrupted(process: Process, lines: list[str]) -> bool:
    """Whether a traceback only says that Ctrl-C was passed on; with ``HEADWATER_DEBUG=1`` it is shown."""
    asked = process.signalled and os.environ.get("HEADWATER_DEBUG") != "1"
    return asked and any(line.startswith("KeyboardInterrupt") for line in lines)
