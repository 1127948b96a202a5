"""`headwater train linear` through real servers: β comes to the closed form's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from headwater.errors import BadInput, DataError, UsageError
from headwater_recipes.common import job
from headwater_recipes.linear.serving import ServedRegression
from headwater_recipes.linear.settings import RECIPE, LinearSettings
from headwater_recipes.linear.task import Linear
from tests.recipes.data import need

QUICK: dict[str, Any] = {"steps": 300, "warmup": 5, "validate_every": 100, "precision": "float32"}


def _trained(folder: Path, **settings: Any) -> tuple[Path, dict[str, Any]]:
    run = job.prepare(RECIPE, LinearSettings(**{**QUICK, **settings}), folder, Console(quiet=True))
    assert job.Job(RECIPE, run, Console(quiet=True)).run() == 0
    return run, json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_two_workers_come_to_the_closed_form_of_people(tmp_path: Path) -> None:
    need("diabetes")
    run, report = _trained(tmp_path / "run", data=("diabetes",), steps=1000)
    assert report["largest_beta_difference"] < 1e-3
    assert report["r2"] == pytest.approx(report["baseline"]["closed_form"]["r2"], abs=1e-4)
    assert report["r2"] > 0.45 > 0.01 > report["baseline"]["mean"]["r2"]
    assert report["beta_true"] is None
    assert (run / report["pictures"][0]).read_bytes().startswith(b"\x89PNG")
    assert {"weight", "bias", "mean", "scale", "target"} == set(load_file(run / "model.safetensors"))


def test_of_a_table_that_was_made_beta_is_the_true_one(tmp_path: Path) -> None:
    run, report = _trained(tmp_path / "run", rows=600, features=4, noise=0.1, batch=1000)
    true, found = (np.array(list(report[name].values())) for name in ("beta_true", "beta"))
    assert np.abs(true - found).max() < 0.05
    assert report["r2"] > 0.98
    model = Linear(LinearSettings(), run).read(run)
    held = Linear(LinearSettings(), run).split.held_out
    with torch.no_grad():
        said = model.predict(torch.from_numpy(held.x)).numpy()
    assert ((said - held.y) ** 2).mean() == pytest.approx(report["mse"])
    served, answerer = ServedRegression.read(run)
    shuffled = {"data": {name: held.x[:, i].tolist() for i, name in reversed([*enumerate(held.names)])}}
    for form in (shuffled, held.x.tolist()):
        x = answerer.inputs(json.dumps(form).encode(), "application/json")
        assert answerer.answer(served, x, {}) == pytest.approx(said.tolist())


def test_the_ranks_share_each_steps_rows(tmp_path: Path) -> None:
    for batch, total in ((1000, 480), (30, 60)):
        folder = tmp_path / str(batch)
        settings = LinearSettings(rows=600, batch=batch)
        job.prepare(RECIPE, settings, folder, Console(quiet=True))
        tasks = [Linear(settings, folder, rank, 2) for rank in (0, 1)]
        rows = [task.batches(7)[0].inputs[1].tolist() for task in tasks]
        assert len(rows[0]) + len(rows[1]) == total
        assert rows[0] == tasks[0].batches(7)[0].inputs[1].tolist()
        held = [y for task in tasks for each in task.held_out(True) for y in each.inputs[1].tolist()]
        assert sorted(held) == sorted(tasks[0].split.held_out.y)
    assert rows[0] != tasks[0].batches(8)[0].inputs[1].tolist()


def test_steps_or_minutes() -> None:
    assert LinearSettings.of({}).steps == 1000
    assert LinearSettings.of({"minutes": 1.0}).steps is None
    with pytest.raises(UsageError, match="--steps and --minutes"):
        LinearSettings.of({"minutes": 1.0, "steps": 5}).check()


def test_a_files_name_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = Console(quiet=True)
    assert LinearSettings.look_up({"data": ("diabetes",)}, quiet) == {"data": ("diabetes",)}
    assert LinearSettings.look_up({"data": ("a.csv",)}, quiet) == {"data": (str(tmp_path / "a.csv"),)}
    assert LinearSettings.look_up({}, quiet) == {}


@pytest.mark.parametrize(
    ("inputs", "told", "status"),
    [
        ({"data": {"a": [1]}}, "this model takes", 400),
        ({"data": {"a": [1], "b": [1], "c": [1]}}, "this model takes", 400),
        ({"data": {"a": [1, 2], "b": [1]}}, "columns must be lists of the same length", 400),
        ({"data": {"a": 1, "b": 1}}, "columns must be lists of the same length", 400),
        ({"data": {"a": [], "b": []}}, "this model takes", 400),
        ([[1, 2], [1]], "row 2: this model takes", 400),
        ([[1, "2"]], "row 1 holds something that is no finite number", 400),
        ([[1, True]], "row 1 holds something that is no finite number", 400),
        ([[1, float("nan")]], "row 1 holds something that is no finite number", 400),
        ("text", "this model takes", 400),
        ([[1, 2]] * 100_001, "100,001 rows; at most 100,000", 413),
    ],
)
def test_what_the_server_refuses(inputs: Any, told: str, status: int) -> None:
    with pytest.raises(BadInput, match=told) as caught:
        ServedRegression(["a", "b"]).inputs(json.dumps(inputs).encode(), "application/json")
    assert caught.value.status == status


def test_what_is_no_json_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        ServedRegression(["a", "b"]).inputs(b"\x89PNG", "image/png")
    assert caught.value.status == 415
    (tmp_path / "columns.json").write_text('{"names": ["a"]}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="the model cannot be read"):
        ServedRegression.read(tmp_path)
