"""What becomes of a job: who is started when, what an end means, who is started again, and how all of it is ended.

Pure: no process is started or signalled here, and the time is passed in. ``Supervisor`` reads what is known of its
processes and answers with a ``Decision``; who holds the engine carries it out, tells of every process that was started
(``Supervisor.started``), and asks again when something has happened or is due. So it is the same for every engine.
"""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headwater.errors import DeadlineExceeded, UsageError
from headwater.launch import escalation, outcome
from headwater.launch.escalation import NEVER
from headwater.launch.outcome import Outcome
from headwater.launch.ready import ready_of
from headwater.launch.revival import Revival

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from headwater.launch.escalation import Escalation
    from headwater.launch.process import Place, Process
    from headwater.launch.shape import Shape

_SETTLE = 2.0
"""Seconds in which the worker at fault shows itself, after others have said that they lost it."""
_ECHO = 1.0
"""Seconds in which a SIGHUP says nothing new: kernel, shell and session each tell a process of one hang-up."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a job survives, and how long those that are to end may take.

    Attributes:
        grace: seconds between SIGTERM and SIGKILL where nobody asked the job to end: a worker has failed, say.
        patience: seconds that workers get to finish after Ctrl-C (they get SIGINT), before SIGTERM; and after SIGTERM
            or SIGHUP to the launcher (they get SIGTERM), before SIGKILL. A second signal does not wait.
        ready_timeout: seconds that the cluster may take to come up.
        keep_going: a server that dies does not end the job; another takes its place. Default: with 2 replicas or more.
        elastic: a worker that dies does not end the job as long as one remains, or has finished.
        restart_workers: how often each worker of an elastic job that dies is started again, with the same rank.

    Raises ``UsageError`` if these do not fit together.
    """

    grace: float = 5.0
    patience: float = 20.0
    ready_timeout: float = 60.0
    keep_going: bool | None = None
    elastic: bool = False
    restart_workers: int = 0

    def __post_init__(self) -> None:
        if self.restart_workers < 0 or (self.restart_workers and not self.elastic):
            raise UsageError(
                f"restart_workers={self.restart_workers}: 0 or more, and above 0 only for an elastic job; "
                "nothing was started"
            )


@dataclass(slots=True)
class Decision:
    """What is to be done now, in the order of the fields.

    Attributes:
        notes: lines for the user.
        replace: processes that have ended, each of which another is to take the place of.
        signals: whom to send what.
        due: when to look again, if nothing happens before.
    """

    notes: list[str] = field(default_factory=list)
    replace: list[Process] = field(default_factory=list)
    signals: list[tuple[Process, signal.Signals]] = field(default_factory=list)
    due: float = NEVER


class Supervisor:
    """Decides for one job: a cluster, its own or one that it has joined, and the workers that train with it.

    Args:
        shown: whether the last words of a process that has ended are on the screen already.

    Attributes: ``coordinator``, ``servers`` and ``workers``: the latest process of each place; ``outcome``: how the job
    ended, so far while it runs; ``hurried``: somebody asked again not to wait for those that were to end.
    """

    def __init__(self, shape: Shape, rules: Rules, shown: Callable[[Process], bool]) -> None:
        self.coordinator: Process | None = None
        self.servers: list[Process] = []
        self.workers: list[Process] = []
        self.outcome = Outcome()
        self.hurried = False
        self._shape, self._rules, self._shown = shape, rules, shown
        self._ending: Escalation | None = None
        self._hangup = 0.0  # until then a SIGHUP says nothing new
        self._revivals: dict[Place, Revival] = {}
        self._due: dict[Process, float] = {}  # of those that have ended: when another takes their place
        self._returning: dict[Process, str] = {}  # not yet ready: the name of who was there before
        self._decision = Decision()

    @property
    def keeps_going(self) -> bool:
        """Whether a server that dies does not end the job."""
        return self._shape.replicas > 1 if self._rules.keep_going is None else self._rules.keep_going

    @property
    def hosts(self) -> list[Process]:
        """The cluster, the coordinator first: when it dies the servers may follow, and it is the one to name."""
        return [*([self.coordinator] if self.coordinator else []), *self.servers]

    # ---- who is started ----------------------------------------------------------------------------

    def opening(self) -> list[Place]:
        """Who of the cluster is to be started next, once those before are ready: the coordinator, then the servers."""
        if not self._shape.servers:
            return []
        if self.coordinator is None:
            return [("coordinator", 0)]
        return [] if self.servers else [("server", number) for number in range(self._shape.servers)]

    def started(self, process: Process, instead_of: Process | None = None) -> None:
        """A process was started, in a place of its own or in that of one that has ended."""
        if instead_of is not None:
            del self._due[instead_of]
            if process.role != "worker":
                self._returning[process] = instead_of.name
        if process.role == "coordinator":
            self.coordinator = process
            return
        group = self.servers if process.role == "server" else self.workers
        if instead_of is None:
            group.append(process)
        else:
            group[group.index(instead_of)] = process

    def sort_servers(self) -> None:
        """By the numbers that the coordinator gave them: s2 before s10."""
        self.servers.sort(key=lambda server: (len(server.name), server.name))

    # ---- how it goes on ----------------------------------------------------------------------------

    def goes_on(self, now: float) -> bool:
        """While a worker runs; without workers, while the cluster runs and nobody asked to stop."""
        if self.workers:
            held = self._ending is not None and self._ending.over(now)
            return not held and any(worker.running or self._comes_back(worker) for worker in self.workers)
        return self._ending is None and any(process.running or self._comes_back(process) for process in self.hosts)

    def _comes_back(self, process: Process) -> bool:
        return self._ending is None and self._due.get(process, NEVER) < NEVER

    def look(self, now: float, asked: int | None = None) -> Decision:
        """Decide what is to be done. ``asked``: the number of a signal that the launcher got."""
        self._decision = decision = Decision()
        if asked is not None:
            self._take_request(asked, now)
        if self._ending is None:
            decision.due = self._look_for_faults(now)
        if self._ending is not None:
            number = self._ending.next(now)
            if number is not None:
                decision.signals += [(worker, number) for worker in self.workers if worker.running]
            decision.due = self._ending.due
        return decision

    def _take_request(self, number: int, now: float) -> None:
        if self._ending is not None:
            if not (number == signal.SIGHUP and now < self._hangup):
                self.hurried = True
                self._ending.hurry(now)
            return
        self._hangup = now + _ECHO
        if number == signal.SIGINT:
            self._ending = escalation.interrupt(now, self._rules.patience, self._rules.grace)
        else:
            self._ending = escalation.finish(now, self._rules.patience)
        self.outcome = outcome.of_signal(number)

    def _end(self, how: Outcome, now: float) -> None:
        self.outcome = how
        self._ending = escalation.terminate(now, self._rules.grace)

    def _look_for_faults(self, now: float) -> float:
        """See to those that have ended: replace them or end the job. Returns when to look again."""
        due = NEVER
        for process in self.hosts:
            if not process.running:
                due = min(due, self._look_after(process, now, self._host_ended))
            elif process in self._returning and process.is_ready:
                self._welcome(process)
            if self._ending is not None:
                return now
        if self.servers and not any(server.running or self._comes_back(server) for server in self.servers):
            last = self.servers[-1]
            left = outcome.drained(last) and not self._shape.own
            self._end(Outcome() if left else outcome.of_host(last, copies=True, own=self._shape.own), now)
            return now
        return min(due, self._look_at_workers(now))

    def _look_after(self, process: Process, now: float, decide: Callable[[Process, float], float]) -> float:
        """Somebody has ended: decide once what follows, and do it when it is due. Returns when to look again."""
        if process not in self._due:
            self._due[process] = decide(process, now)
        if self._ending is not None or now < self._due[process]:
            return self._due[process]
        self._decision.replace.append(process)
        return NEVER

    # ---- coordinator and servers -------------------------------------------------------------------

    def _host_ended(self, process: Process, now: float) -> float:
        """When another coordinator or server takes the place of this one."""
        self._returning.pop(process, None)
        server = process.role == "server"
        if outcome.drained(process) or (server and self.keeps_going and process.returncode == 0):
            self._decision.notes.append(f"{outcome.title(process)} has left the cluster")
            return NEVER
        if not (self.keeps_going if server else self.keeps_going or self._shape.state is not None):
            self._end(outcome.of_host(process, copies=False, own=self._shape.own), now)
            return now
        due = self._revivals.setdefault(process.place, Revival()).ended(process.worked, now)
        self._decision.notes.append(outcome.loss_of_host(process, due is not None))
        if due is None and not server:
            self._end(outcome.of_host(process, copies=True, own=self._shape.own), now)
        return NEVER if due is None else due

    def _welcome(self, process: Process) -> None:
        """Another process has taken a place."""
        before = self._returning.pop(process)
        ready_of(process)  # takes its name
        title, again = outcome.title(process), f"pid {process.pid}, restart {process.restarts}"
        if process.name == before:
            self._decision.notes.append(f"{title} is back, as a new process ({again})")
        else:
            self._decision.notes.append(f"{title} has taken the place of {before} ({again})")

    # ---- workers -----------------------------------------------------------------------------------

    def _look_at_workers(self, now: float) -> float:
        """Begin to end the job if a worker has failed; returns when a doubtful failure will have settled."""
        failed = [worker for worker in self.workers if worker.returncode]
        if not failed:
            return NEVER
        if self._rules.elastic:
            return self._go_on_without(failed, now)
        # Who reports that another worker was lost may be out of the door before that one is: wait for the culprit.
        culprits = [worker for worker in failed if not outcome.is_victim(worker)]
        settled = failed[0].ended + _SETTLE
        if not culprits and now < settled and any(worker.running for worker in self.workers):
            return settled
        self._end_for_worker(min(culprits or failed, key=lambda worker: worker.ended), now)
        return now

    def _go_on_without(self, failed: Sequence[Process], now: float) -> float:
        due = min(self._look_after(worker, now, self._worker_ended) for worker in failed)
        if not any(worker.running or worker.returncode == 0 or self._comes_back(worker) for worker in self.workers):
            self._end_for_worker(min(failed, key=lambda worker: worker.ended), now)
        return due

    def _worker_ended(self, worker: Process, now: float) -> float:
        """When an elastic worker is started again."""
        most = self._rules.restart_workers
        due = self._revivals.setdefault(worker.place, Revival(most)).ended(worker.worked, now)
        others = [other.name for other in self.workers if other.running]
        ended = outcome.end_of_worker(worker)
        if due is not None:
            self._decision.notes.append(f"{ended}; it is started again ({worker.restarts + 1} of {most})")
        elif others:
            self._decision.notes.append(f"{ended}; {', '.join(others)} {'go' if others[1:] else 'goes'} on")
        return NEVER if due is None else due

    def _end_for_worker(self, worker: Process, now: float) -> None:
        others = [other.name for other in self.workers if other.running]
        self._end(outcome.of_worker(worker, others, shown=self._shown(worker)), now)


class Opening:
    """Waiting for processes of the cluster that were just started to accept connections.

    Args:
        expected: they.
        beside: if one of these ends meanwhile, it was in vain.
    """

    def __init__(self, expected: Sequence[Process], beside: Sequence[Process], now: float, timeout: float) -> None:
        self._expected, self._beside = expected, beside
        self._deadline, self._timeout = now + timeout, timeout

    def look(self, now: float, asked: int | None = None) -> float | None:
        """When to look again; ``None``: all are ready, and have the names that the coordinator gave them.

        Raises what one that ended said, ``DeadlineExceeded``, or what Python raises at the signal ``asked``.
        """
        if all(process.is_ready for process in self._expected):
            for process in self._expected:
                ready_of(process)
            return None
        for process in self._beside:
            if not process.running:
                raise outcome.stillborn(process)
        if asked is not None:
            raise KeyboardInterrupt if asked == signal.SIGINT else SystemExit(128 + asked)
        if now >= self._deadline:
            late = ", ".join(process.name for process in self._expected if not process.ready)
            raise DeadlineExceeded(f"{late} did not come up within {self._timeout:g} s; all were stopped")
        return self._deadline


class Closing:
    """Ending what still runs: one group after the other, each with ``grace`` seconds between SIGTERM and SIGKILL."""

    def __init__(self, groups: Iterable[Sequence[Process]], grace: float) -> None:
        self._groups = deque(groups)
        self._grace = grace
        self._ending: Escalation | None = None

    def look(self, now: float, hurry: bool = False) -> Decision | None:
        """What is to be done; ``None``: nobody runs, or who does is held by the kernel."""
        while self._groups:
            running = [process for process in self._groups[0] if process.running]
            self._ending = self._ending or escalation.terminate(now, self._grace)
            if not running or self._ending.over(now):
                self._groups.popleft()
                self._ending = None
                continue
            if hurry:
                self._ending.hurry(now)
            number = self._ending.next(now)
            signals = [] if number is None else [(process, number) for process in running]
            return Decision(signals=signals, due=self._ending.due)
        return None
