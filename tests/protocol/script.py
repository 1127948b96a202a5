"""A protocol run as a text file: commands, and under each what the machines answered.

A command is a line; ``----`` ends a group of them, and what follows until an empty line is their answer. Lines that
begin with ``#`` are for people. The commands are the methods of ``Run`` whose names begin with ``do_``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from headwater.cluster.coordinator import Rules
from headwater.layout.dense import layout
from headwater.server.table import Table
from headwater.types import Async, Bulk, DenseSpec, OptimizerSpec, ParameterSpec, Stale, Sync
from headwater.wire import messages as m
from headwater.wire import versions as v
from tests.protocol.text import numbers, values
from tests.protocol.world import COORD, GRACE, ClientProcess, CoordProcess, Process, ReaderProcess, ServerProcess, World

ELEMENTS = 2048  # of each parameter: two pages, so that each shard has one
SYNCS: dict[str, Callable[[str], Sync]] = {
    "bulk": lambda bound: Bulk(),
    "async": lambda bound: Async(int(bound) if bound else None),
    "stale": lambda bound: Stale(int(bound)),
}


def replay(text: str, folder: Path) -> str:
    """The file again, with the answers that are given now."""
    run = Run(World(folder))
    out: list[str] = []
    commands: list[str] = []
    lines = iter(text.splitlines())
    with run.world.watched():
        for line in lines:
            out.append(line)
            if line == "----":
                out += [*run.answers(commands), ""]
                commands = []
                for old in lines:
                    if not old:
                        break
            elif line and not line.startswith("#"):
                commands.append(line)
    assert not commands, f"no ---- after {commands[-1]!r}"
    return "\n".join(out).rstrip("\n") + "\n"


class Run:
    """One file's commands, carried out in a world of its own."""

    def __init__(self, world: World) -> None:
        self.world = world

    def answers(self, commands: list[str]) -> list[str]:
        quiet = False
        for command in commands:
            words = command.split()
            quiet = words[0] == "quietly"
            words = words[1:] if quiet else words
            if words[0] in self.world.processes and words[0] != COORD:
                getattr(self, f"do_{words[1]}")(words[0], *words[2:])
            else:
                getattr(self, f"do_{words[0]}")(*words[1:])
            self.world.run()
            if quiet:
                self.world.lines.clear()
        lines, self.world.lines = self.world.lines, []
        return lines or ["ok"]

    def _process(self, name: str) -> Process:
        return self.world.processes[name]

    def _worker(self, name: str) -> ClientProcess:
        found = self._process(name)
        assert isinstance(found, ClientProcess)
        return found

    # ---- who is there ---------------------------------------------------------------------------------

    def do_cluster(self, *words: str) -> None:
        """``servers=2 shards=1 replicas=2``: a coordinator, which waits for so many servers. Also ``ack=disk`` and
        ``silence=1``, the seconds without a heartbeat until a server counts as dead."""
        given = dict(word.split("=") for word in words)
        ack = given.pop("ack", "memory")
        silence = float(given.pop("silence", "1e9"))
        shape = {name: int(value) for name, value in given.items()}
        rules = self.world.rules = Rules(
            **{"servers": 1, "shards": 1, **shape}, ack=ack,
            silence=silence, worker_silence=1e9, grace=GRACE, snapshots=True, durable=True,
        )  # type: ignore[arg-type]  # fmt: skip
        self.world.names.shards = rules.shards
        self._begin()

    def _begin(self) -> None:
        rules = self.world.rules
        coord = self.world.processes[COORD] = CoordProcess(self.world, rules, self.world.folder / "snapshots")
        with self.world.block("coord begins", coord):
            coord.begin()

    def do_start(self, *names: str) -> None:
        """``s0 s1`` or ``w0 w1`` or ``r0``: these processes begin and join. ``coord``: again, from its store."""
        for name in names:
            if name == COORD:
                self._begin()
            else:
                self._start(name, [n for n in names if n.startswith("w")])
            self.world.run()

    def _start(self, name: str, workers: list[str]) -> None:
        world = self.world
        if name.startswith("s"):
            folder = world.folder / name if world.rules.ack == "disk" else None
            server = world.processes[name] = ServerProcess(world, int(name[1:]), world.rules, folder)
            with world.block(f"{name} begins", server):
                server.join()
        elif name.startswith("w"):
            worker = world.processes[name] = ClientProcess(world, name)
            with world.block(f"{name} begins", worker):
                worker.join(len(workers))
        else:
            reader = world.processes[name] = ReaderProcess(world, name)
            with world.block(f"{name} begins", reader):
                reader.join()

    def do_kill(self, name: str) -> None:
        """A process ends without a word."""
        self.world.kill(name)

    def do_cut(self, way: str) -> None:
        """``w0-s0``: the connections between two processes break."""
        self.world.cut(*way.split("-"))

    def do_hold(self, *ways: str) -> None:
        """``s0->s1``: what is sent on this way from now on stays on the way."""
        self.world.held |= {tuple(way.split("->")) for way in ways}  # type: ignore[misc]

    def do_release(self, *ways: str) -> None:
        """What was held on this way arrives."""
        self.world.held -= {tuple(way.split("->")) for way in ways}  # type: ignore[misc]

    def do_tick(self, seconds: str) -> None:
        """``0.5s``: time passes for everyone."""
        self.world.tick(float(seconds.rstrip("s")))

    def do_copy(self, name: str) -> None:
        """A server's thread has made the copies of versions that were under way."""
        server = self._process(name)
        assert isinstance(server, ServerProcess)
        with self.world.block(f"{name} has copied", server):
            server.copy()

    # ---- workers --------------------------------------------------------------------------------------

    def do_table(self, name: str, policy: str, *workers: str) -> None:
        """``t bulk w0 w1``: these workers declare and attach a table with one float32 parameter of 2,048 elements for
        each shard, SGD with lr 1. Policies: bulk, bulk:96 (max_grad_norm),
        async, async:1 (a cap), stale:1 (a bound)."""
        kind, _, bound = policy.partition(":")
        sync = SYNCS[kind](bound)
        norm = float(bound) if kind == "bulk" and bound else None
        parameters = tuple(ParameterSpec(f"p{i}", (ELEMENTS,)) for i in range(self.world.rules.shards))
        spec = DenseSpec(name, parameters, OptimizerSpec("SGD", ({"lr": 1.0},)), sync, norm)
        self.world.names.tables.setdefault(len(self.world.names.tables) + 1, name)
        assert len(layout(spec, self.world.rules.shards).participants) == self.world.rules.shards
        for who in workers:
            self._declare(self._worker(who), spec)
            self.world.run()

    def _declare(self, worker: ClientProcess, spec: DenseSpec) -> None:
        def act() -> str:
            assert worker.client is not None
            worker.tables[spec.name] = worker.client.table(spec)
            return ""

        with self.world.block(f"{worker.name} declares {spec.name}", worker):
            worker.call(act)

    def do_step(self, name: str, table: str, gradient: str, *words: str) -> None:
        """``w0 step t 2.0 [skip]``: a whole step with this gradient everywhere, until it and fresh values are there."""
        worker = self._worker(name)
        mine = worker.tables[table]

        def act() -> str:
            for each in mine.gradients.values():
                each.fill_(float(gradient))
            names = list(mine.gradients)
            ticket = mine.step(skip=True) if "skip" in words else mine.push_step(names, want=True)
            result = ticket.wait()
            mine.wait()
            by = f" for w{' w'.join(map(str, result.skipped_by))}" if result.skipped_by else ""
            what = "is applied" if result.applied else f"was skipped{by}"
            stale = f", staleness {result.staleness}" if result.staleness else ""
            return f"step {result.clock} {what}{stale}, values {_values(worker, table)}"

        with self.world.block(f"{name} takes a step with {gradient}", worker):
            worker.call(act)

    def do_pull(self, name: str, table: str) -> None:
        """``w0 pull t``: ask for the newest values, and wait for them."""
        worker = self._worker(name)

        def act() -> str:
            worker.tables[table].pull().wait()
            return f"values {_values(worker, table)}"

        with self.world.block(f"{name} pulls", worker):
            worker.call(act)

    def do_mean(self, name: str, table: str, gradient: str) -> None:
        """``w0 mean t 2.0``: push this gradient, and look at the mean of all workers' before the step ends."""
        worker = self._worker(name)
        mine = worker.tables[table]

        def act() -> str:
            for each in mine.gradients.values():
                each.fill_(float(gradient))
            mine.push(list(mine.gradients))
            means, _ = mine.mean()
            return f"the mean is {' '.join(numbers(x) for x in means.values())}"

        with self.world.block(f"{name} asks for the mean", worker):
            worker.call(act)

    def do_end(self, name: str, table: str) -> None:
        """``w0 end t``: end the step with what is pushed."""
        worker = self._worker(name)

        def act() -> str:
            mine = worker.tables[table]
            result = mine.step().wait()
            mine.wait()
            return f"step {result.clock} is applied, values {_values(worker, table)}"

        with self.world.block(f"{name} ends its step", worker):
            worker.call(act)

    def do_publish(self, name: str, table: str, version: str) -> None:
        """``w0 publish t v1``: this state is a version; returns when its moment is past."""
        worker = self._worker(name)

        def act() -> str:
            assert worker.client is not None
            worker.client.publish([worker.tables[table]], version)
            return f"what is pushed from now on is not in {version}"

        with self.world.block(f"{name} publishes", worker):
            worker.call(act)

    def do_snapshot(self, name: str) -> None:
        """``w0 snapshot``: ask the coordinator for one, and wait until it is on disk."""
        worker = self._worker(name)

        def act() -> str:
            assert worker.client is not None
            taken = worker.client.ask(m.TakeSnapshot())
            return type(taken).__name__

        with self.world.block(f"{name} asks for a snapshot", worker):
            worker.call(act)

    # ---- readers --------------------------------------------------------------------------------------

    def do_lease(self, name: str, table: str, version: str) -> None:
        """``r0 lease t v1``: hold a version."""
        reader = self._process(name)
        assert isinstance(reader, ReaderProcess)
        with self.world.block(f"{name} leases", reader):
            reader.ask(reader.control, v.Lease(table, version))

    def do_fetch(self, name: str, server: str, number: str, shard: str, table: str) -> None:
        """``r0 fetch s1 1 0 t``: the bytes of a version's part of a shard and table, from whoever holds it."""
        reader = self._process(name)
        assert isinstance(reader, ReaderProcess)
        tables = {name: n for n, name in self.world.names.tables.items()}
        with self.world.block(f"{name} fetches", reader):
            end = self.world.connect(reader, self._process(server))
            reader.ask(end, v.Fetch(int(number), int(shard), tables[table]))

    # ---- looking --------------------------------------------------------------------------------------

    def do_status(self) -> None:
        """What every replica and every worker has now."""
        for name, process in self.world.processes.items():
            if isinstance(process, ServerProcess):
                for shard, node in sorted(process.machine.nodes.items()):
                    tables = "".join(f", {_table(t)}" for t in node.shard.tables.values())
                    where = f"shard {shard} " if self.world.rules.shards > 1 else ""
                    self.world.lines.append(
                        f"{name}: {where}{node.role or 'nothing'} in epoch {node.view.epoch}, "
                        + (f"log {node.shard.log.last}, " if node.leads else "")
                        + f"applied {node.shard.lsn}{tables}"
                    )
            elif isinstance(process, ClientProcess):
                for table, mine in process.tables.items():
                    self.world.lines.append(f"{name}: {table} step {mine.clock} = {_values(process, table)}")


def _values(worker: ClientProcess, table: str) -> str:
    return " ".join(dict.fromkeys(numbers(x) for x in worker.tables[table].values.values()))


def _table(table: Table) -> str:
    clock = table.gathering.clock if table.collective else max(table.clocks.clock.values(), default=0)
    return f"{table.spec.name} step {clock} = {values(table)}"
