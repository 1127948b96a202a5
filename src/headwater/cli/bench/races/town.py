"""The processes of the race: a coordinator with its state on disk, three servers, a publisher, readers of all kinds."""

from __future__ import annotations

from collections import Counter

from headwater.cli.bench.races import tally
from headwater.cli.chaos.cluster import LOOPBACK, Cluster, free_port
from headwater.cli.chaos.schedule import SERVERS
from headwater.transports.address import Address

PUBLISHER = "publisher"
PACE = 0.02  # seconds of rest after each of the publisher's steps
KINDS: tuple[str, ...] = ("local", "local", "local", "tcp", "tcp")
"""Of the readers: who maps the servers' memory, and who gets bytes and deltas."""


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
        here = {"HEADWATER_ADDRESS": str(coordinator), "HEADWATER_TIMEOUT": "30"}
        arguments = ["--pace", str(self._pace)]
        self._add(PUBLISHER, "publisher", arguments, here, module="headwater.cli.bench.races.publisher")
        for i, kind in enumerate(KINDS):
            forced = {"HEADWATER_TRANSPORT": "tcp"} if kind == "tcp" else {}
            arguments = ["--seed", str(1000 * self._seed + i)]
            self._add(f"r{i}", "reader", arguments, here | forced, module="headwater.cli.bench.races.looker")

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
            total += tally.read(self.folder / "ledgers" / f"{name}-{i}")
        return total

    def words(self) -> list[str]:
        """What processes said of things that must not happen, and of errors that nobody expected."""
        members = [m for m in self.members.values() if m.role in ("publisher", "reader")]
        files = [(m.name, self.folder / "ledgers" / f"{m.name}-{i}") for m in members for i in range(m.starts)]
        return [f"{name}: {line}" for name, path in files for line in tally.said(path)]
