"""The log of a shard: what changes its state, in the one order that all its replicas share.

A primary proposes a record, every follower accepts it, then each replica applies it: the same record gives the
same bits everywhere (``replica.py``). Bodies travel as msgpack, gradient bytes beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from headwater.server.tables.base import Contribution, Ranges
from headwater.types import Hyper, TableSpec, read_spec
from headwater.wire.messages import Commit, Members, Slot, decoded

Groups = tuple[dict[str, Hyper], ...]


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """A table begins, filled by its initialisers or from the snapshot in the folder ``restore``."""

    table: int
    spec: TableSpec
    restore: str = ""


class Drop(msgspec.Struct, frozen=True, tag="forget"):
    """A table that another shard could not hold ends."""

    table: int


class Seat(msgspec.Struct, frozen=True, tag="seat"):
    """A worker's session is opened, or opened again: see ``messages.Open``."""

    session: int
    rank: int
    members: int


class Contributor(msgspec.Struct, frozen=True):
    """A worker's part in a bulk step. ``seq``: its last push in it; ``wants``: fresh values after the commit."""

    rank: int
    session: int
    seq: int
    wants: bool


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """All contributions of a bulk step, aggregated. Nothing changes before its commit.

    ``writes``: so many of the last assignments (``Values``) are the step's: it starts from them.
    ``commit``: the verdict comes with it, where no other shard has a say.
    """

    table: int
    clock: int
    members: int
    skip: bool
    squares: tuple[float, ...]
    ranges: Ranges
    groups: Groups | None
    parts: tuple[Contributor, ...]
    commit: Commit | None = None
    writes: int = 0


class Update(msgspec.Struct, frozen=True, tag="update"):
    """A gradient under ``Stale`` or ``Async``. ``end``: it ends the worker's step."""

    table: int
    session: int
    rank: int
    seq: int
    clock: int
    ranges: Ranges
    end: bool
    want: bool
    skip: bool
    scale: float | None
    norm: float | None
    groups: Groups | None


class Values(msgspec.Struct, frozen=True, tag="values"):
    """A client's assignment of bytes ``start:start+length``.

    With ``clock`` it is part of that bulk step, under ``members``: it changes values when the step is committed.
    """

    table: int
    session: int
    seq: int
    start: int
    length: int
    last: bool
    clock: int = 0
    members: int = 0


class SetSlots(msgspec.Struct, frozen=True, tag="set_slots"):
    """A client's assignment of optimizer state."""

    table: int
    session: int
    request: int
    slots: tuple[Slot, ...]
    reset: bool


class TablePaused(msgspec.Struct, frozen=True, tag="table_paused"):
    """Others' reads and steps do without this session's worker (``paused``), or wait for it again."""

    table: int
    session: int
    request: int
    paused: bool


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """A version's moment: each replica keeps what these tables hold now."""

    version: int
    tables: tuple[int, ...]


Body = Begin | Drop | Seat | Members | Prepare | Commit | Update | Values | SetSlots | TablePaused | Publish

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(Body, dec_hook=read_spec)


@dataclass(slots=True)
class Record:
    """One entry of the log.

    ``gradient``: uint8, 1-D, byte 0 of it is shard-local byte ``base``; ``None`` where a body says it all.
    ``contributions`` and ``divide``: at a primary without followers, where no aggregate is made. ``lasting``: nobody
    writes into the gradient's memory any more.
    """

    lsn: int
    body: Body
    gradient: torch.Tensor | None = None
    base: int = 0
    contributions: list[Contribution] | None = None
    divide: int = 1
    lasting: bool = False

    def sources(self, ranges: Ranges) -> list[Contribution]:
        """The gradient as the kernels take it."""
        if self.contributions is not None:
            return self.contributions
        if self.gradient is None or not ranges:
            return []
        return [Contribution(self.gradient, ranges, self.base)]


def pack(body: Body) -> bytes:
    return _encoder.encode(body)


def unpack(data: bytes) -> Body:
    """Raises ``ProtocolError``."""
    return decoded(_decoder, data, "record")


def spans(body: Body) -> Ranges:
    """The shard-local bytes whose gradient or values travel beside the body."""
    match body:
        case Prepare() | Update():
            return body.ranges
        case Values():
            return ((body.start, body.start + body.length),) if body.length else ()
        case _:
            return ()
