"""What a shard is told and what it answers. Typed, frozen in spirit, without sockets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwater.types import Segment, TableSpec
from headwater.wire.messages import Commit, Members, Ready, Slot, StepBody

# ---- events --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Created:
    """A table begins; ``values`` is its memory on this shard, all zero."""

    table: int
    spec: TableSpec
    segments: tuple[Segment, ...]
    values: torch.Tensor
    alone: bool  # no other shard holds a part of the table
    versions: memoryview | None = None  # uint64 per BLOCK bytes: odd while the block is being written


@dataclass(slots=True)
class Opened:
    session: int
    rank: int


@dataclass(slots=True)
class Closed:
    session: int


@dataclass(slots=True)
class Attached:
    """A session will use a table. ``gradients``: the client's shared memory, if it shares any."""

    session: int
    table: int
    gradients: torch.Tensor | None


@dataclass(slots=True)
class Push:
    """Gradient bytes ``start:start+length`` of the shard's memory; ``gradient[0]`` is byte ``base``."""

    session: int
    seq: int
    epoch: int
    members: int
    table: int
    clock: int
    start: int
    length: int
    flags: int
    gradient: torch.Tensor | None
    base: int
    body: StepBody | None


@dataclass(slots=True)
class Pull:
    session: int
    request: int
    table: int
    clock: int
    start: int
    length: int


@dataclass(slots=True)
class Assign:
    """Overwrite values; ``data`` is uint8."""

    session: int
    request: int
    table: int
    start: int
    data: torch.Tensor
    last: bool


@dataclass(slots=True)
class AssignSlots:
    session: int
    request: int
    table: int
    slots: tuple[Slot, ...]
    reset: bool


Rare = Created | Opened | Closed | Attached | Assign | AssignSlots | Commit | Members
Event = Push | Pull | Rare

# ---- instructions ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Ack:
    """A push up to ``seq`` (or an assignment) is applied; with ``step`` it ended the worker's step."""

    session: int
    seq: int
    table: int
    clock: int
    lsn: int
    staleness: int = 0
    step: bool = False
    skipped: bool = False
    norm: float | None = None


@dataclass(slots=True)
class Send:
    """Answer a pull: bytes ``start:start+length`` of the values as they are at ``lsn``."""

    session: int
    request: int
    table: int
    clock: int
    lsn: int
    staleness: int
    start: int
    length: int


@dataclass(slots=True)
class Fail:
    """A typed refusal of a push or pull; the session goes on unless ``fatal``."""

    session: int
    seq: int
    table: int
    clock: int
    code: str
    message: str


Instruction = Ack | Send | Fail | Ready
