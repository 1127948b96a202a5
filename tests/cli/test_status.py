"""What ``headwater status`` draws, and which cluster it asks."""

from __future__ import annotations

import os

import msgspec
import pytest
from rich.console import Console

from headwater.cli.status import draw, health, locate, ranges, size
from headwater.errors import UsageError
from headwater.launch import registry
from headwater.types import VersionInfo
from headwater.wire.messages import (
    ClusterStatus,
    ModelStatus,
    RelayStatus,
    ServerStatus,
    ShardStatus,
    TableStatus,
    WorkerStatus,
)

SERVER = ServerStatus(
    0, "tcp://127.0.0.1:4001", 71, "alive", (0, 1, 2, 5), (), (3,), 200_000_000, 2, 6_000_000, 8_000_000, 90.0
)
SHARD = ShardStatus(0, 3, 0, (1,), (), 1234, 2, 2, 2)
WORKER = WorkerStatus(0, "worker", 81, "alive", 12, 3_000_000, 4_000_000, 1, 0.25, 2)
READER = WorkerStatus(-1, "reader", 82, "silent", 0, 0, 4_000_000, 0, 3.0)
TABLE = TableStatus("model", 0, 9, 12_000_000, 48_000_000, "AdamW", "Async(max_staleness=None)", 12, (48_000_000,))
STATUS = ClusterStatus(3725.0, 4, 2, 1, (SERVER,), (SHARD,), (WORKER, READER), (TABLE,))


def _lines(
    before: ClusterStatus | None = None, seconds: float = 0.0, now: ClusterStatus = STATUS, width: int = 120
) -> list[list[str]]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(draw(now, before, seconds, width))
    return [line.split("  ") for line in captured.get().splitlines()]


def _cells(lines: list[list[str]], start: str) -> list[str]:
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return next(row for row in cells if (row and row[0] == start) or row[1:2] == [start])


def _shards(*shards: ShardStatus, min_copies: int = 1) -> ClusterStatus:
    return msgspec.structs.replace(STATUS, shards=shards, min_copies=min_copies)


def test_a_relay_says_what_it_holds_and_whether_it_hears_of_new_versions() -> None:
    model = ModelStatus("lm", VersionInfo("lm", 7, "v7", 6, 7, 0.0, ("lm",), 10, "ab"), 2, 0, ("production",), 1, 20)
    relay = RelayStatus("tcp://10.0.0.1:7000", 0.0, "", 500_000_000, 8_000_000)
    status = ClusterStatus(65.0, 0, 1, 1, (), (), (READER,), (), (model,), relay)
    lines = _lines(now=status)
    assert lines[0] == ["Relay, up 1 min 5 s: 1 model, 500 MB held, 8.0 MB sent to readers"]
    assert lines[1] == ["versions come from tcp://10.0.0.1:7000"]
    assert _cells(lines, "lm")[1:3] == ["v7", "7"]
    silent = msgspec.structs.replace(relay, silent=72.0, why="nobody answers")
    (said,) = _lines(now=msgspec.structs.replace(status, relay=silent))[1]
    assert said == ("tcp://10.0.0.1:7000 has been silent for 1 min 12 s (nobody answers); what is here is served")


def test_everything_is_shown() -> None:
    lines = _lines()
    assert lines[0] == ["Headwater, up 1 h 2 min: 1 server, 1 shard, 1 table, 1 worker"]
    assert lines[1] == ["every shard has its 2 copies"]
    expected = "0|127.0.0.1:4001|71|alive|0-2 5|–|3|200 MB|2|6.0 MB|8.0 MB|1 min 30 s"
    assert "|".join(_cells(lines, "127.0.0.1:4001")) == expected
    assert "|".join(_cells(lines, "3")) == "0|3|0|1|–|1,234|2|2 of 2"
    assert _cells(lines, "model") == ["model", "9", "12,000,000", "48.0 MB", "48.0 MB", "AdamW", "Async", "12"]
    assert _cells(lines, "worker") == ["0", "worker", "81", "alive", "12", "1", "0.2 s", "3.0 MB", "4.0 MB", "2"]
    assert _cells(lines, "reader") == ["–", "reader", "82", "silent", "–", "–", "3.0 s", "0 B", "4.0 MB", "–"]


def test_a_narrow_terminal_is_not_shown_everything() -> None:
    rates = _lines(STATUS, 2.0, width=80)
    assert not any("…" in cell for line in rates for cell in line)
    assert "|".join(_cells(rates, "71")) == "0|71|alive|0-2 5|–|3|200 MB|0 B/s|0 B/s"


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 120, 140])
def test_no_line_is_longer_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    server = msgspec.structs.replace(SERVER, server=11, pid=4_123_456, backups=(0, 3), pushed_bytes=0, pulled_bytes=0)
    table = msgspec.structs.replace(TABLE, name="a-long-name.buffers", sync="Async(max_staleness=8)", shards=(7, 8, 9))
    newest = VersionInfo("lm", 7, "step-1200", 6, 1200, 0.0, ("lm",), 270_000_000, "ab12")
    models = (ModelStatus("lm", newest, 3, 0, ("production", "staging"), 5, 1_620_000_000),)
    now = msgspec.structs.replace(STATUS, servers=(SERVER, server), tables=(TABLE, table), models=models)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(draw(now, msgspec.structs.replace(now, servers=(SERVER, server)), 1.0, width))
    lines = captured.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    cells = [tuple(line.split()) for line in lines]
    assert any(line[:1] == ("11",) and "alive" in line for line in cells)
    assert any(line[0] == "0" and line[-3:] == ("2", "of", "2") for line in cells if line)  # shard 0
    assert any(line[0] == "model" and line[-1] == "12" and "48.0" in line for line in cells if line)  # table, clock
    assert any(line[0] == "lm" and "step-1200" in line for line in cells if line)
    assert any("worker" in line and "alive" in line and "12" in line for line in cells)
    assert ("no room here for address" in captured.get()) == (width < 116)


def test_shards_without_their_copies_stand_out() -> None:
    alone = msgspec.structs.replace(SHARD, shard=1, backups=(), copies=1)
    told = health(_shards(SHARD, alone))
    assert (told.plain, told.style) == ("shard 1: one copy of 2, no server to put another on", "yellow")
    learns = msgspec.structs.replace(alone, shard=2, learners=(4,))
    assert health(_shards(learns)).plain == "shard 2: one copy of 2, 1 being brought up to date"
    told = health(_shards(alone, learns, min_copies=2))
    assert told.plain == "shards 1-2: one copy of 2, 1 being brought up to date; pushes wait"
    assert told.style == "bold red"


def test_a_shard_that_nobody_serves_stands_out_most() -> None:
    nobody = msgspec.structs.replace(SHARD, shard=7, primary=-1, backups=(), copies=0)
    assert health(_shards(SHARD, nobody)).plain == "nobody serves shard 7: pushes to it wait"
    assert "|".join(_cells(_lines(now=_shards(nobody)), "7")) == "7|3|nobody|–|–|1,234|2|0 of 2"


def test_a_shard_whose_last_copy_is_dead() -> None:
    dead = msgspec.structs.replace(SHARD, shard=7, primary=9, backups=(), copies=0)
    other = msgspec.structs.replace(dead, shard=8)
    told = health(_shards(SHARD, dead, other))
    assert told.plain == "nobody serves shards 7-8: the last copy was on server 9, which is dead"
    assert "|".join(_cells(_lines(now=_shards(dead)), "7")) == "7|3|9 dead|–|–|1,234|2|0 of 2"


def test_one_copy_that_was_asked_for_is_no_alarm() -> None:
    single = msgspec.structs.replace(SHARD, backups=(), copies=1, wanted=1)
    told = health(msgspec.structs.replace(_shards(single), replicas=1))
    assert (told.plain, told.style) == ("one copy of every shard: a server that dies ends the job", "dim")


def test_numbers_in_a_row() -> None:
    assert [ranges(numbers) for numbers in ((), (3,), (2, 0, 1), (9, 4, 5))] == ["–", "3", "0-2", "4-5 9"]


@pytest.mark.parametrize(
    ("parts", "text"),
    [((4_000_000, 4_100_000), "4.0 MB + 4.1 MB"), ((8, 8, 8), "3 × 8 B"), ((7, 8, 9), "3 × 7 B to 9 B"), ((), "0 B")],
)
def test_bytes_per_shard_stay_short(parts: tuple[int, ...], text: str) -> None:
    now = msgspec.structs.replace(STATUS, tables=(msgspec.structs.replace(TABLE, shards=parts),))
    assert _cells(_lines(now=now), "model")[4] == text


def test_a_model_is_one_line() -> None:
    newest = VersionInfo("lm", 7, "step-1200", 6, 1200, 0.0, ("lm",), 270_000_000, "ab12")
    models = (
        ModelStatus("lm", newest, 3, 0, ("production", "staging"), 5, 1_620_000_000),
        ModelStatus("old", None, 1, 1, (), 0, 0),
    )
    lines = _lines(now=msgspec.structs.replace(STATUS, models=models))
    first = _cells(lines, "lm")
    assert (first[:3], first[4:]) == (["lm", "step-1200", "1,200"], ["3", "production staging", "5", "1.6 GB"])
    assert _cells(lines, "old") == ["old", "–", "–", "–", "1, 1 lost", "–", "0", "0 B"]


def test_with_an_earlier_status_the_bytes_are_rates() -> None:
    server = msgspec.structs.replace(SERVER, pushed_bytes=2_000_000, pulled_bytes=0)
    before = msgspec.structs.replace(STATUS, servers=(server,), workers=())
    lines = _lines(before, 2.0)
    assert _cells(lines, "127.0.0.1:4001")[-3:-1] == ["2.0 MB/s", "4.0 MB/s"]
    assert _cells(lines, "worker")[-3:-1] == ["3.0 MB", "4.0 MB"]  # it was not there yet


def test_an_empty_cluster_has_no_empty_tables() -> None:
    lines = _lines(now=ClusterStatus(5.0, 0, 2, 1, (SERVER,), (SHARD,), (), ()))
    assert lines[0] == ["Headwater, up 5 s: 1 server, 1 shard, 0 tables, 0 workers"]
    assert not any("Tables" in line[0] or "Workers" in line[0] for line in lines)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_940, "99.9 kB"), (123_456, "123 kB"), (5.4e15, "5400 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_the_only_cluster_of_this_user_is_found_with_its_token() -> None:
    registry.advertise("tcp://127.0.0.1:7", "secret", "headwater up")
    try:
        assert locate(None) == "tcp://127.0.0.1:7"
        assert os.environ["HEADWATER_TOKEN"] == "secret"
    finally:
        os.environ.pop("HEADWATER_TOKEN", None)


def test_one_of_several_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN", "given")
    registry.advertise("tcp://127.0.0.1:7", "secret", "headwater up")
    registry.advertise("tcp://127.0.0.1:8", "secret", "headwater run")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:7 .*127\.0\.0\.1:8 "):
        locate(None)
    assert locate("tcp://127.0.0.1:8") == "tcp://127.0.0.1:8"
    assert os.environ["HEADWATER_TOKEN"] == "given"
