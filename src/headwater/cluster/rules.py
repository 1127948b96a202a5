"""What a cluster was started with, and whether that can be kept."""

from __future__ import annotations

import msgspec

from headwater.cluster.fleet import SILENCE
from headwater.cluster.membership import HEARTBEAT
from headwater.errors import UsageError


class Rules(msgspec.Struct, frozen=True):
    """What a cluster was started with. Times in seconds.

    ``shards``: 0 for as many as servers. ``silence``, ``worker_silence``: without a heartbeat, until a server or worker
    counts as dead. ``grace``: in which a worker whose connection broke may come back. ``heartbeat``: between two.
    ``durable``: the coordinator comes back after a crash.
    """

    servers: int = 1
    shards: int = 0  # 0: as many as servers
    replicas: int = 1
    min_copies: int = 1
    ack: str = "memory"
    silence: float = SILENCE
    worker_silence: float = 10.0
    grace: float = 0.0
    heartbeat: float = HEARTBEAT
    durable: bool = False
    snapshots: bool = False  # there is a folder for them
    snapshot_every: float = 0.0


def check(rules: Rules) -> Rules:
    """The rules, or ``UsageError`` for those that cannot be kept."""
    if not 1 <= rules.min_copies <= rules.replicas:
        raise UsageError(f"min_copies={rules.min_copies} is not between 1 and the {rules.replicas} replicas")
    if rules.ack not in ("memory", "disk"):
        raise UsageError(f"ack={rules.ack!r} is neither 'memory' nor 'disk'")
    if rules.silence < 2 * rules.heartbeat and rules.silence != SILENCE:
        raise UsageError(f"silence={rules.silence} s is less than two heartbeats of {rules.heartbeat} s")
    return rules


def shape(rules: Rules) -> tuple[int, int, int, int]:
    """What a restarted coordinator must not change."""
    return rules.servers, rules.shards, rules.replicas, rules.min_copies
