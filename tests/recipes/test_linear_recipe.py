"""A recipe that is not about text, installed as a package of its own: one entry point makes it a command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from headwater_recipes.common import checkpoint, metrics
from tests.recipes.linear_recipe import LinearSettings

RECIPE = Path(__file__).with_name("linear_recipe.py")
NOISE = 0.1
BOUND = 1.1 * NOISE**2
"""Of the mean squared error: little above the noise, which no model can be below for long. Without a fit it is 30."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install`` leaves of a package with this recipe."""
    place = tmp_path_factory.mktemp("site")
    shutil.copy(RECIPE, place)
    described = place / "linear_recipe-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: linear-recipe\nVersion: 1.0\n", encoding="utf-8")
    (described / "entry_points.txt").write_text(
        "[headwater.commands]\ntrain.plane = linear_recipe:train\n", encoding="utf-8"
    )
    return place


def _headwater(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "150", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "headwater", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_its_settings_are_its_options(package: Path) -> None:
    shown = _headwater(package, "train", "plane", "--help").stdout
    assert "Fit y = βx." in shown
    assert "Standard deviation of y around the plane. Default: 0.1." in shown
    assert "Samples per worker and step. Default: 4." in shown  # of all recipes
    assert "runs/plane-DATE-TIME" in shown
    assert "--seq" not in shown
    assert "plane" in _headwater(package, "train", "--help").stdout
    refused = _headwater(package, "train", "plane", "--noise", "0")
    assert refused.returncode == 1
    assert "--noise 0.0: must be above 0; nothing was started" in refused.stderr


def test_two_workers_and_two_servers_train_it_and_go_on(package: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = ["--workers", "2", "--servers", "2", "--log-every", "20", "--publish-every", "50"]
    done = _headwater(package, "train", "plane", "--run", str(run), "--steps", "100", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples/s" in done.stdout
    assert "trained 100 steps in" in done.stdout
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 100
    assert report["validation_loss"] < 10 * BOUND

    done = _headwater(package, "train", "plane", "--run", str(run), "--resume", "--steps", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 200
    assert report["validation_loss"] < BOUND
    rows = metrics.read_rows(run)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(20, 201, 20))
    assert all("samples_per_second" in row for row in rows if row["kind"] == "step")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = checkpoint.read_state(checkpoint.newest(run) or run, LinearSettings).settings
    assert (settings.workers, settings.steps, settings.publish_every) == (2, 200, 50)
    found = load_file(run / "model.safetensors")
    assert [round(value, 1) for value in (*found["weight"][0].tolist(), *found["bias"].tolist())] == [1, -2, 3, 4]
