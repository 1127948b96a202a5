from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from headwater_recipes.common.task import add
from headwater_recipes.text import perplexity
from headwater_recipes.text.score import Score
from headwater_recipes.text.tokenizer import Arrays

ARRAYS = Arrays(
    np.array([1, 1, 2, 3, 1, 0], np.uint16),
    np.array([1, 2, 1, 3, 0, 2, 1], np.uint16),
    np.array([0, 1, 2, 3], np.int64),
)


class _Uniform(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))


def _score(places: list[int]) -> Score:
    parts = [
        Score(perplexity.nats(_Uniform(), batch).item(), batch.learnt, perplexity.nbytes(ARRAYS, batch))
        for batch in perplexity.batches(ARRAYS, places, 3)
    ]
    return Score(*map(sum, zip(*parts, strict=True)))  # type: ignore[arg-type]


def test_every_held_out_token_but_the_first_is_predicted_once() -> None:
    places = perplexity.starts(ARRAYS, 3)
    assert places == [0, 3]
    score = _score(places)
    assert score.tokens == 6
    assert score.nbytes == 2 + 1 + 3 + 0 + 2 + 1
    assert score.loss == pytest.approx(math.log(4))
    assert score.bits_per_byte == pytest.approx(6 * 2 / 9)


def test_parts_add_up() -> None:
    places = perplexity.starts(ARRAYS, 3)
    parts = [_score(places[rank::2]) for rank in range(2)]
    whole = _score(places)
    total = Score(**add(each._asdict() for each in parts))  # type: ignore[arg-type]
    assert total.nats == pytest.approx(whole.nats)
    assert total[1:] == whole[1:]


def test_the_unigram_baseline_by_hand() -> None:
    frequency = {0: 2 / 10, 1: 4 / 10, 2: 2 / 10, 3: 2 / 10}  # counts 1, 3, 1, 1, one added to each
    found = perplexity.unigram(ARRAYS, perplexity.starts(ARRAYS, 3), 3)
    assert found.nats == pytest.approx(-sum(math.log(frequency[t]) for t in (2, 1, 3, 0, 2, 1)))
    assert (found.tokens, found.nbytes) == (6, 9)


def test_a_few_windows_are_spread_over_the_text() -> None:
    arrays = ARRAYS._replace(validation=np.zeros(101, np.uint16))
    assert perplexity.starts(arrays, 10, 4) == [0, 20, 50, 70]
    assert perplexity.fits(arrays, 200) == 100
    assert perplexity.starts(arrays, perplexity.fits(arrays, 200)) == [0]
