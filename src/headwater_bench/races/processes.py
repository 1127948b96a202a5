"""The clients of the race: a publisher, a relay, and readers of all kinds."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from headwater_bench.races import counters
from headwater_bench.races.values import LARGE, MODEL
from headwater_bench.rig.cluster import Cluster

PUBLISHER = "publisher"
PACE = 0.02  # seconds of rest after each of the publisher's steps
RELAY = "relay"


class ReaderKind(NamedTuple):
    """A kind of reader. ``steady``: it holds the newest version until there is a newer one, else it lets go at once."""

    name: str
    transport: str = ""
    relay: bool = False
    steady: bool = False
    model: str = MODEL


KINDS = (
    ReaderKind("shared memory"),
    ReaderKind("shared memory, held", steady=True),
    ReaderKind("shared memory, held", steady=True),
    ReaderKind("tcp", "tcp"),
    ReaderKind("tcp", "tcp"),
    ReaderKind("shared memory of a relay", relay=True, steady=True),
    ReaderKind("tcp from a relay", "tcp", relay=True),
    ReaderKind("shared memory, large", model=LARGE),
)
"""Of the readers, one each."""


def add_processes(cluster: Cluster, seed: int, pace: float = PACE) -> None:
    """``PUBLISHER``, ``RELAY`` and the readers ``r0`` …; none is started yet.

    Every start of a program counts in a file of its own, so that what the one before counted stays.
    """
    relay = str(cluster.place(RELAY))
    arguments = ["relay", "--model", MODEL, "--upstream", cluster.address, "--listen", relay, "--json"]
    cluster.add(RELAY, "relay", "headwater", arguments)
    here, own = cluster.client(), "--counters"
    arguments = ["--pace", str(pace)]
    cluster.add(PUBLISHER, "publisher", "headwater_bench.races.publisher", arguments, here, own_file=own)
    for i, kind in enumerate(KINDS):
        forced = {"HEADWATER_TRANSPORT": kind.transport} if kind.transport else {}
        through = {"HEADWATER_ADDRESS": relay} if kind.relay else {}
        arguments = ["--seed", str(1000 * seed + i), "--model", kind.model]
        arguments += ["--steady"] if kind.steady else []
        given = here | forced | through
        cluster.add(f"r{i}", "reader", "headwater_bench.races.reader", arguments, given, own_file=own)


def counts(cluster: Cluster, name: str) -> Counter[str]:
    """What all processes of this name have counted."""
    total: Counter[str] = Counter()
    for path in cluster.files(name):
        total += counters.read(path)
    return total


def words(cluster: Cluster) -> list[str]:
    """What processes said of things that must not happen, and of errors that nobody expected."""
    members = [*cluster.of("publisher"), *cluster.of("reader")]
    return [
        f"{member.name}: {line}"
        for member in members
        for path in cluster.files(member.name)
        for line in counters.said(path)
    ]
