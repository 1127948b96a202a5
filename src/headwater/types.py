"""Frozen value types shared by every room. Light to import: no torch, no sockets."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from typing import ClassVar, Literal, NamedTuple, TypeVar

import msgspec

ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element of every dtype a dense table may hold."""

Reduce = Literal["mean", "sum", "lowest"]
NonFinite = Literal["error", "skip", "allow"]

Hyper = bool | int | float | str | None | tuple[float, ...]
"""One hyperparameter of an optimizer group, as it travels (``betas`` is a tuple of floats)."""


class Init(msgspec.Struct, frozen=True):
    """How a server fills a parameter before the first push.

    The value of an element depends on (seed, parameter name, element index) only, so the same table
    is bit-identical on any number of servers.

    ``kind`` is one of ``zeros``, ``ones``, ``constant(a)``, ``normal(mean=a, std=b)``,
    ``truncated_normal(mean=a, std=b)`` (cut at two standard deviations), ``uniform(low=a, high=b)``,
    ``xavier_uniform(gain=a)``, ``xavier_normal(gain=a)``, ``kaiming_uniform(a=a)``,
    ``kaiming_normal(a=a)`` or ``values`` (a client assigns them).
    """

    kind: Literal[
        "zeros",
        "ones",
        "constant",
        "normal",
        "truncated_normal",
        "uniform",
        "xavier_uniform",
        "xavier_normal",
        "kaiming_uniform",
        "kaiming_normal",
        "values",
    ]
    a: float = 0.0
    b: float = 0.0


class Policy(msgspec.Struct, frozen=True):
    """How the workers of a table keep in step: what every synchronisation policy answers.

    Nobody else asks *which* policy it is. A further one is a subclass with its traits, in ``Sync`` below.
    """

    collective: ClassVar[bool] = False
    """All workers take a step together (Valiant 1990): it is applied when each has contributed, on all shards or on
    none, and the table has one clock. Otherwise each worker's step is applied by itself, and each has its clock."""

    reads_own_memory: ClassVar[bool] = True
    """A worker computes on values of its own, which a pull refreshes. Otherwise the servers' memory does not change
    while a worker computes, so that on one host its parameters *are* that memory."""

    @property
    def combined(self) -> Reduce:
        """What the contributions to a collective step become."""
        return "sum"

    @property
    def read_bound(self) -> int | None:
        """A worker at clock c reads only once every other has reached c minus this (Ho et al. 2013); None: at once."""
        return None

    @property
    def staleness_cap(self) -> int | None:
        """How many steps of others may be applied between a worker's read and its push; None: any number."""
        return None

    @property
    def immediate(self) -> bool:
        """A push is applied when it arrives, whatever other workers do."""
        return not self.collective and self.staleness_cap is None

    @property
    def paced(self) -> bool:
        """Workers take their own steps, but one's read or step may have to wait for another's next step."""
        return self.read_bound is not None or self.staleness_cap is not None


class Bulk(Policy, frozen=True, tag="bulk"):
    """Bulk-synchronous (Valiant 1990): a step is applied when every worker has contributed to it.

    ``reduce`` says what the contributions become, summed in rank order first: ``"mean"`` divides the
    sum by their number, as DistributedDataParallel does; ``"sum"`` leaves it. ``"lowest"``: that of the
    lowest rank is all that counts.
    """

    collective: ClassVar[bool] = True
    reads_own_memory: ClassVar[bool] = False

    reduce: Reduce = "mean"

    @property
    def combined(self) -> Reduce:
        return self.reduce


class Stale(Policy, frozen=True, tag="stale"):
    """Stale-synchronous (Ho et al. 2013): a worker at clock c reads only once every worker has reached c - bound."""

    bound: int = 1

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise ValueError(f"Stale(bound={self.bound}): the bound is a number of steps, 0 or more")

    @property
    def read_bound(self) -> int:
        return self.bound


class Async(Policy, frozen=True, tag="async"):
    """Asynchronous: a push is applied on arrival.

    ``max_staleness`` caps how many steps of others may be applied between a worker's read and its push:
    a step that would exceed it for a worker that still computes waits until that worker has pushed
    (back-pressure). Steps that wait together may come out up to world - 1 steps staler.
    """

    max_staleness: int | None = None

    def __post_init__(self) -> None:
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"Async(max_staleness={self.max_staleness}): the cap is a number of steps, 0 or more")

    @property
    def staleness_cap(self) -> int | None:
        return self.max_staleness


Sync = Bulk | Stale | Async
"""The synchronisation policies, as they travel."""


class ParameterSpec(msgspec.Struct, frozen=True):
    """One tensor of a dense table. ``group`` indexes ``OptimizerSpec.groups``."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    group: int = 0
    init: Init = Init("zeros")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


class OptimizerSpec(msgspec.Struct, frozen=True):
    """A server-side optimizer: its name in the closed list and the hyperparameters of each group."""

    name: str
    groups: tuple[dict[str, Hyper], ...]


Claim = Literal["any", "new", "resume"]
"""Which table a client means by a name: whatever there is, one that its run makes, one that is there already."""


class TableSpec:
    """What every party must agree on before the first push to a table, whatever its kind.

    A kind of table is a frozen msgspec struct below this class, with ``kind`` as its tag field, under ``@table_kind``.
    A message that holds a spec says ``TableSpec``; its decoder has ``read_spec`` as its hook.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def optimizer(self) -> OptimizerSpec:
        raise NotImplementedError

    @property
    def sync(self) -> Sync:
        raise NotImplementedError

    @property
    def max_grad_norm(self) -> float | None:
        raise NotImplementedError

    @property
    def nonfinite(self) -> NonFinite:
        raise NotImplementedError

    @property
    def given(self) -> tuple[str, ...]:
        """What a client has to assign before the table has values; empty if the servers fill all of it."""
        return ()

    @property
    def parts(self) -> tuple[int, int, int]:
        """How many parameters, elements and bytes of values it begins with."""
        return 0, 0, 0

    def resumed(self) -> TableSpec:
        """This without what may differ where a table is gone on with: how it was filled, and hyperparameters."""
        raise NotImplementedError

    def difference(self, other: TableSpec) -> str:
        """What ``other`` has in its stead, in words; empty if the two agree."""
        if type(self) is not type(other):
            return f"{type(self).__name__} instead of {type(other).__name__}"
        for name in self.__struct_fields__:  # type: ignore[attr-defined]  # of the kind, which is a struct
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} instead of {theirs!r}"
        return ""


K = TypeVar("K", bound=TableSpec)
KindRoom = Literal["layout", "server", "client"]
KINDS: dict[str, type[TableSpec]] = {}
"""The kinds of table, by what the wire calls them."""


def table_kind(kind: type[K]) -> type[K]:
    """A class decorator: from here on messages and stored state may hold specs of this kind."""
    KINDS[kind.__struct_config__.tag] = kind  # type: ignore[attr-defined]
    return kind


def load_kind(name: str, room: KindRoom) -> None:
    """Let a package that was installed beside Headwater register its part of a kind of table, if there is one.

    An entry point ``NAME = PACKAGE`` of the group ``headwater.kinds`` says that ``PACKAGE.layout`` has the spec and its
    geometry, ``PACKAGE.server`` the store and ``PACKAGE.client`` the client's table. They are apart because a
    coordinator, which needs the first, loads no torch. Raises ``ValueError`` if it cannot be imported.
    """
    package = _kind_packages().get(name)
    if package is None:
        return
    try:
        import_module(f"{package}.{room}")
    except ImportError as error:
        raise ValueError(f"a table of kind {name!r}, whose {package}.{room} cannot be imported: {error}") from error


@cache
def _kind_packages() -> dict[str, str]:
    from importlib import metadata  # takes long, and most never come here

    return {point.name: point.value for point in metadata.entry_points(group="headwater.kinds")}


def read_spec(wanted: type, found: object) -> object:
    """The ``dec_hook`` of every msgspec decoder of something that holds a ``TableSpec``.

    A union of all kinds would do, if msgspec did not fix what a union means at a message's first use.
    """
    if wanted is not TableSpec:
        raise NotImplementedError(f"nothing reads {wanted.__name__}")
    name = found.get("kind") if isinstance(found, dict) else None
    if isinstance(name, str) and name not in KINDS:
        load_kind(name, "layout")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"a table of kind {name!r}; this Headwater knows {', '.join(map(repr, KINDS))}")
    return msgspec.convert(found, KINDS[name])


@table_kind
class DenseSpec(TableSpec, msgspec.Struct, frozen=True, tag_field="kind", tag="dense"):
    """A dense table: parameters that are tensors, every element of which has a place from the beginning."""

    name: str
    parameters: tuple[ParameterSpec, ...]
    optimizer: OptimizerSpec
    sync: Sync = Async()
    max_grad_norm: float | None = None
    nonfinite: NonFinite = "error"
    seed: int = 0

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters if p.init.kind == "values")

    @property
    def parts(self) -> tuple[int, int, int]:
        return len(self.parameters), sum(p.numel for p in self.parameters), sum(p.nbytes for p in self.parameters)

    def resumed(self) -> DenseSpec:
        parameters = tuple(msgspec.structs.replace(p, init=Init("zeros")) for p in self.parameters)
        optimizer = msgspec.structs.replace(self.optimizer, groups=tuple({} for _ in self.optimizer.groups))
        return msgspec.structs.replace(self, parameters=parameters, optimizer=optimizer, seed=0)

    def difference(self, other: TableSpec) -> str:
        if not isinstance(other, DenseSpec):
            return super().difference(other)
        if len(self.parameters) != len(other.parameters):
            return f"{len(self.parameters)} parameters instead of {len(other.parameters)}"
        for a, b in zip(self.parameters, other.parameters, strict=True):
            if a != b:
                return f"parameter {msgspec.to_builtins(a)} instead of {msgspec.to_builtins(b)}"
        return super().difference(other)


class Span(NamedTuple):
    """Bytes ``start:stop`` of a part that hold words of ``word`` (2 or 4) bytes.

    ``start`` is a multiple of 8 and ``stop`` lies a whole number of words behind it.
    """

    start: int
    stop: int
    word: int


class Segment(msgspec.Struct, frozen=True):
    """The part of one parameter that lies in one block of one shard.

    Elements ``start:stop`` of the flattened parameter, at byte ``offset`` of the shard's own memory.
    """

    parameter: int
    start: int
    stop: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class VersionInfo(msgspec.Struct, frozen=True):
    """A published version: an immutable, named state of a table set.

    ``model``: the table set, whose versions are numbered from 1. ``parent``: the number of the version before it, 0 for
    none. ``step``: what the publisher said, or the trainer's clock at the cut. ``time``: seconds since 1970.
    ``nbytes``: of all values. ``digest``: XXH3-64, in hexadecimal, of the checksums of all its blocks.
    """

    model: str
    number: int
    name: str
    parent: int
    step: int
    time: float
    tables: tuple[str, ...]
    nbytes: int
    digest: str
    metadata: dict[str, str] = {}
