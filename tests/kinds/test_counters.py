"""A second kind of table from end to end: a package that Headwater does not know brings it, and clusters hold it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import headwater
from headwater.errors import HeadwaterError, LinkBroken, ProtocolError, UsageError
from headwater.launch import Launcher, Shape
from headwater.layout import kinds
from headwater.layout.saved import Extent
from headwater.server.snapshots.opened import newest
from headwater.transports.stream import Link
from headwater.types import Async, Bulk, Stale, Sync
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind
from tests.kinds.counters import server as _store  # noqa: F401 - registered: this process is a cluster's too
from tests.kinds.counters.client import CounterTable
from tests.kinds.counters.layout import CounterSpec, Counts, shard_of, unpack
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MANY = {b"%d" % i: i for i in range(60)}


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process for which the package is installed: one line registers it."""
    where = tmp_path / "site"
    info = where / "counters-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counters\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[headwater.kinds]\ncounters = tests.kinds.counters\nbroken = no.such\n")
    known = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(where), str(ROOT), known)))}


def counters(ps: headwater.Client, sync: Sync | None = None) -> CounterTable:
    table = ps.table(CounterSpec("words", sync or Async()))
    assert isinstance(table, CounterTable)
    return table


def pulled(table: CounterTable, *keys: bytes) -> Counts:
    """Of these keys, or all."""
    table.pull(keys or None).wait(PATIENCE)
    return table.counts


def count(table: CounterTable, counts: Counts) -> None:
    table.push(counts)
    table.step().wait(PATIENCE)


# ---- in one process ----------------------------------------------------------------------------------


@pytest.fixture
def ps() -> Iterator[headwater.Client]:
    with headwater.connect("inproc://", servers=2, timeout=PATIENCE) as made:
        yield made


@pytest.mark.parametrize("sync", [Async(), Async(1), Stale(1), Bulk()])
def test_what_is_pushed_is_pulled_whole_or_by_keys(ps: headwater.Client, sync: Sync) -> None:
    table = counters(ps, sync)
    assert pulled(table) == {}
    count(table, {b"a": 2, b"a key of its own length": 5, b"": 1})
    count(table, MANY)
    count(table, {b"a": -7})
    assert pulled(table, b"a", b"7", b"nobody's") == {b"a": -5, b"7": 7, b"nobody's": 0}
    assert pulled(table) == MANY | {b"a": -5, b"a key of its own length": 5, b"": 1}
    assert {shard_of(key, 2) for key in MANY} == {0, 1}
    assert all(status.pulled_bytes > 0 for status in ps.status().servers)


class Deaf:
    """In the place of a session, where answers would come: they are lost."""

    def landing(self, frame: Frame) -> memoryview:
        return memoryview(bytearray(frame.payload_length))

    def receive(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        assert frame.kind in (Kind.ACK, Kind.DATA)


def tear(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on frames arrive and answers do not; the next one that is sent is the last."""
    send = link.send

    def last(frame: Frame, fds: tuple[int, ...] = ()) -> None:
        send(frame, fds)
        monkeypatch.setattr(link, "_error", LinkBroken("reset"))

    monkeypatch.setattr(link, "_handler", Deaf())
    monkeypatch.setattr(link, "send", last)


def test_over_a_connection_that_breaks_each_push_counts_once(
    ps: headwater.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = counters(ps)
    count(table, {b"a": 1})
    link = ps.shards.sessions[shard_of(b"a", 2)].link
    assert link is not None
    tear(link, monkeypatch)
    count(table, {b"a": 10})
    assert pulled(table, b"a") == {b"a": 11}
    again = ps.shards.sessions[shard_of(b"a", 2)].link
    assert again is not None
    assert again is not link
    tear(again, monkeypatch)
    assert pulled(table, b"a") == {b"a": 11}, "a pull whose answer was lost is asked for again"
    count(table, {b"a": 100})
    assert pulled(table) == {b"a": 111}


def test_keys_that_are_none_are_refused(ps: headwater.Client) -> None:
    table = counters(ps)
    count(table, {b"a": 1})
    session = table._parts[0].session
    session.send(Frame(Kind.PULL, table=table.number, seq=7, payload=memoryview(b"xyz")))
    with pytest.raises(HeadwaterError, match="3 bytes that are no list of keys"):
        table.pull().wait(PATIENCE)


@pytest.mark.parametrize(("stop", "length", "flags"), [(0, (1 << 16) + 4, 0), (4, 12, 0), (0, 12, Flag.MEAN)])
def test_keys_that_a_pull_cannot_bring_are_refused_before_they_are_received(
    ps: headwater.Client, stop: int, length: int, flags: int
) -> None:
    table = counters(ps)
    frame = Frame(Kind.PULL, flags, table=table.number, stop=stop, payload=memoryview(bytes(length)))
    with pytest.raises(ProtocolError, match=rf"PULL of bytes 0:{stop} with {length} bytes of keys, .* was allocated"):
        table._parts[0].session.send(frame)


def test_a_dense_table_takes_no_keys(ps: headwater.Client) -> None:
    table = ps.dense("w", (4,)).table
    session = ps.shards.sessions[table.layout.participants[0]]
    with pytest.raises(ProtocolError, match="PULL with keys from table 1, which has none; nothing was allocated"):
        session.send(Frame(Kind.PULL, table=table.number, payload=memoryview(b"key")))


def test_a_version_is_cut_and_read_as_its_kind_has_published_it() -> None:
    with (
        headwater.connect("inproc://counters", servers=2, timeout=PATIENCE) as ps,
        headwater.reader("words", "inproc://counters", timeout=PATIENCE) as reader,
    ):
        table = counters(ps, Bulk())
        count(table, MANY)
        ps.publish([table], "v1").wait(PATIENCE)
        count(table, {b"7": 1})
        ps.publish([table], "v2").wait(PATIENCE)
        parts = {name: reader.raw(name, PATIENCE) for name in ("v1", "v2", "latest")}
        assert set(parts["v1"]) == {("words", 0), ("words", 1)}
        found = {name: {k: n for part in of.values() for k, n in unpack(part).items()} for name, of in parts.items()}
        assert found["v1"] == MANY
        assert found["v2"] == found["latest"] == MANY | {b"7": 8}
        assert reader.statistics().leases == 0
        with pytest.raises(UsageError, match="table 'words' is no dense table"):
            reader.lease("v1")
        assert reader.statistics().leases == 0


# ---- in processes of their own -----------------------------------------------------------------------


def cluster_of(shape: Shape, env: dict[str, str]) -> Launcher:
    return Launcher(shape, env=env, advertise=False, on_note=lambda line: None)


def test_a_cluster_of_processes_goes_on_without_a_server_and_another_from_its_snapshot(
    tmp_path: Path, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "snapshots"
    with cluster_of(Shape(2, replicas=2, snapshots=folder), installed) as cluster:
        for name, value in cluster.environment().items():
            monkeypatch.setenv(name, value)
        with headwater.connect(timeout=PATIENCE) as ps, headwater.reader("words", timeout=PATIENCE) as reader:
            table = counters(ps)
            count(table, MANY)
            os.kill(cluster.servers[0].pid, signal.SIGKILL)
            for _ in range(20):
                count(table, {b"7": 1, b"8": 1})
            assert pulled(table, b"7", b"8", b"9") == {b"7": 27, b"8": 28, b"9": 9}
            ps.publish([table], "v1").wait(PATIENCE)
            taken = ps.ask(m.TakeSnapshot())
            assert isinstance(taken, m.SnapshotTaken)
            wanted = pulled(table)
            assert wanted == MANY | {b"7": 27, b"8": 28}
            count(table, {b"late": 1})
            parts = reader.raw("v1").values()
            assert {key: n for part in parts for key, n in unpack(part).items()} == wanted

    newest(folder).snapshot.close()
    with cluster_of(Shape(3, restore=folder), installed) as cluster:
        for name, value in cluster.environment().items():
            monkeypatch.setenv(name, value)
        with headwater.connect(timeout=PATIENCE) as ps:
            table = counters(ps)
            assert pulled(table) == wanted
            count(table, {b"7": 3})
            assert pulled(table, b"7") == {b"7": 30}


# ---- how it is found ---------------------------------------------------------------------------------

FINDS = """
import sys
from headwater.layout import kinds
from headwater.types import TableSpec, read_spec

spec = read_spec(TableSpec, {"kind": "counters", "name": "words"})
kinds.check_table(spec)
assert "torch" not in sys.modules, "a coordinator needs none"
assert "tests.kinds.counters.server" not in sys.modules
from headwater.client.kinds import kind_of
from headwater.server.tables.kinds import room
print(kind_of(spec).__name__, room(spec, 1, 0))
try:
    read_spec(TableSpec, {"kind": "broken"})
except ValueError as error:
    print(error)
"""


def test_a_package_that_is_installed_beside_headwater_is_found_when_a_kind_is_unknown(
    installed: dict[str, str],
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FINDS], env={**os.environ, **installed}, capture_output=True, text=True, check=False,
        timeout=PATIENCE,
    )  # fmt: skip
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [
        "CounterTable 65536",
        "a table of kind 'broken', whose no.such.layout cannot be imported: No module named 'no'",
    ]


def test_a_cluster_without_the_package_refuses_the_table_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster_of(Shape(1), {}) as cluster:
        for name, value in cluster.environment().items():
            monkeypatch.setenv(name, value)
        with (
            headwater.connect(timeout=PATIENCE) as ps,
            pytest.raises(HeadwaterError, match=r"kind 'counters'; this Headwater knows 'dense'"),
        ):
            counters(ps)
        with headwater.connect(timeout=PATIENCE) as ps:
            assert ps.dense("w", (4,)).pull().tolist() == [0.0] * 4


def test_whether_a_snapshot_is_complete_is_for_the_kind_to_say() -> None:
    saved = [Extent(0, 0, "uint8", True), Extent(2, 2, "uint8", True)]
    assert kinds.missing(CounterSpec("words"), 3, lambda *of: saved) == "what shard 1 counted"
    assert kinds.missing(CounterSpec("words"), 1, lambda *of: saved) == ""
