"""What a shard is told (events) and what it answers (instructions): typed, without sockets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwater.errors import HeadwaterError
from headwater.types import TableSpec
from headwater.wire.messages import AckBody, Commit, Members, Ready, Slot, StepBody

if TYPE_CHECKING:
    from headwater.server.replication.records import Record

# ---- events --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Create:
    """The coordinator wants a table, filled from this snapshot if it names one."""

    table: int
    spec: TableSpec
    restore: str = ""


@dataclass(slots=True)
class Forget:
    """The coordinator wants a table gone: another server had no room for it."""

    table: int


@dataclass(slots=True)
class BeginVersion:
    """The coordinator wants these tables' state as it is now, as a part of a version."""

    version: int
    tables: tuple[int, ...]


@dataclass(slots=True)
class Opened:
    """A client's session begins, or goes on over a new connection (see ``messages.Open``)."""

    session: int
    rank: int
    members: int


@dataclass(slots=True)
class Closed:
    """The connection of a session ended. A worker's session goes on; a reader's ends."""

    session: int


@dataclass(slots=True)
class Attached:
    """A session will use a table. ``gradients``: the client's shared memory, if it shares any.

    ``base``: the number of the first push that is not acknowledged, or of the next one. ``shared``: it maps the values.
    """

    session: int
    table: int
    gradients: torch.Tensor | None
    base: int = 1
    request: int = 0
    shared: bool = False


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
    keys: bytes = b""


@dataclass(slots=True)
class AskMean:
    """A worker's contribution to step ``clock`` is there; it wants to see the aggregate before it ends the step.

    ``past``: what it has pushed is its gradient of the step before, which it looks at too late.
    """

    session: int
    seq: int
    members: int
    table: int
    clock: int
    past: bool = False


@dataclass(slots=True)
class Assign:
    """Overwrite values; ``data`` is uint8. With ``clock``: as a part of that bulk step, under ``members``."""

    session: int
    request: int
    table: int
    start: int
    data: torch.Tensor
    last: bool
    clock: int = 0
    members: int = 0


@dataclass(slots=True)
class AssignSlots:
    session: int
    request: int
    table: int
    slots: tuple[Slot, ...]
    reset: bool


@dataclass(slots=True)
class PauseTable:
    """A worker waits for others, or does not any more."""

    session: int
    request: int
    table: int
    paused: bool


Rare = (
    Create | Forget | BeginVersion | Opened | Closed | Attached | Assign | AssignSlots | PauseTable | Commit | Members
)
Event = Push | Pull | AskMean | Rare

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
    note: AckBody | None = None  # what else this worker is told of its step


@dataclass(slots=True)
class Send:
    """Answer a pull: bytes ``start:start+length`` of the values, or what ``keys`` name, as it is at ``lsn``."""

    session: int
    request: int
    table: int
    clock: int
    lsn: int
    staleness: int
    start: int
    length: int
    keys: bytes = b""


@dataclass(slots=True)
class SendMean:
    """Answer ``AskMean``: ``mean`` (uint8, laid out as the values) where ``ranges`` say that somebody contributed."""

    session: int
    seq: int
    table: int
    clock: int
    mean: torch.Tensor
    ranges: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Fail:
    """A typed refusal of a push or pull; the session goes on.

    ``push``: what is refused is a push that its worker is to mend, and counts as such in ``headwater status``.
    """

    session: int
    seq: int
    table: int
    clock: int
    code: str
    message: str
    push: bool = False


@dataclass(slots=True)
class Seated:
    """A session is open."""

    session: int


@dataclass(slots=True)
class Joined:
    """A session may use a table."""

    session: int
    request: int
    table: int
    shared: bool


@dataclass(slots=True)
class Done:
    """A request of a session is carried out, or refused."""

    session: int
    request: int
    error: HeadwaterError | None = None


@dataclass(slots=True)
class Created:
    """A table is there."""

    table: int
    nbytes: int


@dataclass(slots=True)
class Refused:
    """A table cannot begin here: its snapshot cannot be read."""

    table: int
    error: HeadwaterError


@dataclass(slots=True)
class Replicate:
    """Send a record to every follower."""

    record: Record


Instruction = Ack | Send | SendMean | Fail | Ready | Seated | Joined | Done | Created | Refused | Replicate
