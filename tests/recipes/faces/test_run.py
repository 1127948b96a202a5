"""A whole run on real faces, through servers; the figures; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from headwater.errors import DataError, UsageError
from headwater_recipes.common import plain
from headwater_recipes.faces import data, model, report
from headwater_recipes.faces.serving import FacesServed
from headwater_recipes.faces.settings import RECIPE, FacesSettings
from headwater_recipes.images.store import Images, Split
from tests.recipes.data import need
from tests.recipes.runs import SAID, train

TINY: dict[str, Any] = {
    "steps": 30,
    "batch": 24,
    "each": 3,
    "lr": 5e-3,
    "warmup": 4,
    "size": 32,
    "log_every": 10,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen of the forty people."""
    source, folder = need(data.ORL), tmp_path_factory.mktemp("people")
    for number in range(1, 17):
        (folder / f"s{number}").symlink_to(source / f"s{number}")
    return folder


@pytest.fixture(scope="module")
def run(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two workers and two servers."""
    return train(RECIPE, FacesSettings(data=(str(people),), **TINY), tmp_path_factory.mktemp("run") / "run")


def test_people_never_seen_are_recognised(run: Path) -> None:
    found = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert found["step"] == 30
    assert (found["validation_people"], found["validation_images"]) == (4, 40)
    assert found["validation_rank_1"] > 0.6  # one of four is what guessing gives
    assert found["validation_roc_auc"] > 0.75
    assert found["validation_equal_error_rate"] < 0.35
    assert found["baseline"]["pixels_rank_1"] > 0.6
    assert found["baseline"]["eigenfaces_roc_auc"] > 0.75
    assert found["largest_difference_of_saved_model"] < 1e-4
    for name in (*found["pictures"], "loss.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 400
    said = (run / SAID).read_text(encoding="utf-8")
    assert "12 people in 120 images to train on, 4 people in 40 held out" in said
    assert "Traceback" not in said
    assert "Warning" not in said


def test_one_plain_process_comes_to_the_same_figures(run: Path) -> None:
    """To the last bit, running statistics too; a step less makes a difference."""
    threads = torch.get_num_threads()
    try:
        alone = plain.in_one_process(RECIPE.load(), run, 1, None)
        other = plain.in_one_process(RECIPE.load(), run, 1, 29)
    finally:
        torch.set_num_threads(threads)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    del report["training_seconds"]
    assert alone["largest_difference"] == 0
    assert {"step": alone["steps"], **alone["figures"]} == report | {"largest_difference_of_saved_model": None}
    assert other["largest_difference"] > 1e-4


def test_the_ecosystem_loads_it_and_sees_the_same_pixels(run: Path, people: Path) -> None:
    loaded, processor = AutoModel.from_pretrained(run).eval(), AutoImageProcessor.from_pretrained(run)
    served, ours = FacesServed.read(run)
    path = people / "s3" / "2.pgm"
    with Image.open(path) as image, torch.no_grad():
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        both = loaded(pixel_values=torch.cat([pixels, pixels.flip(3)])).pooler_output.flatten(1)
        vector = torch.nn.functional.normalize(both).mean(0)
        answer = ours.answer(served, ours.inputs(path.read_bytes(), "image/x-portable-graymap"), {})
    assert answer == pytest.approx((vector / vector.norm()).tolist(), abs=1e-5)


def _split(*labels: int) -> Split:
    return Split(np.zeros((len(labels), 4, 4, 1), np.uint8), np.array(labels, np.int64))


def test_nobody_is_on_both_sides_and_the_seed_says_who_is_held_out() -> None:
    split = _split(*(person for person in range(40) for _ in range(10)))
    names = [f"s{person}" for person in range(40)]
    sides = [data.apart(names, split, seed) for seed in (0, 0, 1)]
    for images in sides:
        assert set(images.training.labels) | set(images.held_out.labels) == set(range(40))
        assert not set(images.training.labels) & set(images.held_out.labels)
        assert len(set(images.held_out.labels)) == 10
    first, again, other = (set(images.held_out.labels) for images in sides)
    assert first == again != other


@pytest.mark.parametrize(
    ("labels", "words"),
    [((0, 0, 1, 1, 2, 2), "3 people are too few"), ((0, 0, 1, 1, 2, 3, 3), "of 'c' there is 1 image")],
)
def test_people_that_nothing_can_be_learnt_from_are_refused(labels: tuple[int, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        data.apart("abcd"[: max(labels) + 1], _split(*labels), 0)


def test_a_batch_of_one_person_is_refused() -> None:
    with pytest.raises(UsageError, match="must hold two people or more"):
        FacesSettings(batch=6, each=4).check()


def test_a_batch_holds_some_images_of_some_people(run: Path) -> None:
    task = RECIPE.load()(FacesSettings(**{**TINY, "batch": 9}), run, 1, 2)
    (batch,) = task.batches(3)
    _, labels = batch.inputs
    assert sorted(torch.unique(labels, return_counts=True)[1].tolist()) == [3, 3, 3]
    (again,) = task.batches(3)
    assert torch.equal(batch.inputs[0], again.inputs[0])
    assert not torch.equal(batch.inputs[0], task.batches(4)[0].inputs[0])


def test_the_loss_is_the_papers() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        alike = {j: (float(vectors[i] @ vectors[j]) - 0.2 * (labels[i] == labels[j]).item()) / 0.5 for j in others}
        whole = np.log(sum(np.exp(value) for value in alike.values()))
        same = [alike[j] - whole for j in others if labels[i] == labels[j]]
        expected -= sum(same) / max(1, len(same))
    assert model.contrast(vectors, labels, margin=0.2, temperature=0.5).item() == pytest.approx(expected, rel=1e-5)


def _on_a_circle(*degrees: float) -> report.Vectors:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_figures_of_a_case_that_can_be_counted() -> None:
    labels = np.array([0, 0, 1, 1])
    apart = _on_a_circle(0, 10, 90, 100)
    assert report.rank_1(apart, labels) == 1.0
    assert report.verification(apart, labels)[:2] == (0.0, 1.0)
    # With the first of each known, 0 and 90, 55 lies next to a stranger; with the second, 55 and 100, none does.
    crossed = _on_a_circle(0, 55, 90, 100)
    assert report.rank_1(crossed, labels) == pytest.approx((1 / 2 + 1) / 2)
    # Pairs of one person are 10 and 55 degrees apart, of two 35, 45, 90, 100.
    equal, area, _ = report.verification(crossed, labels)
    assert area == pytest.approx(6 / 8)
    assert equal == pytest.approx(1 / 2)


def test_eigenfaces_are_those_of_the_training_people() -> None:
    random = np.random.default_rng(0)
    training, held_out = (
        Split(random.integers(0, 255, (count, 8, 8, 1), dtype=np.uint8), np.arange(count)) for count in (30, 8)
    )
    found = report.baselines(Images(("a",) * 30, training, held_out))
    for vectors in found.values():
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(8))
    alone = report.baselines(Images(("a",) * 30, training, Split(held_out.pixels[:2], held_out.labels[:2])))
    for name, vectors in alone.items():
        assert vectors == pytest.approx(found[name][:2])
