"""A whole run on a few hundred real images, through servers; and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForImageClassification

import headwater
from headwater.errors import BadInput, DataError
from headwater_recipes.common import checkpoint, job
from headwater_recipes.common.trainer import Trainer
from headwater_recipes.data import cache
from headwater_recipes.image import data, model
from headwater_recipes.image.serving import ImageServed
from headwater_recipes.image.settings import RECIPE, ImageSettings
from headwater_recipes.images.store import Images, Split
from tests.recipes.data import need
from tests.recipes.runs import SAID, train

CLASSES = ("Trouser", "Bag", "Ankle boot")

TINY: dict[str, Any] = {
    "steps": 30,
    "batch": 16,
    "lr": 1e-2,
    "warmup": 4,
    "size": 16,
    "log_every": 10,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60 and 30 images of three classes of Fashion-MNIST as a folder; one of the files is damaged."""
    images = data.read_fashion(need(data.FASHION), 28)
    folder = tmp_path_factory.mktemp("photos")
    for part, split, count in (("train", images.training, 60), ("test", images.held_out, 30)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            chosen = split.pixels[split.labels == images.classes.index(name)][:count]
            for index, pixels in enumerate(chosen):
                Image.fromarray(pixels[..., 0]).save(folder / part / name / f"{index}.png")
    (folder / "train" / "Bag" / "0.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two workers and two servers."""
    return train(RECIPE, ImageSettings(data=(str(photos),), **TINY), tmp_path_factory.mktemp("run") / "run")


def test_a_classifier_is_trained_through_servers(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 30
    assert report["validation_images"] == 90
    assert report["validation_accuracy"] > 0.8
    assert report["baseline"]["majority"] == pytest.approx(1 / 3)
    assert report["baseline"]["linear"] > 0.8
    assert report["baseline"]["linear_images"] == 179
    assert report["largest_logit_difference_of_saved_model"] < 1e-4
    assert report["pictures"] == ["confusion.png", "mistakes.png"]
    for name in (*report["pictures"], "loss.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 400
    said = (run / SAID).read_text(encoding="utf-8")
    assert "3 classes, 179 to train on, 90 held out; 1 left out as they cannot be read" in said
    assert "Traceback" not in said
    assert "Warning" not in said
    assert "shards" not in said


def test_the_ecosystem_loads_it_and_sees_the_same_pixels(run: Path, photos: Path) -> None:
    loaded = AutoModelForImageClassification.from_pretrained(run).eval()
    processor = AutoImageProcessor.from_pretrained(run)
    assert loaded.config.id2label == dict(enumerate(sorted(CLASSES)))
    served, ours = ImageServed.read(run)
    path = photos / "test" / "Trouser" / "3.png"
    with Image.open(path) as image, torch.no_grad():
        expected = loaded(**processor(image.convert("RGB"), return_tensors="pt")).logits.softmax(1)[0]
        answer = ours.answer(served, ours.inputs(path.read_bytes(), "image/png"), {})
    assert [each["label"] for each in answer] == [sorted(CLASSES)[index] for index in expected.argsort(descending=True)]
    assert [each["score"] for each in answer] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    assert answer[0]["label"] == "Trouser"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"no image", "image/png", 400),
        (b"", "application/octet-stream", 400),
        (b"{}", "application/json", 415),
        (b"hello", "text/plain", 415),
    ],
)
def test_a_request_that_is_no_image_is_refused(run: Path, body: bytes, kind: str, status: int) -> None:
    _, ours = ImageServed.read(run)
    with pytest.raises(BadInput) as caught:
        ours.inputs(body, kind)
    assert caught.value.status == status


def test_it_goes_on_and_its_images_do_not_change(run: Path) -> None:
    with pytest.raises(DataError, match="size=16, which cannot change"):
        job.resume(RECIPE, run, {"size": 32})
    job.resume(RECIPE, run, {"steps": 32})
    out = io.StringIO()
    assert job.Job(RECIPE, run, Console(file=out, width=150)).run() == 0, out.getvalue()
    assert json.loads((run / "report.json").read_text(encoding="utf-8"))["step"] == 32


def test_a_classifier_that_there_is_is_trained_on_with_a_new_head(photos: Path, tmp_path: Path) -> None:
    before = model.build(["a", "b"], seed=5)
    before.save_pretrained(tmp_path / "model")
    settings = ImageSettings(data=(str(photos),), model=str(tmp_path / "model"), **{**TINY, "workers": 1, "steps": 1})
    folder = job.prepare(RECIPE, settings, tmp_path / "run", Console(quiet=True))
    task = RECIPE.load()(settings, folder)
    begun: Any = task.build()
    assert begun.config.id2label == dict(enumerate(sorted(CLASSES)))
    assert begun.classifier[1].weight.shape == (3, 128)
    old, new = (
        each.state_dict()["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"] for each in (before, begun)
    )
    assert torch.equal(old, new)
    again: Any = task.build()
    assert torch.equal(again.classifier[1].weight, begun.classifier[1].weight)
    with headwater.connect("inproc://", rank=0, world=1, servers=1) as ps:
        worker = Trainer(RECIPE, folder, ps)
        worker.run()
        worker.optimizer.close()
    assert checkpoint.newest(folder) is not None


def test_a_model_that_is_not_there_is_refused(photos: Path, tmp_path: Path) -> None:
    settings = ImageSettings(data=(str(photos),), model=str(tmp_path), **TINY)
    with pytest.raises(DataError, match=r"--model .*Nothing was started"):
        job.prepare(RECIPE, settings, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_fashion_mnist_is_what_its_authors_say() -> None:
    need(data.FASHION)
    images = data.read(ImageSettings()).images.check(workers=2)
    assert images.training.pixels.shape == (60_000, 28, 28, 1)
    assert images.held_out.pixels.shape == (10_000, 28, 28, 1)
    assert [(images.held_out.labels == label).sum() for label in range(10)] == [1000] * 10


def test_fewer_images_than_workers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Images(("a", "b"), *(Split(images[:2], labels[:2]) for images, labels in _pair()))
    monkeypatch.setattr(cache, "folder", lambda _: tmp_path)
    monkeypatch.setattr(data, "read_fashion", lambda *_: few)
    with pytest.raises(DataError, match="2 images to train on are fewer than the 3 workers"):
        job.prepare(RECIPE, ImageSettings(workers=3), tmp_path / "run", Console(quiet=True))


def _pair() -> list[Split]:
    return [Split(np.zeros((2, 28, 28, 1), np.uint8), np.array([0, 1]))] * 2
