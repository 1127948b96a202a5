"""What ``headwater status`` shows: the coordinator's answer to ``messages.Status``."""

from __future__ import annotations

import msgspec

from headwater.types import VersionInfo


class ServerStatus(msgspec.Struct, frozen=True):
    server: int
    address: str
    pid: int
    state: str  # alive, draining or dead
    primaries: tuple[int, ...]  # shards
    backups: tuple[int, ...]
    learners: tuple[int, ...]
    nbytes: int
    sessions: int
    pushed_bytes: int
    pulled_bytes: int
    uptime: float


class ShardStatus(msgspec.Struct, frozen=True):
    """``lag``: records that the slowest backup or learner has yet to accept. ``copies`` of ``wanted``."""

    shard: int
    epoch: int
    primary: int  # server, or -1: nobody serves it
    backups: tuple[int, ...]
    learners: tuple[int, ...]
    lsn: int
    lag: int
    copies: int
    wanted: int


class WorkerStatus(msgspec.Struct, frozen=True):
    rank: int
    role: str
    pid: int
    state: str
    clock: int
    pushed_bytes: int
    pulled_bytes: int
    staleness: int
    heard: float  # seconds since its last heartbeat
    refused: int = 0  # pushes, by all servers


class TableStatus(msgspec.Struct, frozen=True):
    name: str
    table: int
    parameters: int
    elements: int
    nbytes: int
    optimizer: str
    sync: str
    clock: int
    shards: tuple[int, ...]  # bytes per shard


class ModelStatus(msgspec.Struct, frozen=True):
    """The published versions of a model. ``newest``: that can be leased. ``nbytes``: that servers hold, all copies."""

    model: str
    newest: VersionInfo | None
    versions: int
    lost: int
    tags: tuple[str, ...]
    leases: int
    nbytes: int


class RelayStatus(msgspec.Struct, frozen=True):
    """``upstream``: where a relay's versions come from; ``silent``: for so many seconds, 0 while it answers; ``why``.
    ``nbytes``: of the versions that it holds; ``sent_bytes``: that readers had of them over connections.
    """

    upstream: str
    silent: float
    why: str
    nbytes: int
    sent_bytes: int


class ClusterStatus(msgspec.Struct, frozen=True, tag="cluster"):
    """What ``headwater status`` shows. Byte counters count since each process's start."""

    uptime: float
    membership: int
    replicas: int
    min_copies: int
    servers: tuple[ServerStatus, ...]
    shards: tuple[ShardStatus, ...]
    workers: tuple[WorkerStatus, ...]
    tables: tuple[TableStatus, ...]
    models: tuple[ModelStatus, ...] = ()
    relay: RelayStatus | None = None  # this is no cluster, but a relay
