"""What simulated workers and readers do: real clients, real tables, and a ledger of what they were told."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from headwater.client.client import Client
from headwater.client.dense.table import DenseTable
from headwater.errors import HeadwaterError
from headwater.testing.links import SimRuntime
from headwater.testing.oracles import Ledger, Oracles
from headwater.testing.scenario import MARKS, NOISE, Scenario
from headwater.testing.times import TimeModel

if TYPE_CHECKING:
    from headwater.client.tickets import Ticket
    from headwater.testing.versions import Publisher

TIMEOUT = 30.0  # seconds: longer than any fault and what follows from it
REJOIN = 0.1  # seconds


class Worker:
    """One process that trains: joins, steps until told to stop, joins again if its client gives up."""

    def __init__(
        self,
        scenario: Scenario,
        runtime: SimRuntime,
        oracles: Oracles,
        ledger: Ledger,
        times: TimeModel,
        random: Random,
        rank: int,
    ) -> None:
        self.scenario = scenario
        self.rank = rank
        self.stopping = False
        self.finished = False
        self.steps = 0
        self.failures: list[str] = []
        self.runtime = runtime
        self._oracles = oracles
        self._ledger = ledger
        self.times = times
        self.random = random
        self.publisher: Publisher | None = None

    def body(self) -> None:
        """The process's main function."""
        while not self.stopping:
            try:
                with connect(self.runtime, "worker", self.rank) as client:
                    table = client.table(self.scenario.table)
                    while not self.stopping:
                        self.runtime.sleep(self.times.computing(self.random))
                        self._step(client, table)
            except HeadwaterError as error:
                self.failures.append(f"{self.runtime.now():.3f} {type(error).__name__}: {error}")
                self.runtime.sleep(REJOIN)
        self.finished = True

    def _step(self, client: Client, table: DenseTable) -> None:
        slot = self._ledger.begin()
        table.settle()
        self._fill(client, table, slot)
        ticket = self._push(table)
        result = ticket.wait()
        self._ledger.end(slot, applied=result.applied)
        self.steps += 1
        if self.publisher is not None:
            self.publisher.stepped(client, table)
        if self.random.random() < 0.7:
            table.wait()
        elif self.random.random() < 0.5:
            table.pull().wait()

    def _fill(self, client: Client, table: DenseTable, slot: int) -> None:
        """A one where this push leaves its mark, and numbers whose sum depends on the order."""
        for name in table.gradients:
            gradient = table.gradients[name].numpy()
            gradient[:] = 0.0
            gradient[slot] = 1.0
            gradient[MARKS : MARKS + NOISE] = [self.random.random() for _ in range(4)] * (NOISE // 4)
        for shard, segments in enumerate(table.layout.segments):
            if segments:
                flat = np.zeros(table.layout.sizes[shard] // 8)
                for s in segments:
                    source = table.gradients[table.spec.parameters[s.parameter].name].numpy()
                    flat[s.offset // 8 : s.end // 8] = source[s.start : s.stop]
                self._oracles.contributed(client.session, table.number, table.clock + 1, shard, flat)

    def _push(self, table: DenseTable) -> Ticket:
        names = [p.name for p in table.spec.parameters]
        which = self.random.random()
        if which < 0.3:
            return table.push_pull()
        if which < 0.5:
            table.push(names[:1])
            return table.push_step(names[1:], want=True) if names[1:] else table.step()
        if which < 0.6:
            table.push(names)
            return table.step()
        return table.push_step(names, want=which < 0.8)


class Reader:
    """One process that only reads."""

    def __init__(self, scenario: Scenario, runtime: SimRuntime, random: Random) -> None:
        self.stopping = False
        self.finished = False
        self.reads = 0
        self.failures: list[str] = []
        self._scenario = scenario
        self._runtime = runtime
        self._random = random

    def body(self) -> None:
        while not self.stopping:
            try:
                with connect(self._runtime, "reader", None) as client:
                    table = client.table(self._scenario.table)
                    while not self.stopping:
                        self._runtime.sleep(0.1 * self._random.random())
                        table.pull().wait()
                        self.reads += 1
            except HeadwaterError as error:
                self.failures.append(f"{self._runtime.now():.3f} {type(error).__name__}: {error}")
                self._runtime.sleep(REJOIN)
        self.finished = True


class Auditor:
    """Comes last, reads everything once, and hands it to ``check``."""

    def __init__(self, scenario: Scenario, runtime: SimRuntime, check: Callable[[DenseTable], None]) -> None:
        self.finished = False
        self._scenario = scenario
        self._runtime = runtime
        self._check = check

    def body(self) -> None:
        with connect(self._runtime, "reader", None) as client:
            table = client.table(self._scenario.table)
            table.pull().wait()
            self._check(table)
        self.finished = True


def connect(runtime: SimRuntime, role: str, rank: int | None, timeout: float = TIMEOUT) -> Client:
    """A client of the simulated cluster."""
    return Client(runtime.dial, role=role, rank=rank, timeout=timeout, runtime=runtime)
