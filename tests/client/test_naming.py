"""What tables are called: by order of making, and never what somebody else's is called."""

from __future__ import annotations

import gc

import pytest

from headwater.client.naming import Names
from headwater.errors import TableConflict


class Optimizer:
    pass


def test_names_come_in_the_order_of_making() -> None:
    names, made = Names(), [Optimizer() for _ in range(3)]
    for optimizer, name in zip(made, ("model", "model2", "model3"), strict=True):
        assert names.choose(None, False, {}) == name
        names.take(name, optimizer)


def test_a_name_that_was_used_is_not_given_again() -> None:
    names, first = Names(), Optimizer()
    names.take("model", first)
    names.release("model")
    assert names.choose(None, False, {}) == "model2"
    assert names.choose(None, False, {"model2": 1}) == "model3", "nor that of a table which the client uses otherwise"


def test_an_optimizer_that_was_not_made_leaves_its_name() -> None:
    names = Names()
    assert names.choose(None, False, {}) == "model"
    assert names.choose(None, False, {}) == "model"


def test_resumed_without_a_name_they_go_on_in_the_order_of_making() -> None:
    names, made = Names(), [Optimizer() for _ in range(4)]
    for name, optimizer in zip(("model", "model2"), made, strict=False):
        names.take(name, optimizer)
        names.release(name)
    for name, optimizer in zip(("model", "model2"), made[2:], strict=True):
        assert names.choose(None, True, {}) == name
        names.take(name, optimizer)


@pytest.mark.parametrize("resume", [False, True])
def test_two_live_optimizers_cannot_have_one_name(resume: bool) -> None:
    names, first = Names(), Optimizer()
    names.take("critic", first)
    with pytest.raises(TableConflict, match="another optimizer of this process trains table 'critic'"):
        names.choose("critic", resume, {})
    del first
    gc.collect()
    assert names.choose("critic", True, {}) == "critic", "one that is gone trains nothing"


@pytest.mark.parametrize("there", [{}, {"critic": 1}])
def test_an_earlier_table_is_gone_on_with_where_that_is_said(there: dict[str, int]) -> None:
    names, first = Names(), Optimizer()
    if not there:
        names.take("critic", first)
        names.release("critic")
    with pytest.raises(TableConflict, match=r"'critic' holds what was trained in it earlier.*resume=True"):
        names.choose("critic", False, there)
    assert names.choose("critic", True, there) == "critic"
