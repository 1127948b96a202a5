"""What every recipe promises, tried with each that an entry point names, in its configuration of ``tiny``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import headwater
from headwater.launch import Process
from headwater_recipes import listing
from headwater_recipes.common import checkpoint, claim, job, metrics, reports, schedule
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.trainer import Trainer
from tests.recipes import tiny

RECIPES = {recipe.name: recipe for recipe in listing.found() if recipe.task.startswith("headwater_recipes.")}
EVERY = pytest.mark.parametrize("name", sorted(RECIPES))
LONG = pytest.mark.recipes
STEPS = tiny.SHARED["steps"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A recipe's run folder that is ready to train in; made once, and copied."""
    made: dict[str, Path] = {}

    def get(name: str, to: Path, **changes: Any) -> Path:
        recipe = RECIPES[name]
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            made[name] = job.prepare(recipe, tiny.settings(recipe, place / "data"), place / "run", Console(quiet=True))
            claim.release(made[name])
        shutil.copytree(made[name], to)
        state = checkpoint.read_state(to, recipe.settings)
        checkpoint.begin(recipe, to, msgspec.structs.replace(state.settings, **changes))
        return to

    return get


class _Job(job.Job[Any]):
    """Does something when the first row of metrics is there."""

    kills: str = ""

    def _line(self, process: Process, stream: str, line: str) -> None:
        before = len(self.board.rows)
        super()._line(process, stream, line)
        if self.kills and len(self.board.rows) > before == 0:
            what, rank = self.kills.split()
            victims = {"server": self.launcher.servers, "worker": self.launcher.workers}[what]
            os.kill(victims[int(rank)].pid, signal.SIGKILL)


def _train(recipe: Recipe[Any], run: Path, *, stop: bool = False, kills: str = "") -> _Job:
    out = io.StringIO()
    done = _Job(recipe, run, Console(file=out, width=150))
    done.kills = kills
    if stop:
        (run / schedule.ASKED).touch()
    code = done.run()
    assert (code == 0) != stop, out.getvalue()
    assert "Traceback" not in out.getvalue()
    return done


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def _check(recipe: Recipe[Any], run: Path, steps: int = STEPS) -> None:
    """It came to its end, and all that a run leaves is there."""
    assert json.loads((run / "report.json").read_text(encoding="utf-8"))["step"] == steps
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics.read_rows(run)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(2, steps + 1, 2))
    assert rows[-1]["kind"] == "final"
    assert all(value.isfinite().all() for value in _weights(run).values() if value.is_floating_point())
    recipe.load()(checkpoint.read_state(run, recipe.settings).settings, run).read(run)


@EVERY
def test_every_recipe_has_a_tiny_configuration(name: str) -> None:
    assert name in tiny.TINY, f"add the recipe {name!r} to tests/recipes/tiny.py"


def _alone(recipe: Recipe[Any], run: Path, *, stop: bool = False) -> None:
    with contextlib.redirect_stdout(io.StringIO()), headwater.connect("inproc://", rank=0, world=1, servers=2) as ps:
        worker = Trainer(recipe, run, ps)
        worker.stopping = stop
        worker.run()
        worker.optimizer.close()


@EVERY
def test_one_worker_stops_and_goes_on_with_the_same_bits(
    name: str, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """In this process, so that it is quick; the same with processes is among what ``make test-recipes`` tries."""
    recipe = RECIPES[name]
    whole, parts = (prepared(name, tmp_path / each, steps=4, workers=1) for each in ("whole", "parts"))
    _alone(recipe, whole)
    _alone(recipe, parts, stop=True)
    assert checkpoint.read_state(checkpoint.newest(parts) or parts, recipe.settings).step == 2
    (parts / schedule.NAME).unlink()
    _alone(recipe, parts)
    expected, found = _weights(whole), _weights(parts)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@LONG
@EVERY
def test_two_workers_stop_and_go_on_with_the_same_bits(
    name: str, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    whole, parts = (prepared(name, tmp_path / each) for each in ("whole", "parts"))
    _train(recipe, whole)
    _check(recipe, whole)
    stopped = _train(recipe, parts, stop=True)
    assert {(each.step, each.reason) for each in stopped.board.finished.values()} == {(2, "stopped")}
    assert job.resume(recipe, parts, {}) == parts
    _train(recipe, parts)
    _check(recipe, parts)
    expected, found = _weights(whole), _weights(parts)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@LONG
@EVERY
@pytest.mark.parametrize("sync", ["stale:1", "async"])
def test_it_trains_under_the_other_policies(
    name: str, sync: str, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    run = prepared(name, tmp_path / "run", sync=sync, publish_every=4, snapshots=str(tmp_path / "snapshots"))
    done = _train(recipe, run)
    assert done.board.published == f"step-{STEPS}"
    _check(recipe, run)


@LONG
@EVERY
def test_a_server_is_killed_and_it_goes_on_with_the_same_bits(
    name: str, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    whole, run = (prepared(name, tmp_path / each, replicas=2, steps=40) for each in ("whole", "run"))
    _train(recipe, whole)
    _train(recipe, run, kills="server 0")
    assert "was killed by SIGKILL" in (run / "events.jsonl").read_text(encoding="utf-8")
    _check(recipe, run, steps=40)
    expected, found = _weights(whole), _weights(run)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


@LONG
@EVERY
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_is_killed_and_another_takes_its_place(
    name: str, rank: int, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    run = prepared(name, tmp_path / "run", elastic=True, steps=40)
    done = _train(recipe, run, kills=f"worker {rank}")
    assert "it is started again (1 of 3)" in (run / "events.jsonl").read_text(encoding="utf-8")
    assert {each.step for each in done.board.finished.values()} == {40}
    _check(recipe, run, steps=40)


@LONG
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sync", ["bulk", "stale:1", "async"])
def test_who_takes_a_place_trains_on_where_the_others_are(
    sync: str, rank: int, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """A run that is long enough for a process to start in it."""
    changes = {"elastic": True, "steps": 4000, "save_every": 500, "validate_every": 500, "log_every": 100}
    run = prepared("linear", tmp_path / "run", sync=sync, **changes)
    done = _train(RECIPES["linear"], run, kills=f"worker {rank}")
    assert 0 < done.board.started[rank].step < 4000
    assert 0 < done.board.started[1 - rank].step + 1 < 100
    assert {each.step for each in done.board.finished.values()} == {4000}
    rows = [row["step"] for row in metrics.read_rows(run) if row["kind"] == "step"]
    assert rows == list(range(100, 4001, 100))
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["r2"] == pytest.approx(report["baseline"]["closed_form"]["r2"], abs=0.03)


class _Murderer(job.Job[Any]):
    """Kills rank 1 whenever it begins to train."""

    def _line(self, process: Process, stream: str, line: str) -> None:
        super()._line(process, stream, line)
        said = reports.hear(line)
        if isinstance(said, reports.Started) and said.rank == 1:
            os.kill(process.pid, signal.SIGKILL)


@LONG
def test_who_dies_again_and_again_ends_the_run_which_is_saved(prepared: Callable[..., Path], tmp_path: Path) -> None:
    run = prepared("linear", tmp_path / "run", elastic=True, steps=10**9, log_every=100, save_every=10**9)
    out = io.StringIO()
    done = _Murderer(RECIPES["linear"], run, Console(file=out, width=150))
    assert done.run() == 128 + signal.SIGTERM, out.getvalue()
    assert "w1 has died 4 times; the others are told to save and to end" in out.getvalue()
    saved = checkpoint.newest(run)
    assert saved is not None
    assert f"step {int(saved.name)} is saved in {run}" in out.getvalue()
    assert int(saved.name) == done.board.finished[0].step
