"""A second kind of table: known by its tag on the wire and at rest, placed by its own geometry."""

from __future__ import annotations

import msgspec
import pytest

from headwater.cluster.tables import Tables
from headwater.errors import ProtocolError, TableConflict, UsageError
from headwater.layout import dense, kinds
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec, Span, TableSpec, read_spec
from headwater.wire import messages as m
from tests.cluster.fake_peers import WORKER, FakePeers, spec
from tests.kinds.counters.layout import CounterSpec


@pytest.mark.parametrize("found", [CounterSpec("c", limit=400), spec()])
def test_a_message_holds_a_spec_of_any_kind(found: TableSpec) -> None:
    assert m.unpack_request(m.pack(m.Declare(found))) == m.Declare(found)  # type: ignore[arg-type]
    assert m.unpack_reply(m.pack(m.Declared(1, found, False, 0))) == m.Declared(1, found, False, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "trees"}, "a table of kind 'trees'; this Headwater knows 'dense', 'counters'"),
        ({"kind": None}, "a table of kind None"),
        ({"kind": ["dense"]}, "a table of kind"),
        ({"limit": "8"}, "Expected `int`, got `str` - at `$.limit`"),
        ({"kind": "dense"}, "missing required field `parameters`"),
    ],
)
def test_another_spec_is_refused_with_a_reason(change: dict[str, object], says: str) -> None:
    raw = msgspec.to_builtins(m.Declare(CounterSpec("c")))
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
    peers.ask(WORKER, m.Declare(CounterSpec("t")))
    assert [peers.last(100 + shard, m.Create).spec for shard in range(3)] == [CounterSpec("t")] * 3
    peers.create()
    assert peers.last(WORKER, m.Declared).spec == CounterSpec("t")
    for other, says in (
        (CounterSpec("t", limit=400), "limit 65536 instead of 400"),
        (spec(), "CounterSpec instead of DenseSpec"),
    ):
        peers.ask(WORKER + 1, m.Declare(other))
        error = peers.error(WORKER + 1)
        assert isinstance(error, TableConflict)
        assert says in str(error)
    peers.ask(WORKER, m.Declare(CounterSpec("u", limit=3)))
    assert "pushes of 3 bytes hold no counter" in str(peers.error(WORKER))


def test_what_only_a_dense_table_has_is_refused_to_others() -> None:
    with pytest.raises(UsageError, match="table 'c' is no dense table"):
        dense.only(CounterSpec("c"))
    found = DenseSpec("d", (ParameterSpec("w", (4,)),), OptimizerSpec("SGD", ({},)))
    assert dense.only(found) is found
    assert kinds.spans(found, 1, 0, 4096) == (Span(0, 4096, 4),)
    assert kinds.spans(CounterSpec("c"), 2, 1, 64) == (Span(0, 64, 4),)
