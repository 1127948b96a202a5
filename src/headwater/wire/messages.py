"""Control messages: what travels in a frame's body, as msgpack of typed structs. No pickle, no code.

A REQUEST is answered by one REPLY or ERROR with the same ``seq``; a NOTICE is not answered.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from headwater.errors import HeadwaterError, ProtocolError, from_code
from headwater.types import Claim, Hyper, TableSpec, read_spec
from headwater.wire.data_plan import Late as Late
from headwater.wire.data_plan import Pause as Pause
from headwater.wire.data_plan import Paused as Paused
from headwater.wire.data_plan import PauseTable as PauseTable
from headwater.wire.data_plan import PlanChunk as PlanChunk
from headwater.wire.data_plan import PlanNext as PlanNext
from headwater.wire.data_plan import WhoIsLate as WhoIsLate
from headwater.wire.statuses import ClusterStatus as ClusterStatus
from headwater.wire.statuses import ModelStatus as ModelStatus
from headwater.wire.statuses import RelayStatus as RelayStatus
from headwater.wire.statuses import ServerStatus as ServerStatus
from headwater.wire.statuses import ShardStatus as ShardStatus
from headwater.wire.statuses import TableStatus as TableStatus
from headwater.wire.statuses import WorkerStatus as WorkerStatus
from headwater.wire.versions import VersionNotice, VersionReply, VersionRequest

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


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Apply a bulk step. ``scale`` is the global clip factor, if it clips."""

    table: int
    clock: int
    members: int
    skip: bool
    norm: float | None = None
    scale: float | None = None


class Hosted(msgspec.Struct, frozen=True):
    """A replica on a server. ``commits``: the last bulk step of each table that it applied."""

    shard: int
    epoch: int
    role: str  # primary, backup or learner
    lsn: int
    commits: tuple[Commit, ...] = ()


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Become a member. ``session`` is the random incarnation that the process drew at its start.

    ``resume``: it was a member before its connection broke or the coordinator restarted. A server then says in
    ``hosted`` what it holds; ``replayed``: from its disk, as a new process. ``run``: what the workers of one run have
    in common, those that are started again included; "": the run of the workers that are there.
    """

    role: str
    session: int
    host: str = ""
    pid: int = 0
    rank: int | None = None
    world: int | None = None
    address: str = ""  # servers: where clients reach them over TCP
    local: str = ""  # servers: where clients of the same host reach them
    resume: bool = False
    server: int = -1  # servers that resume: the number they were given
    hosted: tuple[Hosted, ...] = ()
    replayed: bool = False
    run: str = ""
    node: str = ""  # the machine's name, for messages


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    pass


class Declare(msgspec.Struct, frozen=True, tag="declare"):
    """``claim``: "any": made on first use, else what there is; "new": made by this run, which a worker that has
    finished with the table is past; "resume": what there is, whoever made it, with hyperparameters of one's own.
    """

    spec: TableSpec
    claim: Claim = "any"


class Initialised(msgspec.Struct, frozen=True, tag="initialised"):
    table: int


class Barrier(msgspec.Struct, frozen=True, tag="barrier"):
    """``turn``: how often this worker has waited at this name, from 1, so that asking again is harmless.

    ``value``: what it has to say to the others, at most ``MAX_VALUE`` bytes; if anybody has, ``Met`` is the answer.
    """

    name: str
    turn: int
    value: bytes = b""


class Find(msgspec.Struct, frozen=True, tag="find"):
    """Who serves this shard now? Answered by its ``ShardView``."""

    shard: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Move every shard off a server. Answered by ``Done`` when nothing is left on it."""

    server: int


class TakeSnapshot(msgspec.Struct, frozen=True, tag="take_snapshot"):
    """Write a snapshot now. Answered by ``SnapshotTaken`` when it is durable."""


class Status(msgspec.Struct, frozen=True, tag="status"):
    pass


# ---- coordinator -> client --------------------------------------------------------------------


class ShardView(msgspec.Struct, frozen=True, tag="shard_view"):
    """Who serves a shard, and under which epoch. While nobody does, ``address`` is empty."""

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
    members: int = 0  # the membership epoch
    durable: bool = False  # the coordinator comes back after a crash
    relay: bool = False  # versions come here from elsewhere


class Declared(msgspec.Struct, frozen=True, tag="declared"):
    table: int
    spec: TableSpec
    assign: bool  # this client must assign the values that no initialiser gives
    members: int  # the membership epoch


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


MAX_VALUE = 64 << 10
"""Bytes of a ``Barrier``'s value."""


class Met(msgspec.Struct, frozen=True, tag="met"):
    """A barrier is over. ``values``: by rank, what each worker had to say."""

    values: tuple[tuple[int, bytes], ...]


class SnapshotTaken(msgspec.Struct, frozen=True, tag="snapshot_taken"):
    """``pause``: the longest that a shard did nothing else for it, in seconds."""

    path: str
    nbytes: int
    seconds: float
    pause: float = 0.0


# ---- coordinator <-> server -------------------------------------------------------------------


class Endpoint(msgspec.Struct, frozen=True):
    """A server, where it listens, and its incarnation: who says to be it must know that."""

    server: int
    address: str
    local: str
    host: str
    session: int = 0


class View(msgspec.Struct, frozen=True, tag="view"):
    """Who holds a shard. Durable at the coordinator before anybody hears of it.

    ``backups`` are in sync: what is acknowledged, they have. ``learners`` are being brought up to date.
    """

    shard: int
    epoch: int
    primary: Endpoint | None
    backups: tuple[Endpoint, ...] = ()
    learners: tuple[Endpoint, ...] = ()


class Welcome(msgspec.Struct, frozen=True, tag="serve"):
    """Coordinator to a server that joined: its number, and the rules of the cluster."""

    server: int
    shards: int
    replicas: int
    min_copies: int
    ack: str  # memory or disk
    heartbeat: float
    durable: bool = False  # the coordinator comes back after a crash: wait for it


class Synced(msgspec.Struct, frozen=True, tag="synced"):
    """Primary to coordinator: this learner has everything; make it a backup."""

    shard: int
    epoch: int
    server: int
    lsn: int


class Suspect(msgspec.Struct, frozen=True, tag="suspect"):
    """Primary to coordinator: this backup or learner does not answer; go on without it."""

    shard: int
    epoch: int
    server: int
    why: str


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """Backup or learner to primary: send me what comes after ``lsn``.

    ``reign``: the epoch in which the primary began whose log it has followed so far, or its own. ``tail``: the last
    record that it knows and has not applied, if it was that primary.
    """

    shard: int
    epoch: int
    server: int
    lsn: int
    reign: int = 0
    tail: int = 0
    host: str = ""  # where memory can be shared with it; empty: nowhere
    session: int = 0  # the incarnation of the server


class Lend(msgspec.Struct, frozen=True, tag="lend"):
    """Primary to follower on the same host: records of this table may lie in the memory whose descriptor is beside."""

    table: int
    index: int
    size: int


class Following(msgspec.Struct, frozen=True, tag="following"):
    """``whole``: the state comes first, forget yours; else the records after ``lsn``.

    ``since``: the epoch in which the primary became it, and its log began to be the shard's.
    """

    epoch: int
    lsn: int
    whole: bool
    since: int = 0


class Cut(msgspec.Struct, frozen=True, tag="cut"):
    """Take part in a snapshot: of each table (number, clock) right after that bulk step, of others now.

    ``prepare``: it is to come; make memory ready for the copy and say so. Without ``folder``: it was given up.
    """

    snapshot: int
    shard: int
    folder: str
    clocks: tuple[tuple[int, int], ...]
    prepare: bool = False


class CutDone(msgspec.Struct, frozen=True, tag="cut_done"):
    """A shard's part of a snapshot is written and synced, or ``error`` says why not.

    ``prepared``: not yet; the shard is ready for its ``Cut``.
    """

    snapshot: int
    shard: int
    file: str = ""
    nbytes: int = 0
    sha256: str = ""
    lsn: int = 0
    clocks: tuple[tuple[int, int], ...] = ()
    pause: float = 0.0  # seconds in which the shard did nothing else
    error: str = ""
    prepared: bool = False


class Create(msgspec.Struct, frozen=True, tag="create"):
    """``restore``: the folder of the snapshot that fills it, where the server can read it."""

    table: int
    spec: TableSpec
    restore: str = ""


class Created(msgspec.Struct, frozen=True, tag="created"):
    table: int
    nbytes: int


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """Another server refused this table: give its memory back."""

    table: int


class Members(msgspec.Struct, frozen=True, tag="members"):
    """The workers that a step needs. ``lost`` is the last epoch that a death began.

    ``sessions``: those of the workers that are there; one that was opened under this epoch or an earlier one
    and is not among them has ended.
    """

    epoch: int
    ranks: tuple[int, ...]
    lost: int
    reason: str = ""
    sessions: tuple[int, ...] = ()


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A shard has every contribution of a bulk step. ``squares`` is the exact expansion of its part of the norm²."""

    table: int
    shard: int
    clock: int
    members: int
    squares: tuple[float, ...]
    skip: bool


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """What ``headwater status`` shows of a server, a worker or a reader; each leaves out what only the others have."""

    clock: int = 0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    staleness: int = 0
    nbytes: int = 0
    sessions: int = 0
    tables: tuple[tuple[int, int], ...] = ()  # (table, clock; of a worker: the step that it has come to)
    shards: tuple[tuple[int, int, int], ...] = ()  # (shard, LSN, lag) of those it is the primary of
    server: int = -1  # servers, whose heartbeats have a connection of their own,
    session: int = 0  # and the incarnation that proves whose they are
    refused: tuple[tuple[int, int], ...] = ()  # (a client's session, its pushes that this server has refused)


# ---- client -> server ---------------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Begin or resume a session on a shard. ``members``: the membership epoch that the client knows."""

    session: int
    rank: int  # -1: a reader, it contributes to no step
    shard: int
    members: int = 0


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """``lsn``: of the shard."""

    epoch: int
    lsn: int


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Use a table. With shared memory, the descriptor of the client's gradients travels beside this frame."""

    table: int
    shared: bool
    size: int = 0  # bytes of the gradient memory: the table's address space
    base: int = 1  # the first push that is not acknowledged, or the next; those before are done with, or given up


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """With shared memory, the descriptors of values and block versions travel beside this frame."""

    lsn: int
    clock: int
    size: int = 0
    seq: int = 0  # the last push of this session to the table that was applied
    members: int = 0  # the membership epoch that the shard has heard of


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
    """PUSH: hyperparameters that changed, and the clip factor that the worker computed (not under Bulk).

    ``digest``, if it changed: of what the worker keeps beside the table and every worker should have alike. ``based``:
    how many means of the step went, changed, into what the worker contributes now.
    """

    groups: tuple[dict[str, Hyper], ...] | None = None
    scale: float | None = None
    norm: float | None = None
    digest: int | None = None
    based: int = 0


class AckBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """ACK of a step of which there is more to say than that it was applied.

    ``norm``: of the gradient, if the table clips. ``groups``: the hyperparameters that the step was taken with, where
    this worker said others. ``skipped_by``: the ranks for whose sake it was skipped. ``alike``: the other ranks that
    contributed the same bits on this shard, and ``mark``, a hash of them, while the shard looks (the first steps).
    ``apart``: the workers' digests differ. ``differ``: they changed the mean of their gradients in different ways, and
    the lowest rank's way counted.
    """

    norm: float | None = None
    groups: tuple[dict[str, Hyper], ...] | None = None
    skipped_by: tuple[int, ...] = ()
    alike: tuple[int, ...] = ()
    mark: int = 0
    apart: bool = False
    differ: bool = False


class MeanBody(msgspec.Struct, frozen=True):
    """The first DATA with MEAN: the shard-local ranges that some worker has contributed to; zeros elsewhere."""

    ranges: tuple[tuple[int, int], ...]


class ErrorBody(msgspec.Struct, frozen=True):
    code: str
    message: str


Request = (
    Join
    | Leave
    | Declare
    | Initialised
    | Barrier
    | Status
    | Find
    | Drain
    | TakeSnapshot
    | Create
    | Open
    | Attach
    | Slots
    | SlotPart
    | Follow
    | Lend
    | PlanNext
    | Pause
    | PauseTable
    | WhoIsLate
    | VersionRequest
)
Reply = (
    Joined
    | Welcome
    | Declared
    | Done
    | Met
    | ClusterStatus
    | ShardView
    | SnapshotTaken
    | Created
    | Opened
    | Attached
    | SlotPart
    | Following
    | PlanChunk
    | Paused
    | Late
    | VersionReply
)
Notice = Members | Ready | Commit | Heartbeat | Drop | View | Synced | Suspect | Cut | CutDone | VersionNotice

_encoder = msgspec.msgpack.Encoder()
_request = msgspec.msgpack.Decoder(Request, dec_hook=read_spec)
_reply = msgspec.msgpack.Decoder(Reply, dec_hook=read_spec)
_notice = msgspec.msgpack.Decoder(Notice, dec_hook=read_spec)


def pack(message: msgspec.Struct) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


T = TypeVar("T")


def unpack(data: bytes, kind: type[T]) -> T:
    """A message of one known type. Raises ``ProtocolError`` for anything else."""
    return decoded(msgspec.msgpack.Decoder(kind, dec_hook=read_spec), data, kind.__name__)


def unpack_request(data: bytes) -> Request:
    found: Request = decoded(_request, data, "request")
    return found


def unpack_reply(data: bytes) -> Reply:
    found: Reply = decoded(_reply, data, "reply")
    return found


def unpack_notice(data: bytes) -> Notice:
    found: Notice = decoded(_notice, data, "notice")
    return found


def decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    """What ``decoder`` reads. Raises ``ProtocolError`` that names ``what`` it should have been."""
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
