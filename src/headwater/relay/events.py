"""What a relay and its line to where its versions come from say to each other, and what there is to tell a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from headwater.errors import HeadwaterError
from headwater.readers.fetch import Got
from headwater.transports.buffers import Buffer
from headwater.types import VersionInfo
from headwater.wire import versions as v

PartKey = tuple[int, int]
"""(shard, table)"""


def same(a: VersionInfo, b: VersionInfo) -> bool:
    """Whether two are one version. A new cluster at an old address counts from 1 again: the number does not say it."""
    return (a.model, a.number, a.name, a.time, a.digest) == (b.model, b.number, b.name, b.time, b.digest)


class Base(NamedTuple):
    """A version that is here, to apply a delta to. ``loans``: while they are there its memory is not used again."""

    number: int
    buffers: Mapping[PartKey, Buffer]
    loans: tuple[memoryview, ...]


class Job(NamedTuple):
    """A version to be fetched, for the ``attempt``-th time (from 0)."""

    info: VersionInfo
    bases: tuple[Base, ...]
    attempt: int


# ---- from the other side -----------------------------------------------------------------------------


class Listed(NamedTuple):
    """The other side has said what there is."""

    versions: v.VersionList


class Silent(NamedTuple):
    """The other side does not answer."""

    why: str


class Fetched(NamedTuple):
    """A version is here. Its lease on the other side stands. ``nbytes`` came, in so many ``seconds``."""

    job: Job
    leased: v.Leased
    parts: Mapping[PartKey, Got]
    base: int
    nbytes: int
    seconds: float


class Failed(NamedTuple):
    """A version did not come. Nothing is leased for it."""

    job: Job
    error: HeadwaterError


Event = Listed | Silent | Fetched | Failed


# ---- for people --------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """A version is served from now on. ``way``: it came as ``whole``, ``delta`` or ``mixed``."""

    info: VersionInfo
    nbytes: int
    way: str
    seconds: float


class Trouble(NamedTuple):
    """Something goes wrong; what is true now."""

    text: str


class Back(NamedTuple):
    """The other side answers again, after so many seconds."""

    seconds: float


News = Taken | Trouble | Back
