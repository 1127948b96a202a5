"""Strikes, heals, starts again, and waits until the cluster is whole: the run itself."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from headwater.errors import HeadwaterError
from headwater_bench.chaos.ledger import Ledger, Tail
from headwater_bench.chaos.replay import Recorder
from headwater_bench.chaos.schedule import Fault, Kind
from headwater_bench.rig.cluster import Cluster, RigProcess
from headwater_bench.rig.monitor import Monitor
from headwater_bench.rig.proxy import Rule, Way
from headwater_bench.rig.supervisor import QUIET, WHOLE, Supervisor

TURN = 0.01  # seconds between two looks
HEALING = 10.0  # seconds after healing in which every worker must be acknowledged again
HOPELESS = 60  # processes that ended by themselves: the cluster is beyond help
AGAIN = 0.3  # seconds until a process that ended by itself is started again

_RULES: dict[Kind, tuple[str, Way]] = {
    "isolate": ("hold", "both"),
    "cut-in": ("hold", "to"),
    "cut-out": ("hold", "from"),
    "half-open": ("swallow", "both"),
    "delay": ("delay", "both"),
    "flip": ("flip", "both"),
    "truncate": ("truncate", "both"),
}


@dataclass(slots=True)
class Struck:
    """A fault that has struck; ``healed`` is when it was undone."""

    fault: Fault
    at: float
    healed: float | None = None
    undo: Callable[[], None] | None = None
    until: float = 0.0


@dataclass(slots=True)
class Timeline:
    """What happened, for the report."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # promises that were broken, beside the sums
    surprises: list[str] = field(default_factory=list)  # processes that ended by themselves
    quiet: tuple[float, float] = (0.0, 0.0)  # the window without faults
    loud: tuple[float, float] = (0.0, 0.0)  # the one with


class ChaosRun:
    """``faults`` strike a running cluster. ``say`` takes the lines of the timeline as they come."""

    def __init__(self, cluster: Cluster, monitor: Monitor, recorder: Recorder, seed: int, say: Callable[[str], None]):
        self.timeline = Timeline()
        self._cluster, self._monitor, self._recorder = cluster, monitor, recorder
        self._supervisor = Supervisor(
            cluster, monitor, self._ended, period=TURN, again=AGAIN, each_turn=self._undo_and_read
        )
        self._wait = self._supervisor.wait
        self._random = Random(seed)
        self._say = say
        self._begun = time.monotonic()
        self._active: list[Struck] = []
        self._risky = 0.0  # when the last fault that could cost a server its place was over
        ranks = {member.name: int(member.name[1:]) for member in cluster.of("worker") if member.name != "reader"}
        ranks["reader"] = -1
        self.tails = {name: Tail(cluster.file(name), rank) for name, rank in ranks.items()}

    @property
    def ledgers(self) -> dict[str, Ledger]:
        return {name: tail.ledger for name, tail in self.tails.items() if name != "reader"}

    def note(self, text: str) -> None:
        at = time.monotonic() - self._begun
        self.timeline.lines.append((at, text))
        self._say(f"{at:8.2f} s  {text}")

    def fail(self, text: str) -> None:
        self.timeline.failures.append(text)
        self.note(f"FAILED: {text}")

    # ---- phases ----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Start workers and reader; until each has been acknowledged a few times."""
        for member in self._cluster.of("worker"):
            self._cluster.start(member.name)
        moment = time.monotonic()
        if not self._wait(lambda: self._all_acknowledged(moment, 5), 30.0):
            self.fail(f"not every worker was acknowledged within 30 s of its start: {self._who_is_late(moment)}")

    def calm(self, seconds: float) -> None:
        """A window without faults, for the throughput."""
        begun = time.monotonic()
        self._wait(lambda: False, seconds)
        self.timeline.quiet = (begun, time.monotonic())
        self.note(f"faults begin; {self._rate(begun):.0f} pushes a second without")

    def storm(self, faults: list[Fault], seconds: float, every: float) -> None:
        """The faults, one after the other, ``every`` so many seconds or later, for ``seconds`` at most."""
        begun = self._risky = time.monotonic()
        until = begun + seconds
        self.timeline.loud = (begun, until)
        last = begun
        for fault in faults:
            if len(self.timeline.surprises) > HOPELESS:
                self.fail(f"{len(self.timeline.surprises)} processes ended by themselves; the rest is left out")
                return
            moment = last + fault.after if fault.early else max(self._over(last), last + every) + fault.after
            self._wait(lambda moment=moment: time.monotonic() >= moment, max(0.0, until - time.monotonic()))  # type: ignore[misc]
            if not self._may_strike(fault, until) or time.monotonic() >= until:
                break
            last = time.monotonic()
            self._strike(fault)
        self._wait(lambda: False, max(0.0, until - time.monotonic()))

    def heal(self) -> None:
        """Undo everything, start everybody, and see that all go on and all copies are there again."""
        for struck in list(self._active):
            self._undo(struck)
        moment = time.monotonic()
        for member in self._cluster.members.values():
            self._cluster.go_on(member.name)
            if not member.running:
                member.due = min(member.due or moment, moment)
        self.note("all faults are healed")
        if self._wait(lambda: self._all_acknowledged(moment, 1), HEALING):
            self.note(f"every worker is acknowledged again after {time.monotonic() - moment:.2f} s")
        else:
            self.fail(f"not acknowledged within {HEALING:g} s of healing: {self._who_is_late(moment)}")
        if not self.wait_whole(moment + QUIET, WHOLE):
            self.fail(f"not all copies {WHOLE:g} s after healing: {self.shards()}")

    def end_workers(self) -> None:
        """They finish the push under way and leave."""
        workers = self._cluster.of("worker")
        for member in workers:
            member.due = None
            self._cluster.ask_to_end(member.name)
        if not self._wait(lambda: not any(member.running for member in workers), 40.0):
            late = [member.name for member in workers if member.running]
            self.fail(f"{', '.join(late)} did not end within 40 s")
            for name in late:
                self._cluster.kill(name)
        self._supervisor.turn()

    # ---- waiting ---------------------------------------------------------------------------------

    def _undo_and_read(self, now: float) -> None:
        for struck in [s for s in self._active if s.until <= now]:
            self._undo(struck)
        for tail in self.tails.values():
            tail.read()

    def _ended(self, member: RigProcess, code: int) -> None:
        full = any(s.fault.kind == "disk-full" for s in self._active) and member.role == "coordinator"
        words = f"{member.name} ended by itself (code {code}): {self._cluster.last_words(member.name)}"
        ledger = self.tails.get(member.name)
        if ledger is not None:
            ledger.read()
            words = f"{member.name} ended by itself (code {code}): {ledger.ledger.errors[-1:]}"
        if not full:
            self.timeline.surprises.append(words)
        if "DeadlineExceeded" in words:  # something that should have ended the wait did not
            self.fail(f"a wait that only its deadline ended: {words}")
        else:
            self.note(words)

    def _over(self, last: float) -> float:
        """When the last fault is over, so far as we know."""
        return max([last, *(struck.until for struck in self._active)])

    def _may_strike(self, fault: Fault, until: float) -> bool:
        """Wait until the promise covers this fault."""
        if fault.early or not fault.risky:
            return True
        begun = self._risky + QUIET
        limit = min(until, begun + WHOLE)
        if self._wait(lambda: self._whole(begun), limit - time.monotonic()):
            return True
        if limit < until:
            self.fail(f"not all copies {WHOLE:g} s after the last fault: {self.shards()}")
        return False

    def _whole(self, since: float) -> bool:
        quiet = not any(struck.fault.risky for struck in self._active) and time.monotonic() > since
        return self._supervisor.all_servers_run() and quiet and self._supervisor.redundant_since(since)

    def wait_whole(self, since: float, seconds: float) -> bool:
        """Until the coordinator, asked after ``since``, says that every shard has all its copies."""
        return self._wait(lambda: self._supervisor.redundant_since(since), seconds)

    def _all_acknowledged(self, since: float, times: int) -> bool:
        for ledger in self.ledgers.values():
            late = list(ledger.of("ledger").values())[-4 * times :]
            if sum(push.acked is not None and push.sent > since for push in late) < times:
                return False
        return True

    def _who_is_late(self, since: float) -> str:
        late = []
        for name, ledger in self.ledgers.items():
            pushes = ledger.of("ledger")
            last = max((push.acked or 0.0 for push in pushes.values()), default=0.0)
            if last < since:
                running = "runs" if self._cluster.members[name].running else "does not run"
                late.append(f"{name} ({running}, {len(pushes)} pushes, {ledger.errors[-1:]})")
        return "; ".join(late) + f"; shards: {self.shards()}; monitor: {self._monitor.problem or 'fine'}"

    def shards(self) -> str:
        """What the coordinator said last."""
        sight = self._monitor.sight
        if sight is None:
            return f"the coordinator has never answered ({self._monitor.problem})"
        age = time.monotonic() - sight.asked
        servers = {s.server: f"{s.state} pid {s.pid}" for s in sight.status.servers if s.state != "dead"}
        return f"({age:.1f} s ago) " + "; ".join(
            f"{s.shard}: epoch {s.epoch}, primary {s.primary}, backups {s.backups}, learners {s.learners}, "
            f"{s.copies} of {s.wanted}" for s in sight.status.shards
        ) + f"; servers: {servers}"  # fmt: skip

    def _rate(self, since: float) -> float:
        count = sum(
            push.acked is not None and push.sent > since
            for ledger in self.ledgers.values() for push in ledger.of("ledger").values()
        )  # fmt: skip
        return count / max(1e-9, time.monotonic() - since)

    # ---- faults ----------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        member = self._cluster.members[fault.target]
        now = time.monotonic()
        struck = Struck(fault, now, until=now + fault.seconds)
        if fault.kind in ("kill", "stop") and not member.running:
            if not self._wait(lambda: member.running, 2.0):
                self.timeline.skipped[fault.name] += 1
                return
            struck.at = time.monotonic()
            struck.until = struck.at + fault.seconds
        if fault.kind == "disk-full" and not self._cluster.tmpfs:
            self.timeline.skipped[fault.name] += 1
            return
        self.note(str(fault))
        self._act(fault, struck)
        self.timeline.struck.append(struck)
        if fault.risky:
            self._risky = struck.until
        if struck.undo is not None:
            self._active.append(struck)

    def _act(self, fault: Fault, struck: Struck) -> None:
        cluster, name = self._cluster, fault.target
        if fault.kind == "kill":
            cluster.kill(name)
            cluster.members[name].due = struck.until
        elif fault.kind == "stop":
            cluster.stop(name)
            struck.undo = lambda: cluster.go_on(name)
        elif fault.kind == "reset":
            cluster.network.reset(name)
        elif fault.kind == "disk-full":
            cluster.fill_disk()
            struck.undo = cluster.free_disk
        elif fault.kind == "second-coordinator":
            self._second()
        elif fault.kind == "replay":
            self._replay(name)
        else:
            kind, way = _RULES[fault.kind]
            late, count = self._random.uniform(0.01, 0.1), self._random.randint(1, 3)
            number = cluster.network.apply(Rule(kind, name, way, seconds=late, count=count))  # type: ignore[arg-type]
            struck.undo = lambda: cluster.network.lift(number)

    def _undo(self, struck: Struck) -> None:
        self._active.remove(struck)
        struck.healed = time.monotonic()
        if struck.fault.risky:
            self._risky = struck.healed
        if struck.undo is not None:
            struck.undo()
        self.note(f"over: {struck.fault.kind} {struck.fault.target}")

    def _second(self) -> None:
        coordinator = self._cluster.members["coordinator"]
        if not coordinator.running:
            self.timeline.skipped["second-coordinator coordinator"] += 1
            return
        code, words = self._cluster.second_coordinator()
        if code in (None, 0):
            self.fail(f"a second coordinator on the same state did not refuse to start (code {code}): {words}")
        elif "StateInUse" not in words:
            self.fail(f"a second coordinator ended with code {code}, not with StateInUse: {words}")

    def _replay(self, worker: str) -> None:
        with contextlib.suppress(HeadwaterError, OSError):
            for line in self._recorder.replay(worker, self._cluster.direct, self._cluster.token):
                self.note(f"  {line}")
