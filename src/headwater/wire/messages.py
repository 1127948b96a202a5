"""Control messages: what travels in a frame's body, as msgpack of typed structs. No pickle, no code.

A REQUEST is answered by one REPLY or ERROR with the same ``seq``; a NOTICE is not answered.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from headwater.errors import HeadwaterError, ProtocolError, from_code
from headwater.types import Hyper, TableSpec

# ---- handshake (FORMAT.md, section 3) ------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True):
    nonce: bytes
    software: str


class Challenge(msgspec.Struct, frozen=True):
    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, frozen=True):
    proof: bytes


# ---- client or server -> coordinator ----------------------------------------------------------


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Become a member. ``session`` is the random incarnation that the process drew at its start."""

    role: str
    session: int
    host: str = ""
    pid: int = 0
    rank: int | None = None
    world: int | None = None
    address: str = ""  # servers: where clients reach them over TCP
    local: str = ""  # servers: where clients of the same host reach them


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    pass


class Declare(msgspec.Struct, frozen=True, tag="declare"):
    spec: TableSpec


class Initialised(msgspec.Struct, frozen=True, tag="initialised"):
    table: int


class Barrier(msgspec.Struct, frozen=True, tag="barrier"):
    name: str


class Status(msgspec.Struct, frozen=True, tag="status"):
    pass


# ---- coordinator -> client --------------------------------------------------------------------


class ShardView(msgspec.Struct, frozen=True):
    """Who serves a shard, and under which epoch."""

    shard: int
    epoch: int
    address: str
    local: str
    host: str


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    rank: int
    world: int
    heartbeat: float  # seconds between heartbeats
    views: tuple[ShardView, ...]


class Declared(msgspec.Struct, frozen=True, tag="declared"):
    table: int
    spec: TableSpec
    assign: bool  # this client must assign the values that no initialiser gives
    members: int  # the membership epoch


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class ServerStatus(msgspec.Struct, frozen=True):
    shard: int
    address: str
    pid: int
    state: str
    tables: int
    nbytes: int
    sessions: int
    epoch: int
    lsn: int
    pushed_bytes: int
    pulled_bytes: int
    uptime: float


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


class ClusterStatus(msgspec.Struct, frozen=True, tag="cluster"):
    """What ``headwater status`` shows. Byte counters count since each process's start."""

    uptime: float
    membership: int
    servers: tuple[ServerStatus, ...]
    workers: tuple[WorkerStatus, ...]
    tables: tuple[TableStatus, ...]


# ---- coordinator <-> server -------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="serve"):
    """Coordinator to a server that joined: the shard it serves."""

    shard: int
    shards: int
    epoch: int
    heartbeat: float


class Create(msgspec.Struct, frozen=True, tag="create"):
    table: int
    spec: TableSpec


class Created(msgspec.Struct, frozen=True, tag="created"):
    table: int
    nbytes: int


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """Another server refused this table: give its memory back."""

    table: int


class Members(msgspec.Struct, frozen=True, tag="members"):
    """The workers that a step needs. ``lost`` is the last epoch that a death began."""

    epoch: int
    ranks: tuple[int, ...]
    lost: int
    reason: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A shard has every contribution of a bulk step. ``squares`` is the exact expansion of its part of the norm²."""

    table: int
    shard: int
    clock: int
    members: int
    squares: tuple[float, ...]
    skip: bool


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Apply a bulk step. ``scale`` is the global clip factor, if it clips."""

    table: int
    clock: int
    members: int
    skip: bool
    norm: float | None = None
    scale: float | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    clock: int = 0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    staleness: int = 0
    lsn: int = 0
    nbytes: int = 0
    sessions: int = 0
    tables: tuple[tuple[int, int], ...] = ()  # (table, clock)


# ---- client -> server ---------------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Begin or resume a session on a shard."""

    session: int
    rank: int  # -1: a reader, it contributes to no step
    shard: int


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    seq: int  # the last push of this session that was applied


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Use a table. With shared memory, the descriptor of the client's gradients travels beside this frame."""

    table: int
    shared: bool
    size: int = 0  # bytes of the gradient memory: the table's address space


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """With shared memory, the descriptors of values and block versions travel beside this frame."""

    lsn: int
    clock: int
    size: int = 0


class Slots(msgspec.Struct, frozen=True, tag="slots"):
    """Ask for the optimizer state of a table on this shard."""

    table: int


class Slot(msgspec.Struct, frozen=True):
    parameter: int
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str
    data: bytes


class SlotPart(msgspec.Struct, frozen=True, tag="slot"):
    """A part of the answer to ``Slots`` (``more`` follow), or of an assignment of slots."""

    table: int
    slots: tuple[Slot, ...]
    more: bool
    reset: bool = False  # of an assignment: forget all state of this shard first


# ---- bodies of hot frames -------------------------------------------------------------------------


class StepBody(msgspec.Struct, frozen=True):
    """PUSH: hyperparameters that changed, and the clip factor that the worker computed (not under Bulk)."""

    groups: tuple[dict[str, Hyper], ...] | None = None
    scale: float | None = None
    norm: float | None = None


class AckBody(msgspec.Struct, frozen=True):
    """ACK of a step with a gradient norm."""

    norm: float


class ErrorBody(msgspec.Struct, frozen=True):
    code: str
    message: str


Request = Join | Leave | Declare | Initialised | Barrier | Status | Create | Open | Attach | Slots | SlotPart
Reply = Joined | Welcome | Declared | Done | ClusterStatus | Created | Opened | Attached | SlotPart
Notice = Members | Ready | Commit | Heartbeat | Drop

_encoder = msgspec.msgpack.Encoder()
_request = msgspec.msgpack.Decoder(Request)
_reply = msgspec.msgpack.Decoder(Reply)
_notice = msgspec.msgpack.Decoder(Notice)


def pack(message: msgspec.Struct) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


T = TypeVar("T")


def unpack(data: bytes, kind: type[T]) -> T:
    """A message of one known type. Raises ``ProtocolError`` for anything else."""
    return _checked(msgspec.msgpack.Decoder(kind), data, kind.__name__)


def unpack_request(data: bytes) -> Request:
    found: Request = _checked(_request, data, "request")
    return found


def unpack_reply(data: bytes) -> Reply:
    found: Reply = _checked(_reply, data, "reply")
    return found


def unpack_notice(data: bytes) -> Notice:
    found: Notice = _checked(_notice, data, "notice")
    return found


def _checked(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a {what} that cannot be read: {error}") from None


def error_body(error: HeadwaterError) -> bytes:
    return pack(ErrorBody(error.code, str(error)))


def read_error(data: bytes) -> HeadwaterError:
    """The exception that an ERROR frame carries."""
    body = unpack(data, ErrorBody)
    return from_code(body.code, body.message)
