"""The processes of the race: coordinator with its state on disk, servers, publisher, a relay, readers of all kinds."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from headwater_bench.races import counters
from headwater_bench.races.values import LARGE, MODEL
from headwater_bench.rig.cluster import LOOPBACK, Cluster, free_port
from headwater_bench.chaos.schedule import SERVERS
from headwater.transports.address import Address

PUBLISHER = "publisher"
PACE = 0.02  # seconds of rest after each of the publisher's steps
RELAY = "relay"


class Kind(NamedTuple):
    """A kind of reader. ``steady``: it holds the newest version until there is a newer one, else it lets go at once."""

    name: str
    transport: str = ""
    relay: bool = False
    steady: bool = False
    model: str = MODEL


KINDS = (
    Kind("shared memory"),
    Kind("shared memory, held", steady=True),
    Kind("shared memory, held", steady=True),
    Kind("tcp", "tcp"),
    Kind("tcp", "tcp"),
    Kind("shared memory of a relay", relay=True, steady=True),
    Kind("tcp from a relay", "tcp", relay=True),
    Kind("shared memory, large", model=LARGE),
)
"""Of the readers, one each."""


class Town(Cluster):
    """Every restart of a process counts in a file of its own, so that what the one before counted stays."""

    def __init__(self, seed: int, *, server: str = "headwater.server", pace: float = PACE) -> None:
        super().__init__("bulk", seed, local=True, workers=0)
        self._server, self._pace = server, pace
        self._seed = seed

    def _place(self, name: str) -> Address:
        """No proxies: this is a race, and they would be its slowest part."""
        self.direct[name] = Address("tcp", LOOPBACK, free_port())
        return self.direct[name]

    def _plan(self) -> None:
        coordinator = self._place("coordinator")
        self._add("coordinator", "coordinator", self.coordinator_arguments(str(coordinator)), {}, ready=True)
        for i in range(SERVERS):
            listen = str(self._place(f"s{i}"))
            arguments = ["--role", "server", "--listen", listen, "--coordinator", str(coordinator)]
            self._add(f"s{i}", "server", arguments, {}, module=self._server, ready=True)
        relay = str(self._place(RELAY))
        arguments = ["relay", "--model", MODEL, "--upstream", str(coordinator), "--listen", relay, "--json"]
        self._add(RELAY, "relay", arguments, {}, module="headwater")
        here = {"HEADWATER_ADDRESS": str(coordinator), "HEADWATER_TIMEOUT": "30"}
        arguments = ["--pace", str(self._pace)]
        self._add(PUBLISHER, "publisher", arguments, here, module="headwater_bench.races.publisher")
        for i, kind in enumerate(KINDS):
            forced = {"HEADWATER_TRANSPORT": kind.transport} if kind.transport else {}
            through = {"HEADWATER_ADDRESS": relay} if kind.relay else {}
            arguments = ["--seed", str(1000 * self._seed + i), "--model", kind.model]
            arguments += ["--steady"] if kind.steady else []
            self._add(f"r{i}", "reader", arguments, here | forced | through, module="headwater_bench.races.reader")

    def start(self, name: str, wait: bool = True) -> None:
        """As a cluster's; programs of the race are told where to count."""
        member = self.members[name]
        if member.role in ("publisher", "reader"):
            plain = member.arguments
            member.arguments = [*plain, "--tally", str(self.folder / "ledgers" / f"{name}-{member.starts}")]
            super().start(name, wait)
            member.arguments = plain
        else:
            super().start(name, wait)

    def counts(self, name: str) -> Counter[str]:
        """What all processes of this name have counted."""
        total: Counter[str] = Counter()
        for i in range(self.members[name].starts):
            total += counters.read(self.folder / "ledgers" / f"{name}-{i}")
        return total

    def words(self) -> list[str]:
        """What processes said of things that must not happen, and of errors that nobody expected."""
        members = [m for m in self.members.values() if m.role in ("publisher", "reader")]
        files = [(m.name, self.folder / "ledgers" / f"{m.name}-{i}") for m in members for i in range(m.starts)]
        return [f"{name}: {line}" for name, path in files for line in counters.said(path)]
