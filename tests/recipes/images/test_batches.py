"""Which images come when, and how they are varied."""

from __future__ import annotations

import numpy as np
import pytest

from headwater_recipes.common.scores import confusion_matrix
from headwater_recipes.images.batches import Augment, Order, vary


def test_an_epoch_of_all_ranks_visits_every_image_once() -> None:
    orders = [Order(24, 3, rank, 2, seed=1) for rank in range(2)]
    first = np.concatenate([order.places(step) for step in range(4) for order in orders])
    second = np.concatenate([order.places(step) for step in range(4, 8) for order in orders])
    assert sorted(first) == sorted(second) == list(range(24))
    assert first.tolist() != second.tolist()
    assert Order(24, 3, 1, 2, seed=1).places(5).tolist() == orders[1].places(5).tolist()
    assert Order(24, 3, 1, 2, seed=2).places(5).tolist() != orders[1].places(5).tolist()


@pytest.mark.parametrize("kind", ["none", "shift", "flip"])
def test_images_are_moved_and_mirrored(kind: Augment) -> None:
    pixels = np.zeros((400, 28, 28, 1), np.uint8)
    pixels[:, 14, 10:13] = [[50], [100], [150]]
    before = pixels.copy()
    found = vary(pixels, kind, np.random.default_rng(0))
    assert (pixels == before).all()
    assert (np.sort(found.reshape(400, -1)) == np.sort(pixels.reshape(400, -1))).all()
    rows, columns = np.argwhere(found == 100)[:, 1:3].T
    mirrored = (found[np.arange(400), rows, columns - 1, 0] == 150).mean()
    reach = {"none": {11}, "shift": {9, 10, 11, 12, 13}, "flip": {*range(9, 19)}}[kind]
    assert set(columns) == reach
    assert set(rows) == ({14} if kind == "none" else {12, 13, 14, 15, 16})
    assert 0.4 < mirrored < 0.6 if kind == "flip" else mirrored == 0


def test_rows_of_a_confusion_matrix_are_the_truth() -> None:
    assert confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 3).tolist() == [[0, 2, 0], [0, 1, 0], [0, 0, 0]]


def test_a_warped_image_is_the_same_thing_seen_otherwise() -> None:
    pixels = np.full((200, 30, 30, 3), 100, np.uint8)
    pixels[:, 5:25, 18:22] = 200  # a bar right of the middle
    found = vary(pixels, "warp", np.random.default_rng(0))
    assert found.shape == pixels.shape
    assert found.dtype == np.uint8
    hidden = (found == 128).all(-1).sum((1, 2))
    assert (hidden >= 100).all()
    assert len({image.tobytes() for image in found}) == 200
    brightest = found.mean(-1).mean(1).argmax(1)
    assert 0.3 < (brightest < 15).mean() < 0.7  # mirrored
    assert (vary(pixels, "warp", np.random.default_rng(0)) == found).all()
