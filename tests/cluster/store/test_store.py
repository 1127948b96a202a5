"""The coordinator's memory: what ``put`` returned for is there after any end; what is damaged is refused by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.cluster.store.base import Store
from headwater.cluster.store.memory import MemoryStore
from headwater.cluster.store.sqlite import FILE, LOCK, SqliteStore
from headwater.errors import ClusterError, StateCorrupt, StateInUse, UsageError


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "state")
    yield made
    made.close()


# ---- what every store does -----------------------------------------------------------------------


def test_a_put_changes_adds_and_deletes(store: Store) -> None:
    store.put({"view/0": b"one", "view/1": b"two", "empty": b""})
    store.put({"view/0": b"three", "view/1": None, "never there": None})
    assert store.items() == {"view/0": b"three", "empty": b""}


def test_what_items_gave_is_the_callers_own(store: Store) -> None:
    store.put({"a": b"1"})
    store.items()["a"] = b"2"
    assert store.items() == {"a": b"1"}


def test_closing_twice_is_harmless(store: Store) -> None:
    store.close()
    store.close()


_changes = st.dictionaries(st.text(max_size=8), st.none() | st.binary(max_size=40), max_size=5)


@settings(max_examples=15, deadline=None)
@given(st.lists(_changes, max_size=6))
def test_sqlite_holds_after_reopening_what_memory_holds(
    tmp_path_factory: pytest.TempPathFactory, puts: list[dict[str, bytes | None]]
) -> None:
    folder, memory = tmp_path_factory.mktemp("state"), MemoryStore()
    for changes in puts:
        memory.put(changes)
        store = SqliteStore(folder)
        store.put(changes)
        store.close()
    store = SqliteStore(folder)
    assert store.items() == memory.items()
    store.close()


def test_sqlite_writes_ahead_and_syncs_each_commit(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    assert store._db is not None
    pragmas = [store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert pragmas == ["wal", 2]
    store.close()


# ---- one holder ----------------------------------------------------------------------------------


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path)
    first.put({"a": b"1"})
    with pytest.raises(StateInUse, match=f"process {os.getpid()} is the coordinator"):
        SqliteStore(tmp_path)
    first.put({"b": b"2"})
    first.close()
    second = SqliteStore(tmp_path)
    assert second.items() == {"a": b"1", "b": b"2"}
    second.close()


def test_a_closed_store_takes_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store.close()
    with pytest.raises(UsageError, match="closed"):
        store.put({"a": b"1"})


WRITER = textwrap.dedent(
    """
    import sys
    from headwater.cluster.store.sqlite import SqliteStore

    store = SqliteStore(sys.argv[1])
    step = int(store.items().get("step", b"0"))
    print(step, flush=True)
    while True:
        step += 1
        store.put({"step": b"%d" % step, f"value/{step % 7}": b"%d" % step * 300, f"value/{(step + 3) % 7}": None})
        print(step, flush=True)
    """
)


def _expected(step: int) -> dict[str, bytes]:
    memory = MemoryStore()
    for i in range(1, step + 1):
        memory.put({"step": b"%d" % i, f"value/{i % 7}": b"%d" % i * 300, f"value/{(i + 3) % 7}": None})
    return memory.items()


def test_kill_9_loses_nothing_that_put_returned_for_and_frees_the_hold(tmp_path: Path) -> None:
    for hurry in (1, 25, 60):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for _ in range(hurry):
                said = child.stdout.readline()
            with pytest.raises(StateInUse, match=f"process {child.pid} "):
                SqliteStore(tmp_path)
            child.send_signal(signal.SIGKILL)
            lines = [said, *child.stdout.read().splitlines(keepends=True)]
        told = [int(line) for line in lines if line.endswith("\n")]
        store = SqliteStore(tmp_path)
        found = store.items()
        store.close()
        step = int(found.get("step", b"0"))
        assert told[-1] <= step <= told[-1] + 1  # the last one may be on disk and not yet told
        assert found == _expected(step)


# ---- damage --------------------------------------------------------------------------------------


def _log_of(folder: Path, puts: int) -> tuple[bytes, bytes]:
    """The files of a store that was never closed: the database, and its log of ``puts`` changes."""
    store = SqliteStore(folder)
    for step in range(1, puts + 1):
        store.put({"step": b"%d" % step, f"k{step % 3}": bytes([step]) * 900})
    files = (folder / FILE).read_bytes(), (folder / (FILE + "-wal")).read_bytes()
    store.close()
    return files


def _reopened(folder: Path, database: bytes, log: bytes) -> dict[str, bytes]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / FILE).write_bytes(database)
    (folder / (FILE + "-wal")).write_bytes(log)
    store = SqliteStore(folder)
    found = store.items()
    store.close()
    return found


def test_a_torn_log_is_a_state_that_was(tmp_path: Path) -> None:
    database, log = _log_of(tmp_path / "from", 12)
    past: list[dict[str, bytes]] = [{}]
    for step in range(1, 13):
        past.append({**past[-1], "step": b"%d" % step, f"k{step % 3}": bytes([step]) * 900})
    steps = []
    for cut in [*range(0, len(log), 997), len(log)]:
        for tail in (b"", os.urandom(500)):
            found = _reopened(tmp_path / "to", database, log[:cut] + tail)
            steps.append(int(found.get("step", b"0")))
            assert found == past[steps[-1]]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 12)


def _closed(folder: Path) -> Path:
    store = SqliteStore(folder)
    store.put({"view": b"value" * 200, "other": b"x"})
    store.close()
    return folder / FILE


def test_a_damaged_value_is_refused(tmp_path: Path) -> None:
    path = _closed(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(b"valuevalue") + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateCorrupt, match="the value of 'view'"):
        SqliteStore(tmp_path)
    assert path.read_bytes() == data
    with pytest.raises(StateCorrupt):  # and the hold was let go of
        SqliteStore(tmp_path)


@pytest.mark.parametrize("damage", ["half", "noise", "zeros"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = _closed(tmp_path)
    data = path.read_bytes()
    if damage == "half":
        path.write_bytes(data[: len(data) // 2 + 100])
    else:
        noise = os.urandom(3000) if damage == "noise" else bytes(3000)
        path.write_bytes(data[:4096] + noise + data[7096:])
    with pytest.raises(StateCorrupt, match=FILE):
        SqliteStore(tmp_path)


def test_other_peoples_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text("a shopping list, " * 100, encoding="utf-8")
    with pytest.raises(StateCorrupt, match="left as it is"):
        SqliteStore(tmp_path)
    assert path.read_text(encoding="utf-8").startswith("a shopping list")
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE state(key TEXT, value BLOB)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StateCorrupt, match="another program"):
        SqliteStore(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("found", [1, 3])
def test_another_format_is_refused_with_what_to_do(tmp_path: Path, found: int) -> None:
    path = _closed(tmp_path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={found}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StateCorrupt, match=f"has format {found}, this Headwater reads format 2; it was left"):
        SqliteStore(tmp_path)
    assert path.read_bytes() == before


def test_a_log_without_its_database_is_not_taken_for_a_new_cluster(tmp_path: Path) -> None:
    _database, log = _log_of(tmp_path / "from", 3)
    (tmp_path / (FILE + "-wal")).write_bytes(log)
    with pytest.raises(StateCorrupt, match="beside it; put that back"):
        SqliteStore(tmp_path)


def test_a_creation_that_a_crash_cut_short_begins_again(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    (tmp_path / LOCK).write_text("12345\n", encoding="utf-8")
    store = SqliteStore(tmp_path)
    assert store.items() == {}
    store.close()


# ---- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_nothing_of_the_change_is_kept(small_disk: Path) -> None:
    store = SqliteStore(small_disk)
    store.put({"a": b"1"})
    with pytest.raises(ClusterError, match="is full; nothing of this change was kept"):
        store.put({"a": b"2", "big": os.urandom(2_000_000)})
    assert store.items() == {"a": b"1"}
    store.put({"a": b"3"})
    store.close()
    store = SqliteStore(small_disk)
    assert store.items() == {"a": b"3"}
    store.close()


def _fill(path: Path) -> None:
    """All the room there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _put_until_refused(store: Store) -> tuple[int, str]:
    """The last step that was taken, and what was said to the one after it."""
    for step in range(1, 1000):
        try:
            store.put({"step": b"%d" % step, f"k{step}": bytes(3000)})
        except ClusterError as error:
            return step - 1, str(error)
    raise AssertionError("the disk never filled up")


def test_a_small_disk_is_enough_for_a_long_life(small_disk: Path) -> None:
    """The log is moved into the database before it is long."""
    store = SqliteStore(small_disk)
    for step in range(300):
        store.put({"step": b"%d" % step, f"k{step % 5}": bytes([step % 256]) * 3000})
    assert store.items()["step"] == b"299"
    store.close()


def test_a_disk_that_fills_up_beside_the_store(small_disk: Path) -> None:
    store = SqliteStore(small_disk)
    filler = small_disk / "filler"
    _fill(filler)
    last, refusal = _put_until_refused(store)
    assert "is full; nothing of this change was kept" in refusal
    filler.unlink()
    store.put({"after": b"1"})
    store.close()
    store = SqliteStore(small_disk)
    assert store.items() == {f"k{step}": bytes(3000) for step in range(1, last + 1)} | {
        "after": b"1", **({"step": b"%d" % last} if last else {}),
    }  # fmt: skip
    store.close()


def test_a_folder_that_cannot_be_written(small_disk: Path) -> None:
    _closed(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UsageError, match="cannot be kept"):
        SqliteStore(small_disk)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be kept"):
        SqliteStore(tmp_path / "file" / "state")


class _FailingDisk:
    """A connection whose commits fail as they do when fsync does."""

    in_transaction = False

    def execute(self, statement: str) -> None:
        if statement == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error

    def executemany(self, statement: str, rows: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_after_a_failed_fsync_nothing_more_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path)
    assert store._db is not None
    store._db.close()
    monkeypatch.setattr(store, "_db", _FailingDisk())
    with pytest.raises(ClusterError, match="whether this change was kept is unknown"):
        store.put({"a": b"1"})
    with pytest.raises(ClusterError, match="takes nothing more"):
        store.put({"a": b"1"})
    store.close()
