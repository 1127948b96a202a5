"""A second kind of table: known by its tag on the wire and at rest, placed by its own geometry."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from headwater.cluster.tables import Tables
from headwater.errors import ProtocolError, TableConflict, UsageError
from headwater.layout import dense, kinds
from headwater.types import (
    KINDS,
    Async,
    DenseSpec,
    NonFinite,
    OptimizerSpec,
    ParameterSpec,
    Span,
    Sync,
    TableSpec,
    read_spec,
    table_kind,
)
from headwater.wire import messages as m
from tests.cluster.fake_peers import WORKER, FakePeers, spec

SUM = OptimizerSpec("Sum", ())


class Counters(TableSpec, msgspec.Struct, frozen=True, tag_field="kind", tag="counters"):
    """How often each key was counted: no parameters, and no size before the first push."""

    name: str
    width: int = 8
    optimizer: OptimizerSpec = SUM
    sync: Sync = Async()
    max_grad_norm: float | None = None
    nonfinite: NonFinite = "error"


class Everywhere(msgspec.Struct, frozen=True):
    """Each shard has the keys that hash to it."""

    participants: tuple[int, ...]
    sizes: tuple[int, ...]


def check(found: Counters) -> None:
    if found.width not in (4, 8):
        raise UsageError(f"counters of {found.width} bytes; nothing was declared")


@pytest.fixture(autouse=True)
def counters() -> Iterator[None]:
    """There are tables of this kind, and afterwards there are none."""
    table_kind(Counters)
    kinds.register(
        Counters,
        kinds.Geometry(
            check,
            lambda found, shards: Everywhere(tuple(range(shards)), (0,) * shards),
            lambda found, shards, shard, size: (Span(0, size, 4),),
        ),
    )
    yield
    del KINDS["counters"], kinds._GEOMETRIES[Counters]


@pytest.mark.parametrize("found", [Counters("c", 4), spec()])
def test_a_message_holds_a_spec_of_any_kind(found: TableSpec) -> None:
    assert m.unpack_request(m.pack(m.Declare(found))) == m.Declare(found)  # type: ignore[arg-type]
    assert m.unpack_reply(m.pack(m.Declared(1, found, False, 0))) == m.Declared(1, found, False, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "trees"}, "a table of kind 'trees'; this Headwater knows 'dense', 'counters'"),
        ({"kind": None}, "a table of kind None"),
        ({"kind": ["dense"]}, "a table of kind"),
        ({"width": "8"}, "Expected `int`, got `str` - at `$.width`"),
        ({"kind": "dense"}, "missing required field `parameters`"),
    ],
)
def test_another_spec_is_refused_with_a_reason(change: dict[str, object], says: str) -> None:
    raw = msgspec.to_builtins(m.Declare(Counters("c")))
    raw["spec"].update(change)
    with pytest.raises(ProtocolError) as caught:
        m.unpack_request(msgspec.msgpack.encode(raw))
    assert says in str(caught.value)


def test_the_hook_reads_specs_and_nothing_else() -> None:
    with pytest.raises(NotImplementedError, match="Tables"):
        read_spec(Tables, {"kind": "dense"})


def test_the_coordinator_places_a_table_by_its_own_geometry_and_tells_kinds_apart() -> None:
    peers = FakePeers(3)
    peers.join(0, 1, world=2)
    peers.ask(WORKER, m.Declare(Counters("t")))
    assert [peers.last(100 + shard, m.Create).spec for shard in range(3)] == [Counters("t")] * 3
    peers.create()
    assert peers.last(WORKER, m.Declared).spec == Counters("t")
    for other, says in ((Counters("t", 4), "width 8 instead of 4"), (spec(), "Counters instead of DenseSpec")):
        peers.ask(WORKER + 1, m.Declare(other))
        error = peers.error(WORKER + 1)
        assert isinstance(error, TableConflict)
        assert says in str(error)
    peers.ask(WORKER, m.Declare(Counters("u", 3)))
    assert "counters of 3 bytes" in str(peers.error(WORKER))


def test_what_only_a_dense_table_has_is_refused_to_others() -> None:
    with pytest.raises(UsageError, match="table 'c' is no dense table"):
        dense.only(Counters("c"))
    found = DenseSpec("d", (ParameterSpec("w", (4,)),), OptimizerSpec("SGD", ({},)))
    assert dense.only(found) is found
    assert kinds.spans(found, 1, 0, 4096) == (Span(0, 4096, 4),)
    assert kinds.spans(Counters("c"), 2, 1, 64) == (Span(0, 64, 4),)
