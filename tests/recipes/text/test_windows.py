from __future__ import annotations

import numpy as np
import pytest
import torch

from headwater.errors import DataError
from headwater_recipes.text.windows import Windows

TOKENS = np.arange(1000, dtype=np.uint16)


def test_targets_are_the_inputs_successors() -> None:
    inputs_bt, targets_bt = Windows(TOKENS, 8, 3, 0, 1, seed=0).batch(5)
    assert inputs_bt.shape == targets_bt.shape == (3, 8)
    assert inputs_bt.dtype == torch.int64
    assert torch.equal(inputs_bt + 1, targets_bt)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_visits_every_window_once_over_all_ranks(world: int) -> None:
    ranks = [Windows(TOKENS, 10, 1, rank, world, seed=4) for rank in range(world)]
    count = 1000 // 10 - 1
    drawn = [ranks[i % world].starts(i // world)[0] for i in range(2 * count)]
    for epoch in (drawn[:count], drawn[count:]):
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 10 * count, 10))
    assert drawn[:count] != drawn[count:]
    assert max(drawn) + 10 < len(TOKENS)


def test_a_step_can_be_drawn_again_without_those_before_it() -> None:
    running = Windows(TOKENS, 10, 4, 1, 2, seed=7)
    drawn = [running.starts(step) for step in range(40)]
    assert Windows(TOKENS, 10, 4, 1, 2, seed=7).starts(33) == drawn[33]
    assert Windows(TOKENS, 10, 4, 1, 2, seed=8).starts(33) != drawn[33]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="1000 tokens, too few for windows of 600"):
        Windows(TOKENS, 600, 1, 0, 1, seed=0)
