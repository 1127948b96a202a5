"""How a job ended, and the words for it."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwater.errors import ClusterError, HeadwaterError, LinkBroken, from_code
from headwater.launch.revival import TRIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headwater.launch.process import Process

# How a coordinator or server says why it ends: `headwater server: AddressInUse: …`.
TYPED = re.compile(r"headwater (coordinator|server): (?P<code>[A-Z]\w+): (?P<message>.*)")
_DRAINED = "Drained"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended.

    ``code``: 0 if every worker exited with 0 (an elastic job: if one did); the exit code of the first worker that
    failed (``128 + n`` when signal n ended it); 1 if the cluster is lost; ``128 + n`` when the launcher got signal n:
    130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    ``failed`` names the process at fault, ``message`` says it in one line and ``last_words`` is the end of its stderr:
    the traceback, if there was one. ``left`` names processes that even SIGKILL did not end. ``shown``: the last words
    have gone out with the lines of the process already.
    """

    code: int = 0
    message: str = ""
    last_words: str = ""
    failed: str = ""
    interrupted: bool = False
    error: HeadwaterError | None = None
    left: tuple[str, ...] = ()
    shown: bool = True

    @property
    def remains(self) -> str:
        """What is left of the job when it has been stopped."""
        if not self.left:
            return "no process is left"
        return f"{', '.join(self.left)} did not end upon SIGKILL: the kernel holds it, in a disk's or a driver's work"


def of_signal(number: int) -> Outcome:
    """The launcher was asked to end."""
    told = {signal.SIGINT: "interrupted", signal.SIGHUP: "terminated, as its terminal is gone (SIGHUP)"}
    return Outcome(128 + number, told.get(signal.Signals(number), "terminated"), interrupted=True)


def of_worker(worker: Process, others: Sequence[str], *, shown: bool) -> Outcome:
    """A worker failed; ``others`` are stopped."""
    message = end_of_worker(worker)
    message += f"; {', '.join(others)} stopped" if others else ""
    return Outcome(worker.returncode or 1, message + _asked(worker), worker.last_words, worker.name, shown=shown)


def _asked(worker: Process) -> str:
    """What helps a worker that ended because there was nothing to read."""
    last = worker.last_words.rpartition("\n")[2]
    if worker.stdin or not last.startswith(("EOFError", "bdb.BdbQuit")):
        return ""
    return f". It read its standard input and has none; headwater run --stdin-rank {worker.rank} gives it yours"


def of_host(process: Process, *, copies: bool, own: bool) -> Outcome:
    """The cluster cannot go on. ``copies``: there were some elsewhere; ``own``: the job runs on it."""
    known = typed(process)
    told = f" ({known.code}: {known})" if known else ""
    said = f"{title(process)} (pid {process.pid}) {process.how_it_ended}{told}"
    if not own:
        lost = "what only it held is lost; shards with a copy elsewhere go on there"
    elif copies and process.role == "server":
        lost = "no server is left, and what they held is lost"
    else:
        lost = "pushes that were not acknowledged may or may not be applied, and what it held is lost"
    message = f"{said}; {lost}. The job was stopped; start it again" if own else f"{said}; {lost}"
    return Outcome(1, message, process.last_words, process.name, error=LinkBroken(message))


def end_of_worker(worker: Process) -> str:
    """``w1 was killed by SIGKILL after 2.0 s``."""
    return f"{worker.name} {worker.how_it_ended} after {worker.ended - worker.started:.1f} s"


def loss_of_host(process: Process, replaced: bool) -> str:
    """A coordinator or server of a cluster that goes on has ended; whether another takes its place."""
    known = typed(process)
    told = f" ({known.code}: {known})" if known else ""
    said = f"{title(process)} {process.how_it_ended}{told}"
    if not replaced:
        return f"{said} right after its start, {TRIES} times in a row; it is not started again"
    if process.role == "coordinator":
        return f"{said}; training goes on in the views as they are; it is started again at the same address"
    return f"{said}; its shards go on elsewhere; a new server takes its place"


def stillborn(process: Process) -> HeadwaterError:
    """A process of the cluster ended before it was ready."""
    if known := typed(process):
        return from_code(known.code, f"{known} (nothing is running)")
    return ClusterError(
        f"{process.name} {process.how_it_ended} before it accepted connections; nothing is running. "
        f"Its last words:\n{process.last_words}"
    )


def title(process: Process) -> str:
    """``server s1``, ``coordinator``, ``w0``."""
    return f"server {process.name}" if process.role == "server" else process.name


def typed(process: Process) -> HeadwaterError | None:
    """The error that a coordinator or server said it ends with."""
    told = TYPED.match(process.tail[-1]) if process.tail else None
    return from_code(told["code"], told["message"]) if told and told["code"] != _DRAINED else None


def drained(process: Process) -> bool:
    """Whether a server left because nothing was left on it."""
    told = TYPED.match(process.tail[-1]) if process.tail else None
    return process.returncode == 0 and bool(told and told["code"] == _DRAINED)


def is_victim(worker: Process) -> bool:
    """Whether a worker failed only because another was lost."""
    return any(line.partition(":")[0].endswith("WorkerLost") for line in worker.last_words.splitlines())
