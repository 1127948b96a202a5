"""A whole run on squares and round things, through servers; what answers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image
from rich.console import Console

from headwater.errors import BadInput, DataError, UsageError
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.tasks import TaskModel
from headwater_recipes.common import job
from headwater_recipes.detection.serving import DetectionServed
from headwater_recipes.detection.settings import RECIPE, DetectionSettings
from tests.gateway.http_fakes import PATIENCE, running
from tests.recipes.data import need
from tests.recipes.runs import SAID, train
from tests.recipes.tiny import squares


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detection")
    settings = DetectionSettings(
        data=(str(squares(folder, 40)),), tile=64, width=8, batch=6, steps=120, warmup=5, lr=6e-3, log_every=40,
        validate_every=60,
    )  # fmt: skip
    return train(RECIPE, settings, folder / "run")


def test_squares_and_round_things_are_found_where_none_was_seen(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["validation_boxes"] == 12
    assert report["validation_map_50"] > 0.6
    for beside in report["baseline"].values():
        assert report["validation_map_50"] > beside["map_50"] + 0.2
        assert report["validation_map_50_95"] > beside["map_50_95"] + 0.1
    assert report["largest_difference_of_saved_model"] < 1e-4
    for picture in (*report["pictures"], "loss.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    said = (run / SAID).read_text(encoding="utf-8")
    assert "round, square; 37 images with 148 boxes to learn from, 3 images with 12 boxes held out" in said
    assert "Traceback" not in said
    assert "Warning" not in said


def test_it_answers_in_hugging_face_s_form(run: Path, tmp_path: Path) -> None:
    squares(tmp_path, 1)
    body = (tmp_path / "0.png").read_bytes()
    model, served = DetectionServed.read(run)
    with running(TaskModel(Live(model, Still("run", 120), retry=0.01), served)) as server:
        client = InferenceClient(model=server.url, timeout=PATIENCE)
        found: Any = client.object_detection(body, threshold=0.2)
        assert len(client.object_detection(body, threshold=1.0)) == 0  # type: ignore[arg-type]
    assert {each.label for each in found} <= {"round", "square"}
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    lines = (tmp_path / "boxes.csv").read_text(encoding="utf-8").split("\n")[1:5]
    for line in lines:
        left, top, right, bottom = map(int, line.split(",")[1:5])
        assert any(
            abs(each.box.xmin - left)
            + abs(each.box.ymin - top)
            + abs(each.box.xmax - right)
            + abs(each.box.ymax - bottom)
            < 16
            for each in found
        )


def test_a_request_that_is_no_image_and_an_image_of_one_pixel(run: Path, tmp_path: Path) -> None:
    model, served = DetectionServed.read(run)
    with pytest.raises(BadInput, match="cannot be read"):
        served.inputs(b"\x89PNG no", "image/png")
    with pytest.raises(BadInput, match="takes the bytes of an image"):
        served.inputs(b"a text", "text/plain")
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    pixel = served.inputs((tmp_path / "one.png").read_bytes(), "image/png")
    assert served.answer(model, pixel, {"threshold": 0.99}) == []
    for bad in (2, -1, "0.5", True):
        with pytest.raises(BadInput, match="it is a number of 0 to 1"):
            served.answer(model, pixel, {"threshold": bad})


def test_what_cannot_work_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(UsageError, match="tile=100 is not a multiple of 16"):
        DetectionSettings(tile=100).check()
    with pytest.raises(DataError, match="fewer than the 40 workers"):
        job.prepare(RECIPE, DetectionSettings(data=(str(squares(tmp_path, 8)),), workers=40), tmp_path / "run", quiet)
    need("tree-crowns")
    run = job.prepare(RECIPE, DetectionSettings(steps=1), tmp_path / "trees", quiet)
    task = RECIPE.load()(DetectionSettings(steps=1), run, 0, 2)
    first, again, other = (
        RECIPE.load()(DetectionSettings(steps=1), run, rank, 2).batches(3)[0].inputs for rank in (0, 0, 1)
    )
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert task.loss(task.build(), task.batches(0)[0]).item() > 0


def test_a_detector_that_has_diverged_answers_nothing_that_looks_like_an_answer(run: Path) -> None:
    model, served = DetectionServed.read(run)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="its training has diverged"):
        served.answer(model, np.zeros((64, 64, 3), np.uint8), {})
