"""A recipe that is not about text, installed as a package of its own: one entry point makes it a command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file

import headwater
from headwater.launch import Launcher
from headwater_recipes.common import checkpoint, metrics
from headwater_recipes.common.settings import State
from tests.patience import PATIENCE
from tests.recipes.linear_recipe import Linear, LinearSettings

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


class Server:
    """``headwater serve`` as another process."""

    def __init__(self, package: Path, folder: Path, *words: str, **environment: str) -> None:
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "headwater", "serve", "--model", str(folder), "--port", "0", *words]
        self.process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout
        banner = ""
        while "to end" not in banner:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            banner += line
        self.url = next(word for word in banner.split() if word.startswith("http")).removesuffix("/v1")
        self.until(lambda _: True)

    def ask(self, inputs: Any) -> tuple[int, str, Any]:
        """Status, version, answer."""
        content = json.dumps({"inputs": inputs}).encode()
        request = Request(self.url, content, {"content-type": "application/json"})
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.headers["x-headwater-version"], json.loads(answer.read())
        except HTTPError as error:
            with error:
                return error.code, error.headers.get("x-headwater-version", ""), json.loads(error.read())

    def until(self, holds: Callable[[str], bool]) -> None:
        """It answers, by such a version."""
        tick = threading.Event()
        for _ in range(int(PATIENCE / 0.05)):
            status, version, said = self.ask([[0, 0, 0]])
            if status == 200 and holds(version):
                return
            tick.wait(0.05)
        raise AssertionError((status, version, said))

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0
        return said


@pytest.fixture
def serve(package: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(folder: Path, *words: str, **environment: str) -> Server:
        made.append(Server(package, folder, *words, **environment))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.communicate()


def write_run(folder: Path, weight: list[float], bias: float, step: int = 0) -> Path:
    """What ``headwater train plane`` leaves of a model."""
    settings = LinearSettings()
    folder.mkdir()
    checkpoint.begin(Linear.recipe, folder, settings)
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weight]))
        model.bias.fill_(bias)
    checkpoint.save(folder, model, {"state": {}, "param_groups": []}, State(step=step, settings=settings))
    return folder


def test_a_finished_run_is_served_by_its_own_recipe(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(write_run(tmp_path / "run", [1.0, -2.0, 3.0], 4.0, step=120), "--static")
    assert server.ask([[0, 0, 0], [1, 1, 1]]) == (200, "step-120", [4.0, 6.0])
    assert server.ask([1, 0, 0]) == (200, "step-120", [5.0])
    status, version, said = server.ask("much")
    assert (status, version) == (400, "step-120")
    assert said == {"error": 'this model takes rows of three numbers: {"inputs": [[1, 2, 3]]}'}
    assert "ready with version step-120 (number 0, step 120)" in server.end()


def test_a_run_that_is_trained_is_served_at_its_newest_version(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", [0.0, 0.0, 0.0], 0.0)
    with Launcher(1) as job:
        for name in ("HEADWATER_ADDRESS", "HEADWATER_TOKEN"):
            monkeypatch.setenv(name, job.environment()[name])
        model = torch.nn.Linear(3, 1)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(0.5)
        optimizer = headwater.Optimizer(model, torch.optim.SGD, lr=1.0, name=checkpoint.TABLE)
        optimizer.publish("step-0").wait()
        server = serve(run)
        assert server.ask([1, 1, 1]) == (200, "step-0", [3.5])
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.publish("step-1").wait()
        server.until(lambda version: version == "step-1")
        assert server.ask([1, 1, 1]) == (200, "step-1", [-0.5])
        server.end()
        optimizer.close()


@pytest.mark.parametrize(
    ("note", "words", "said"),
    [
        ('{"recipe": "plane"}', ["--dtype", "bfloat16"], "--dtype bfloat16: models of a recipe compute in the dtype"),
        ('{"recipe": "strange"}', [], "the recipe 'strange', which is not installed here"),
        ('{"recipe": "lm"}', [], "the recipe 'lm' (headwater_recipes.lm.commands:train) does not say how it is served"),
    ],
)
def test_a_run_that_cannot_be_served_is_refused_at_once(
    package: Path, tmp_path: Path, note: str, words: list[str], said: str
) -> None:
    run = write_run(tmp_path / "run", [0.0, 0.0, 0.0], 0.0)
    (run / "headwater.json").write_text(note, encoding="utf-8")
    done = _headwater(package, "serve", "--model", str(run), "--static", "--port", "0", *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_without_a_model_yet_is_no_model(package: Path, tmp_path: Path) -> None:
    checkpoint.begin(Linear.recipe, tmp_path, LinearSettings())
    done = _headwater(package, "serve", "--model", str(tmp_path), "--static", "--port", "0")
    assert (done.returncode, "a run of 'plane' without a model yet" in done.stderr) == (1, True)


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


def _plain(package: Path, run: Path, *words: str) -> dict[str, Any]:
    """What the run comes to without servers."""
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "headwater_recipes.common.plain", "linear_recipe:Linear", str(run), *words]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_one_plain_process_comes_to_the_same_model(package: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = _headwater(package, "train", "plane", "--run", str(run), "--minutes", "0.02", "--precision", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = _plain(package, run, "--threads", "1")  # the rates of a schedule by the clock are gone through once more
    assert alone["largest_difference"] == 0
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert alone["steps"] == report["step"]
    assert alone["figures"]["validation_loss"] == report["validation_loss"]
    assert _plain(package, run, "--threads", "1", "--steps", str(report["step"] // 2))["largest_difference"] > 1e-3
    assert _plain(package, run, "--ddp")["units_per_second"] > 0
