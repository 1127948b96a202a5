"""The state of a shard as it travels to a newcomer: what is in no record any more."""

from __future__ import annotations

import msgspec
import torch

from headwater.server.replication.records import Groups
from headwater.server.table import Table
from headwater.types import TableSpec, read_spec
from headwater.wire.messages import Commit, Members, decoded


class SessionState(msgspec.Struct, frozen=True):
    """A worker's session. ``done``: (table, last push applied)."""

    number: int
    rank: int
    members: int
    done: tuple[tuple[int, int], ...]


class ShardState(msgspec.Struct, frozen=True, tag="shard"):
    """First of all: who is there."""

    members: Members
    sessions: tuple[SessionState, ...]


class TableState(msgspec.Struct, frozen=True, tag="table"):
    """A table whose blocks follow."""

    table: int
    spec: TableSpec
    clock: int
    lost: int
    applied: int
    clocks: tuple[tuple[int, int], ...]  # (rank, clock)
    commit: Commit | None
    groups: Groups
    paused: tuple[tuple[int, int], ...] = ()  # (rank, session) that nobody waits for


class ChunkHead(msgspec.Struct, frozen=True, tag="chunk"):
    """Chunk ``start:stop`` of a table's state. Only its store reads ``body`` and the payload (``read_chunk``)."""

    table: int
    start: int
    stop: int
    body: bytes


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """That was all."""


State = ShardState | TableState | ChunkHead | Finished

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[State] = msgspec.msgpack.Decoder(State, dec_hook=read_spec)


def pack(body: State) -> bytes:
    return _encoder.encode(body)


def unpack(data: bytes) -> State:
    """Raises ``ProtocolError``."""
    return decoded(_decoder, data, "piece of state")


def table_state(table: Table) -> TableState:
    """What a newcomer must know of a table beside its blocks."""
    clocks = tuple(sorted(table.clocks.clock.items()))
    return TableState(
        table.number, table.spec, table.gathering.clock, table.gathering.lost, table.clocks.applied, clocks,
        table.last_commit, tuple(dict(group) for group in table.store.groups),
        tuple(sorted(table.clocks.paused.items())),
    )  # fmt: skip


def restore(table: Table, state: TableState) -> None:
    """The inverse of ``table_state``, on a table that was just made."""
    table.store.set_groups(state.groups)
    table.gathering.clock, table.gathering.lost = state.clock, state.lost
    table.clocks.applied = state.applied
    table.clocks.clock, table.clocks.paused = dict(state.clocks), dict(state.paused)
    table.clocks.read = dict.fromkeys(table.clocks.clock, state.applied)
    table.last_commit = state.commit


def view(tensor: torch.Tensor) -> memoryview:
    """A uint8 tensor's bytes."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
