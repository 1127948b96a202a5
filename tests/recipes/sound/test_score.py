"""Measures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from headwater_recipes.sound.score import equal_error_rate, scores


def test_scores() -> None:
    labels, told = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    found = scores(told, labels)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    # A label that nobody says is not counted as a miss.
    assert scores(np.array([0, 2]), np.array([0, 0]))["macro_f1"] == pytest.approx(2 / 3)


def test_equal_error_rate() -> None:
    labels = np.array([0, 1, 2, 0])
    perfect = np.full((4, 3), 0.05)
    perfect[np.arange(4), labels] = 0.9
    assert equal_error_rate(np.log(perfect), labels) == 0
    assert equal_error_rate(np.log(np.full((4, 3), 1 / 3)), labels) == pytest.approx(0.5)
    # Of four targets one scores below the highest of four others: 1 of 4 missed, 1 of 4 let through.
    mixed = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    assert equal_error_rate(np.log(mixed), np.array([0, 1, 0, 1])) == pytest.approx(0.25)


def test_certainty_of_one_is_no_infinity() -> None:
    assert equal_error_rate(np.array([[0.0, -800.0], [-800.0, 0.0]]), np.array([0, 1])) == 0
