"""One process works in a run's folder; what others have half written there goes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from headwater.errors import DataError, DiskFull, RunInUse
from headwater_recipes.common import checkpoint, claim, job, metrics
from headwater_recipes.common.settings import State
from headwater_recipes.lm.settings import RECIPE, LmSettings

HOLDER = """
import pathlib, sys
from headwater_recipes.common import claim
claim.claim(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of one checkpoint."""
    place = tmp_path / "run"
    folder = place / "checkpoints" / "00000010"
    folder.mkdir(parents=True)
    state = State(step=10, elapsed=1.0, settings=LmSettings(steps=20))
    for each in (place, folder):
        checkpoint.write_json(each / "trainer.json", state)
    return place


@pytest.fixture
def holder(begun: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works there."""
    command = [sys.executable, "-c", HOLDER, str(begun)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_another_process_works_in_is_left_alone(begun: Path, holder: subprocess.Popen[str]) -> None:
    half = begun / "checkpoints" / "00000015.new"
    half.mkdir()
    before = _content(begun)
    with pytest.raises(RunInUse, match=rf"process {holder.pid} on .* works in .*Nothing was changed"):
        job.resume(RECIPE, begun, {"steps": 30})
    with pytest.raises(RunInUse, match=str(holder.pid)):
        job.Job(RECIPE, begun, Console(quiet=True))
    assert _content(begun) == before
    assert half.is_dir()  # the other one may be writing it
    holder.kill()
    holder.wait()
    job.resume(RECIPE, begun, {"steps": 30})
    assert checkpoint.read_state(begun, LmSettings).settings.steps == 30
    assert not half.exists()
    claim.release(begun)


def test_who_was_refused_for_another_reason_does_not_stay(begun: Path) -> None:
    with pytest.raises(DataError, match="cannot change"):
        job.resume(RECIPE, begun, {"seq": 64})
    assert claim.claim(begun)
    assert not claim.claim(begun)
    claim.release(begun)
    claim.release(begun)


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: checkpoint.new_folder("lm", None, now=0.0), range(8)))
    assert len({path.name for path in made}) == 8
    assert made[0].name.startswith("lm-1970")


def test_a_folder_that_was_asked_for_is_one_runs_only(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    command = [sys.executable, "-c", HOLDER, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=str(other.pid)):
            checkpoint.new_folder("lm", place)
        other.kill()
    assert checkpoint.new_folder("lm", place) == place  # the lock's file alone is nothing


def test_what_was_half_written_is_removed_and_the_rest_is_not(begun: Path) -> None:
    metrics.write_rows(begun, [{"kind": "step", "step": 1}])
    whole = _content(begun)
    (begun / "checkpoints" / "00000015.new").mkdir()
    (begun / "checkpoints" / "00000015.new" / "model.safetensors").write_bytes(b"half")
    for name in (".model.safetensors.new", "trainer.json.new", "metrics.jsonl.new", "schedule.json.new"):
        (begun / name).write_bytes(b"half")
    (begun / "notes.new").write_bytes(b"a file of the user's own")
    checkpoint.sweep(begun)
    assert _content(begun) == {**whole, "notes.new": b"a file of the user's own"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_run_is_being_made_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    def begin(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        signal.raise_signal(number)

    with pytest.raises(SystemExit) as ended, checkpoint.making("lm", tmp_path / "run") as folder:
        begin(folder)
    assert ended.value.code == 128 + number
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("there", [False, True])
def test_of_a_run_that_could_not_be_begun_nothing_is_left(tmp_path: Path, there: bool) -> None:
    place = tmp_path / "run"
    if there:
        place.mkdir()

    def fail(folder: Path) -> None:
        (folder / "tokens").mkdir()
        (folder / "tokens" / "training.npy").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskFull, match="nothing is left"), checkpoint.making("lm", place) as folder:
        fail(folder)
    assert place.exists() == there
    assert not there or list(place.iterdir()) == []
    with checkpoint.making("lm", place):
        pass
    claim.release(place)
