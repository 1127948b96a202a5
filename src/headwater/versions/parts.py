"""A part of a version as its holder keeps it, and what the holder says of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from headwater.transports.buffers import Buffer
from headwater.types import Span
from headwater.versions.part_cut import PartCut
from headwater.wire import versions as v
from headwater.wire.outgoing import Asker, Instruction
from headwater.wire.sums import Sums

Encoded = bytes | memoryview
"""A delta."""


class Key(NamedTuple):
    """A part: of which version, shard and table."""

    number: int
    shard: int
    table: int


@dataclass(slots=True)
class Held:
    """A part. ``cut``: it is still being copied. ``deltas``: by the base's number; ``None``: not worth its time.

    ``tried``: the share of the part that they were allowed. ``waiting``: readers that wait for a delta, by its base.
    """

    buffer: Buffer
    spans: tuple[Span, ...]
    sums: Sums | None = None
    cut: PartCut | None = None
    deltas: dict[int, Encoded | None] = field(default_factory=dict)
    tried: dict[int, float] = field(default_factory=dict)
    waiting: dict[int, list[Asker]] = field(default_factory=dict)


@dataclass(slots=True)
class PartOutbox:
    """What a part store wants sent. Its owner empties the fields in this order; neither waits for the disk.

    1. ``reports``: for the coordinator. The first of a version, that it has begun, lets its publisher go on.
    2. ``frames``: for readers. The reply to a question comes before the pieces that it announces.
    """

    reports: list[v.PartDone] = field(default_factory=list)
    frames: list[Instruction] = field(default_factory=list)
