"""A whole simulated cluster: built from a scenario, run under its faults, judged by the oracles."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from unittest.mock import patch

from headwater.client import publication
from headwater.client.dense.table import DenseTable
from headwater.cluster.coordinator import Rules
from headwater.errors import HeadwaterError
from headwater.server.shard import Shard
from headwater.testing.faults import LETHAL, Fault
from headwater.testing.hosts import SimCoordinator, SimServer, SimStore
from headwater.testing.links import SimRuntime
from headwater.testing.network import Network
from headwater.testing.oracles import Ledger, Oracles, Violation
from headwater.testing.processes import Process
from headwater.testing.scenario import MARKS, Scenario
from headwater.testing.scheduler import Scheduler, Stuck
from headwater.testing.times import Jitter, Meter, TimeModel
from headwater.testing.versions import (
    HEAL,
    LEASE,
    Publisher,
    VersionAuditor,
    VersionOracle,
    VersionReader,
    unrest,
)
from headwater.testing.workload import Auditor, Reader, Worker
from headwater.versions import leases, lifecycle
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind

HEARTBEAT = 0.1  # seconds
SILENCE = 0.5
PATIENCE = 0.4
WORKER_SILENCE = 2.0
GRACE = 0.5
HEALED = 10.0  # seconds after the last fault in which every shard acknowledges again
BEGIN = 5.0  # seconds in which a cluster without faults has begun
EVENTS = 100_000  # a run that takes more goes round in circles


@dataclass(slots=True)
class Outcome:
    """What one run did. ``excused``: a shard was lost to two faults at once, which nobody promises to survive."""

    seed: int
    violation: Violation | None = None
    events: int = 0
    seconds: float = 0.0
    acknowledged: int = 0
    unknown: int = 0
    excused: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    passed_over: int = 0
    failures: list[str] = field(default_factory=list)
    published: int = 0  # versions that a worker has waited for
    reads: int = 0  # of versions
    recovery: float = 0.0  # seconds from the last fault's end until all was well
    history: list[str] = field(default_factory=list)


class SimCluster:
    """One run. ``trace``: keep a history of everything that was said. ``meter``: what servers do takes time."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        times: TimeModel | None = None,
        trace: bool = False,
        meter: Meter | None = None,
        worker: type[Worker] = Worker,
        patience: float = PATIENCE,
    ) -> None:
        self.scenario = scenario
        self.meter = meter
        self._worker = worker
        self._patience = patience
        self.times = times or Jitter(step=scenario.pace)
        self.scheduler = Scheduler(100.0)
        self.network = Network(self.scheduler, self.times, self._random("network"))
        self.oracles, self.ledger = Oracles(), Ledger(MARKS)
        self.versions = VersionOracle(self.oracles)
        self.store = SimStore()
        self.outcome = Outcome(scenario.seed)
        self.trace = trace
        self.coordinator: SimCoordinator | None = None
        self.servers: dict[str, SimServer] = {}
        self.workers: dict[str, Worker] = {}
        self.readers: dict[str, Reader | VersionReader] = {}
        self.processes: dict[str, Process] = {}
        self._starts: Counter[str] = Counter()
        self._all: list[Process] = []
        self._armed: list[Fault] = []
        self._lasts: Counter[str] = Counter()  # targets under a fault that lasts
        self._acks: dict[int, float] = {}  # by shard: when it last acknowledged
        self._begun = self.scheduler.now

    def _random(self, *name: object) -> Random:
        return Random(f"{self.scenario.seed} {' '.join(map(str, name))}")

    @property
    def now(self) -> float:
        return self.scheduler.now

    # ---- the run ---------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Everything, from the first process to the audit. A violation is in the outcome, not raised."""
        with (
            patch.object(Shard, "observer", Eye(self.oracles.observe)),
            patch.object(leases, "LEASE", LEASE),
            patch.object(lifecycle, "HEAL", HEAL),
            patch.object(publication, "time", _Date(self.scheduler)),
        ):
            try:
                self._run()
            except Violation as violation:
                self.outcome.violation = violation
            except Exception as error:  # noqa: BLE001 - whatever it is, a run must not end so
                self.outcome.violation = Violation("crash", "".join(traceback.format_exception(error))[-1500:])
            finally:
                self.finish()
        if self.outcome.violation is not None:
            self.say(f"VIOLATION {self.outcome.violation}")
        return self.outcome

    def _run(self) -> None:
        self.start()
        try:
            self._until(self._well, BEGIN, "the cluster never began")
            zero = self.now
            for fault in self.scenario.plan.faults:
                self.scheduler.at(zero + fault.at, self._due, fault)
            self._until(lambda: self.now >= zero + self.scenario.seconds, self.scenario.seconds + 1.0, "")
            self._armed.clear()
            self._until(self._healed, 20.0, "the faults never ended")
            healed = self.now
            self._until(lambda: self._recovered(healed), HEALED, "not every shard acknowledges again")
            self.outcome.recovery = self.now - healed
            self._audit()
        except _Lost:
            self.outcome.excused = True

    def start(self) -> None:
        """Every process of the scenario begins."""
        self._start_coordinator()
        for i in range(self.scenario.servers):
            self._start_server(f"s{i}")
        for i in range(self.scenario.workers):
            self._start_worker(f"w{i}")
        if self.scenario.reader:
            self._start_reader("r0")
        if self.scenario.versions:
            self._start_version_reader("v0")

    def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        try:
            self.scheduler.run(done, limit=self.now + seconds, events=EVENTS)
        except Stuck as stuck:
            raise Violation("liveness", f"{what}: {stuck}; {self._state()}") from None

    def finish(self) -> None:
        """Count, and give everything back."""
        o = self.outcome
        o.events, o.seconds = self.scheduler.count, self.now - self._begun
        o.acknowledged, o.unknown = self.ledger.totals
        o.published, o.reads = self.versions.published, self.versions.reads
        for worker in self.workers.values():
            o.failures += worker.failures
        for process in self._all:
            process.unwind()

    # ---- processes -------------------------------------------------------------------------------

    def _process(self, name: str) -> Process:
        self._starts[name] += 1
        random = self._random("clock", name, self._starts[name])
        skewed = self.scenario.skew
        offset = random.choice((0.0, 1e3, 1e6)) * random.random() if skewed else 0.0
        process = Process(self.scheduler, name, offset, 1.0 + 0.01 * (2 * random.random() - 1) if skewed else 1.0)
        self.processes[name] = process
        self._all.append(process)
        self.say(f"start {name}")
        return process

    def _start_coordinator(self) -> None:
        s = self.scenario
        rules = Rules(
            s.servers, s.shards, s.replicas, silence=SILENCE, worker_silence=WORKER_SILENCE, grace=GRACE,
            heartbeat=HEARTBEAT, durable=True,
        )  # fmt: skip
        process = self._process("coordinator")
        self.coordinator = SimCoordinator(
            self.network, process, self, rules, self.store, lambda: self._die("coordinator")
        )

    def _start_server(self, name: str) -> None:
        process = self._process(name)
        random = self._random("incarnation", name, self._starts[name])
        server = SimServer(self.network, process, self, random, self._patience, lambda: self._ended(name))
        server.meter = self.meter
        self.servers[name] = server

    def _runtime(self, process: Process) -> SimRuntime:
        random = self._random("session", process.name, self._starts[process.name])
        return SimRuntime(self.scheduler, self.network, process, random, lambda frame: self._received(process, frame))

    def _start_worker(self, name: str) -> None:
        process = self._process(name)
        random = self._random("work", name, self._starts[name])
        worker = self._worker(
            self.scenario, self._runtime(process), self.oracles, self.ledger, self.times, random, int(name[1:])
        )
        if self.scenario.versions:
            own = f"{name}.{self._starts[name]}"
            worker.publisher = Publisher(self.scenario, self.versions, self._random("publish", own), own)
        self.workers[name] = worker
        process.fibre(worker.body)

    def _start_reader(self, name: str) -> None:
        process = self._process(name)
        self.readers[name] = reader = Reader(self.scenario, self._runtime(process), self._random("read", name))
        process.fibre(reader.body)

    def _start_version_reader(self, name: str) -> None:
        process = self._process(name)
        random = self._random("versions", name, self._starts[name])
        reader = VersionReader(self.scenario, self._runtime(process), self.versions, random)
        self.readers[name] = reader
        process.fibre(reader.body)

    def _restart(self, name: str) -> None:
        if name == "coordinator":
            self.store.crash = ""
        if self.processes[name].alive:
            return
        self.network.reset(self.processes[name])
        if name == "coordinator":
            self._start_coordinator()
        elif name.startswith("s"):
            self._start_server(name)
        elif name.startswith("v"):
            self._start_version_reader(name)
        else:
            self._start_worker(name)

    def _ended(self, name: str) -> None:
        """A server gives up by itself; whoever started it starts another."""
        self.say(f"{name} ends by itself")
        self._die(name)
        self.scheduler.after(0.3, self._restart, name)

    def _die(self, name: str, *, vanish: bool = False) -> None:
        process = self.processes[name]
        process.die(vanish=vanish)
        if vanish:
            self.network.abandon(process)
        else:
            self.network.hang_up(process)

    # ---- faults ----------------------------------------------------------------------------------

    def _due(self, fault: Fault) -> None:
        fault = replace(fault, target=self._who(fault.target))
        if fault.on:
            self._armed.append(fault)
            self.scheduler.after(0.5, self._disarm, fault)
        else:
            self._strike(fault)

    def _who(self, target: str) -> str:
        """The server that has this part in shard 0 now; other targets are names already."""
        views = self._views()
        if target not in ("primary", "backup") or not views:
            return target
        part = views[0].backups if target == "backup" else [views[0].primary] if views[0].primary else []
        hosts = [host for host in (self._host(x.server) for x in part) if host is not None]
        return hosts[0].process.name if hosts else target

    def _disarm(self, fault: Fault) -> None:
        if fault in self._armed:
            self._armed.remove(fault)

    def _strike(self, fault: Fault) -> None:
        process = self.processes.get(fault.target)
        if process is None or not process.alive or not self._may(fault):
            self.outcome.passed_over += 1
            return
        self.outcome.faults[fault.kind] += 1
        self.say(f"FAULT {fault}")
        getattr(self, f"_{fault.kind}")(fault, process)

    def _may(self, fault: Fault) -> bool:
        """Nobody promises to survive the loss of a shard's last copy, or of two at once."""
        if fault.kind not in LETHAL or fault.target not in self.servers:
            return True
        return all(self._survives(view, fault) for view in self._views())

    def _survives(self, view: m.View, fault: Fault) -> bool:
        number = self.servers[fault.target].number
        copies = [x.server for x in ([view.primary] if view.primary else []) + list(view.backups)]
        if number not in copies:
            return True
        others = [self._host(x) for x in copies if x != number]
        if not any(host is not None and host.process.alive for host in others):
            return False
        return fault.daring or (self._quiet(view) and not +self._lasts)

    def _quiet(self, view: m.View) -> bool:
        return not self._unrest(view)

    def _unrest(self, view: m.View) -> str:
        """Why the shard is not as redundant as it should be, with a primary that hears from every backup; or ""."""
        host = self._host(view.primary.server) if view.primary else None
        if host is None or host.server is None:
            return "no primary"
        if len(view.backups) + 1 < self.scenario.replicas:
            return "too few copies"
        node = host.server.nodes.get(view.shard)
        if node is None or node.view.epoch != view.epoch or not node.leads:
            return f"its primary is at {node.view if node is not None else None}"
        followers = node.followers
        following = {f.server for f in followers.by_peer.values() if f.synced}
        members = {x.server for x in view.backups}
        if followers.suspected or not members <= following:
            return f"suspected {followers.suspected}, following {following}, absent {followers.absent}"
        return "" if all(self._fit(x) for x in members) else "a backup is stopped or dead"

    def _fit(self, number: int) -> bool:
        host = self._host(number)
        return host is not None and host.process.alive and not host.process.stopped

    def _host(self, number: int) -> SimServer | None:
        return next((h for h in self.servers.values() if h.number == number and h.process.alive), None)

    def _kill(self, fault: Fault, process: Process) -> None:
        self._die(fault.target, vanish=fault.kind == "vanish")
        self.scheduler.after(fault.seconds, self._restart, fault.target)
        self._check_lost()

    _vanish = _kill

    def _stop(self, fault: Fault, process: Process) -> None:
        process.stop()
        self._lasting(fault, process.go_on)

    def _cut(self, fault: Fault, process: Process) -> None:
        for end in list(process.ends):
            self.network.cut(end)

    def _isolate(self, fault: Fault, process: Process) -> None:
        others = [name for name in self.processes if name != fault.target]
        ways = [(fault.target, name) for name in others] if fault.kind != "deaf" else []
        ways += [(name, fault.target) for name in others] if fault.kind != "mute" else []
        for way in ways:
            self.network.block(*way)

        def heal() -> None:
            for way in ways:
                self.network.heal(*way)

        self._lasting(fault, heal)

    _deaf = _mute = _isolate

    def _before_put(self, fault: Fault, process: Process) -> None:
        self.store.crash = fault.kind.removesuffix("_put")
        self.scheduler.after(0.5 + fault.seconds, self._restart, fault.target)

    _after_put = _before_put

    def _lasting(self, fault: Fault, end: Callable[[], object]) -> None:
        self._lasts[fault.target] += 1

        def ended() -> None:
            self._lasts[fault.target] -= 1
            self.say(f"END {fault.kind} {fault.target}")
            end()

        self.scheduler.after(fault.seconds, ended)

    def _check_lost(self) -> None:
        """Whether a shard's every copy is gone: only a daring fault can do that."""
        for view in self._views():
            copies = [x.server for x in ([view.primary] if view.primary else []) + list(view.backups)]
            if not any(self._host(x) for x in copies):
                raise _Lost

    # ---- what is well ----------------------------------------------------------------------------

    def _views(self) -> list[m.View]:
        return [] if self.coordinator is None else list(self.coordinator.coordinator.fleet.views.values())

    def _well(self) -> bool:
        """Every worker has stepped and every shard is as redundant as it should be."""
        views = self._views()
        return (
            len(views) == self.scenario.shards
            and all(w.steps for w in self.workers.values())
            and all(self._quiet(view) for view in views)
        )

    def _healed(self) -> bool:
        if +self._lasts or self.store.crash:
            return False
        return all(process.alive for process in self.processes.values())

    def _recovered(self, since: float) -> bool:
        self._check_lost()
        views = self._views()
        acknowledged = not self.workers or all(self._acks.get(view.shard, 0.0) > since for view in views)
        return acknowledged and len(views) == self.scenario.shards and all(self._quiet(view) for view in views)

    def _state(self) -> str:
        views = ", ".join(
            f"shard {v.shard} epoch {v.epoch}: {v.primary.server if v.primary else None} "
            f"+ {[x.server for x in v.backups]} learning {[x.server for x in v.learners]} ({self._unrest(v)}, "
            f"acknowledged {self._acks.get(v.shard, 0.0) - self._begun:.2f})"
            for v in self._views()
        )
        steps = {name: worker.steps for name, worker in self.workers.items()}
        failures = [worker.failures[-1] for worker in self.workers.values() if worker.failures]
        return f"{views}; steps {steps}; last failures {failures}"

    # ---- the audit -------------------------------------------------------------------------------

    def _audit(self) -> None:
        """All stop; then a fresh reader reads everything, and every replica is looked at."""
        programs: list[Worker | Reader | VersionReader] = [*self.workers.values(), *self.readers.values()]
        for program in programs:
            program.stopping = True
        self._until(lambda: all(p.finished for p in programs), HEALED, "a worker never stops")
        self._audited(Auditor(self.scenario, self._runtime(self._process("auditor")), self._check), "auditor")
        self._replicas()
        if self.scenario.versions:
            self._audit_versions()

    def _audited(self, auditor: Auditor | VersionAuditor, name: str) -> None:
        self.processes[name].fibre(auditor.body)
        try:
            self._until(lambda: auditor.finished, HEALED, f"the {name} never ends")
        except HeadwaterError as error:
            raise Violation("liveness", f"the {name} failed: {error!r}") from None

    def _audit_versions(self) -> None:
        """What is published now can be leased; then all that is left is in order, and what was read was right."""
        name = "version auditor"
        self._audited(VersionAuditor(self.scenario, self._runtime(self._process(name)), self.versions), name)
        assert self.coordinator is not None
        catalogue = self.coordinator.coordinator.publications.catalogue

        def amiss() -> str:
            hosts = [host for host in self.servers.values() if host.process.alive and host.server is not None]
            return unrest(catalogue, ((host.number, host.server.setting.part_store) for host in hosts if host.server))

        try:
            self._until(lambda: not amiss(), HEALED, "")
        except Violation:
            raise Violation("versions", f"{HEALED:g} s after all was healed: {amiss()}") from None
        self.versions.finish()

    def _check(self, table: DenseTable) -> None:
        for name, values in table.values.items():
            if not self.scenario.clip:
                self.ledger.check(values.numpy()[:MARKS], name)

    def _replicas(self) -> None:
        """Copies that are at the same LSN are the same, sessions and optimizer state included."""
        for view in self._views():
            digests: dict[int, tuple[str, int]] = {}
            for x in ([view.primary] if view.primary else []) + list(view.backups):
                host = self._host(x.server)
                node = host.server.nodes.get(view.shard) if host is not None and host.server is not None else None
                if node is None or (node.upstream is not None and node.upstream.learning):
                    continue
                shard = node.shard
                shard.validate()
                if shard.primary:
                    self.oracles.leads(shard, shard.lsn)
                self.oracles.replica(shard, f"server {x.server}")
                digest = shard.replica.digest()
                before = digests.setdefault(shard.lsn, (digest, x.server))
                if before[0] != digest:
                    raise Violation(
                        "replicas", f"shard {view.shard} at LSN {shard.lsn}: servers {before[1]} and {x.server} differ"
                    )  # fmt: skip

    # ---- eyes ------------------------------------------------------------------------------------

    def says(self, process: Process, frame: Frame) -> None:
        """A coordinator or a server is about to say something."""
        if self.meter is not None:  # a prediction: nothing is judged
            return
        if frame.kind in (Kind.ACK, Kind.DATA, Kind.STATE):
            self._leads(process, frame.shard)
        if frame.kind == Kind.ACK:
            if frame.seq:
                self.oracles.acknowledged(frame.shard, frame.session, frame.table, frame.seq, frame.lsn)
            self._acks[frame.shard] = self.now
        elif frame.kind == Kind.DATA and frame.payload is not None:
            self.oracles.pulled(frame.shard, frame.table, frame.lsn, frame.start, frame.payload)
        if self.trace:
            self.say(f"{process.name} says {_line(frame)}")
        self._trigger(process, frame, first=True)

    def said(self, process: Process, frame: Frame) -> None:
        """It is on its way."""
        self._trigger(process, frame, first=False)

    def _trigger(self, process: Process, frame: Frame, *, first: bool) -> None:
        if not self._armed:
            return
        for fault in self._armed:
            if fault.target == process.name and fault.on == frame.kind.name and fault.first == first:
                self._armed.remove(fault)
                self._strike(fault)
                return

    def _leads(self, process: Process, number: int) -> None:
        host = self.servers[process.name]
        node = host.server.nodes.get(number) if host.server is not None else None
        if node is not None and node.shard.primary:
            self.oracles.leads(node.shard, node.shard.lsn)

    def _received(self, process: Process, frame: Frame) -> None:
        """A client hears something."""
        if self.meter is not None:
            return
        if frame.kind == Kind.DATA:
            self.oracles.saw(frame.session, frame.shard, frame.epoch, frame.lsn)
        if self.trace:
            self.say(f"{process.name} hears {_line(frame)}")

    def say(self, text: str) -> None:
        if self.trace:
            self.outcome.history.append(f"{self.now - self._begun:9.4f} {text}")


class Eye:
    """Callable, and no function: as a class's attribute it is not bound to its instances."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, replica: Shard, record: Any) -> None:
        self._act(replica, record)


class _Date:
    """Stands for the module ``time`` where versions are dated."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def time(self) -> float:
        """Seconds."""
        return self._scheduler.now


class _Lost(Exception):
    """Every copy of a shard is gone."""


def _line(frame: Frame) -> str:
    """A frame in one line."""
    text = f"{frame.kind.name} shard {frame.shard}"
    if frame.kind in (Kind.REQUEST, Kind.NOTICE, Kind.REPLY, Kind.ERROR):
        readers: dict[Kind, Callable[[bytes], object]] = {
            Kind.REQUEST: m.unpack_request, Kind.NOTICE: m.unpack_notice, Kind.REPLY: m.unpack_reply,
            Kind.ERROR: lambda body: repr(m.read_error(body)),
        }  # fmt: skip
        try:
            return f"{text} {readers[frame.kind](frame.body)}"
        except HeadwaterError:  # one server's goodbye to another
            return f"{text} {frame.body!r}"
    names = [name for name in ("SHARED", "END", "WANT", "SKIP") if frame.flags & getattr(Flag, name)]
    return (
        f"{text} {'+'.join(names)} session {frame.session % 0xFFFF:x} epoch {frame.epoch} seq {frame.seq} "
        f"lsn {frame.lsn} clock {frame.clock} {frame.start}:{frame.stop}"
    )
