"""What a cluster is made of, as the command lines of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwater.cluster.store.sqlite import SqliteStore
from headwater.errors import StateInUse, UsageError
from headwater.launch import Rules, Shape


def test_what_was_not_asked_for_is_on_no_command_line() -> None:
    shape = Shape(2)
    assert shape.plain
    assert shape.coordinator_options(None) == ["--servers", "2"]
    assert shape.server_options("s0") == []


def test_every_wish_is_on_the_coordinators_command_line(tmp_path: Path) -> None:
    shape = Shape(3, 6, 2, 2, "disk", 0.5, tmp_path / "state", tmp_path / "snapshots", 30.0, tmp_path)
    assert " ".join(shape.coordinator_options(shape.state)) == (
        "--servers 3 --shards 6 --replicas 2 --min-copies 2 --ack disk --silence 0.5 "
        f"--state {tmp_path}/state --snapshots {tmp_path}/snapshots --snapshot-every 30 --restore {tmp_path}"
    )
    assert shape.server_options("s1") == ["--data", f"{tmp_path}/state/s1"]


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"servers": -1}, "servers=-1"),
        ({"shards": 0}, "shards=0"),
        ({"replicas": 0}, "replicas=0"),
        ({"servers": 1, "replicas": 2}, "replicas=2 with servers=1"),
        ({"servers": 3, "replicas": 2, "min_copies": 3}, "min_copies=3"),
        ({"ack": "paper"}, "ack='paper'"),
        ({"ack": "disk"}, "--state"),
        ({"silence": 0.0}, "silence=0"),
        ({"snapshot_every": 5.0}, "--snapshots"),
        ({"snapshot_every": 0.0, "snapshots": "x"}, "snapshot_every=0"),
    ],
)
def test_wishes_that_do_not_fit_together(wishes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=f"{told}.*; nothing was started"):
        Shape(**wishes)


def test_folders_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    shape = Shape(state=tmp_path / "a" / "b", snapshots=tmp_path / "c")
    shape.prepare()
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "c").is_dir()


def test_a_folder_that_cannot_be_made_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        Shape(state=tmp_path / "file" / "below").prepare()
    with pytest.raises(UsageError, match="no snapshot"):
        Shape(restore=tmp_path / "nowhere").prepare()


def _remembered(folder: Path, *keys: str) -> None:
    store = SqliteStore(folder)
    store.put(dict.fromkeys(keys, b"x"))
    store.close()


def _left(folder: Path) -> set[str]:
    store = SqliteStore(folder)
    try:
        return set(store.items())
    finally:
        store.close()


def test_the_state_of_a_cluster_without_tables_is_set_aside(tmp_path: Path) -> None:
    _remembered(tmp_path, "view/0", "server/1")
    Shape(state=tmp_path).set_aside(findable=True)
    assert _left(tmp_path) == {"view/0", "server/1"}
    Shape(state=tmp_path, ack="disk").set_aside(findable=False)
    assert _left(tmp_path) == {"view/0", "server/1"}
    Shape(state=tmp_path).set_aside(findable=False)
    assert _left(tmp_path) == set()


def test_tables_that_are_gone_are_not_forgotten_in_silence(tmp_path: Path) -> None:
    _remembered(tmp_path, "view/0", "table/0")
    with pytest.raises(UsageError, match=r"gone with them.*--restore"):
        Shape(state=tmp_path).set_aside(findable=False)
    assert _left(tmp_path) == {"view/0", "table/0"}
    Shape(state=tmp_path, restore=tmp_path).set_aside(findable=True)
    assert _left(tmp_path) == set()


def test_the_state_of_a_cluster_that_runs_is_left_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    try:
        with pytest.raises(StateInUse):
            Shape(state=tmp_path).set_aside(findable=False)
    finally:
        store.close()


def test_a_running_cluster_has_its_shape() -> None:
    with pytest.raises(UsageError, match="runs already"):
        Shape(address="tcp://127.0.0.1:9", replicas=2)
    with pytest.raises(UsageError, match="elastic"):
        Rules(restart_workers=1)


def test_what_is_restored_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file, and a snapshot is a folder"):
        Shape(restore=tmp_path / "file").prepare()
    with pytest.raises(UsageError, match="there is no snapshot"):
        Shape(restore=tmp_path / "gone").prepare()
