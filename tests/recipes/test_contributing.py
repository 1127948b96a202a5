"""The package that ``CONTRIBUTING.md`` shows is put together from the page, trained through servers, and served."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import headwater
from tests.recipes.test_linear_recipe import Server

PAGE = Path(headwater.__file__).parents[2] / "CONTRIBUTING.md"
FILE = re.compile(r"^`([\w./]+)`: [^\n]*\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install`` leaves of the page's files."""
    place = tmp_path_factory.mktemp("site")
    files = dict(FILE.findall(PAGE.read_text(encoding="utf-8")))
    assert set(files) == {"pyproject.toml", "prices/__init__.py", "prices/task.py"}
    (place / "prices").mkdir()
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    described = place / f"{project['name']}-{project['version']}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    points = project["entry-points"]["headwater.commands"]
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (described / "entry_points.txt").write_text("".join(["[headwater.commands]\n", *lines]), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The price falls with the distance by a curve, and a metre costs less the farther: no plane fits it."""
    random = np.random.default_rng(0)
    area, rooms = random.uniform(30, 200, 1000), random.integers(1, 7, 1000)
    distance = random.exponential(8, 1000)
    price = 1500 * area * np.exp(-distance / 8) + 15000 * rooms + random.normal(0, 4000, 1000)
    path = tmp_path_factory.mktemp("data") / "houses.csv"
    rows = "".join(f"{a:.1f},{p:.0f},{r},{d:.2f}\n" for a, p, r, d in zip(area, price, rooms, distance, strict=True))
    path.write_text("area,price,rooms,distance\n" + rows, encoding="utf-8")
    return path


def _headwater(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "150", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "headwater", *words], env=environment, capture_output=True, text=True, check=False
    )


def test_the_pages_recipe_trains_beats_its_baseline_goes_on_and_is_served(
    package: Path, houses: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = _headwater(package, "train", "prices", "--data", str(houses), "--run", str(run), "--steps", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"on held-out data: r2 0\.9\d+, mae [\d.e+]+\n  beside it, linear regression: r2 0\.", done.stdout)
    assert "model.safetensors, predicted.png, metrics.jsonl" in done.stdout
    assert (run / "predicted.png").read_bytes().startswith(b"\x89PNG")
    done = _headwater(package, "train", "prices", "--run", str(run), "--resume", "--steps", "400")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 400
    assert report["r2"] > 0.96 > 0.9 > report["baseline"]["linear regression"]["r2"]
    assert report["mae"] < 0.5 * report["baseline"]["linear regression"]["mae"]
    server = Server(package, run, "--static")
    try:
        status, version, said = server.ask([[100.0, 3, 1.0]])
        assert (status, version) == (200, "step-400")
        assert said == pytest.approx([1500 * 100 * np.exp(-1 / 8) + 45000], rel=0.15)
        status, _, told = server.ask([[100.0, 3]])
        assert status == 400
        assert "row 1: this model takes" in told["error"]
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate()


def test_the_pages_recipe_is_listed_and_refuses_what_it_cannot_learn_from(
    package: Path, houses: Path, tmp_path: Path
) -> None:
    rows = {row["command"]: row for row in json.loads(_headwater(package, "recipes", "--json").stdout)}
    assert rows["headwater train prices"]["baseline"] == "linear regression"
    refused = _headwater(
        package, "train", "prices", "--run", str(tmp_path / "run"), "--data", str(houses), "--target", "cost"
    )
    assert refused.returncode == 1
    assert "no column 'cost', but area, price, rooms, distance; nothing was started" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
