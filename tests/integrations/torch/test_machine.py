"""Random scripts train as in plain torch, or stop with a typed error: see ``machine``."""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

import headwater
from tests.integrations.torch import machine
from tests.integrations.torch.machine import Word
from tests.integrations.torch.support import workers

EXAMPLES = int(os.environ.get("HEADWATER_SEQUENCES", "100"))
"""Sequences of each test; HEADWATER_SEQUENCES=10000 for more."""

OFTEN = ["backward"] * 6 + ["step"] * 5 + ["zero"] * 4
ALIKE = [
    "half", "twice", "gathered", "zero_in_place", "zero_the_model", "forget_one", "give_one", "clip", "clip_values",
    "scale_data", "unscale", "replace", "norm", "write", "write_nothing", "write_data", "write_new_data",
    "write_numpy", "load", "save", "restore", "slow_down",
]  # fmt: skip
ALONE = [
    "keep", "freeze", "unfreeze", "freeze_last", "unfreeze_last", "give_own", "zero_own", "forward", "finish", "swap",
    "swap_back",
]  # fmt: skip

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
]


def scripts(words: list[str]) -> st.SearchStrategy[list[Word]]:
    return st.lists(st.tuples(st.sampled_from(words), st.integers(0, 99)), min_size=3, max_size=25)


def same(mine: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)


def play_both(words: list[Word], optimizer: tuple[Any, dict[str, Any]], times: int = 1) -> None:
    """Two workers end, each of ``times``, with what one process that plays both has."""
    kind, hyper = optimizer
    reference = machine.Several(2, lambda model: kind(model.parameters(), **hyper))
    for word, seed in words:
        reference.say(word, seed)

    def life(client: Any) -> list[torch.Tensor | None]:
        script = machine.Script(client.rank, lambda model: headwater.Optimizer(model, kind, client=client, **hyper))
        for word, seed in words:
            script.say(word, seed)
        return script.outcome()

    for _ in range(times):
        for rank, found in enumerate(workers(2, life)):
            assert same(found, reference.scripts[rank].outcome()), repr(words)


@settings(max_examples=EXAMPLES)
@given(scripts(OFTEN + ALIKE + ALONE), st.sampled_from(OPTIMIZERS))
def test_one_worker_trains_as_plain_torch(words: list[Word], optimizer: tuple[Any, dict[str, Any]]) -> None:
    kind, hyper = optimizer
    expected = machine.run_alone(words, lambda model: kind(model.parameters(), **hyper))
    try:
        found = machine.run_alone(words, lambda model: headwater.Optimizer(model, kind, **hyper))
    except headwater.ParameterModified as error:  # the graph of a "forward" over what a "swap" has left
        if "waits for its backward" not in str(error):
            raise
        assume(False)
    assert same(found, expected), repr(words)


@pytest.mark.filterwarnings("ignore:ranks 0 and 1 contributed the same")  # some scripts give the same gradients
@settings(max_examples=max(1, EXAMPLES // 2))
@given(scripts(OFTEN + [word for word in ALIKE if word != "twice"]), st.sampled_from(OPTIMIZERS))
def test_two_workers_train_as_one_process_that_plays_both(
    words: list[Word], optimizer: tuple[Any, dict[str, Any]]
) -> None:
    play_both(words, optimizer)


def test_where_a_tensor_lies_does_not_tell_whose_it_is() -> None:
    """The script's own gradient may lie where autograd's lay before: freed memory is used again, by chance."""
    words = [("gathered", 30), ("give_one", 74), ("backward", 73), ("backward", 59), ("step", 4)]
    play_both(words, OPTIMIZERS[0], times=15)


def test_what_nobody_has_a_gradient_of_has_none_whatever_the_script_makes_of_it() -> None:
    """Who looks first sees zeros; a weight that decays must not take them for a gradient."""
    play_both([("half", 0), ("replace", 0), ("step", 0), ("step", 0)], OPTIMIZERS[2])


def test_to_a_mean_beside_a_gradient_of_the_scripts_own_is_added() -> None:
    """It was given after the last backward: who goes on adding to it has it too, and all else is as under DDP."""
    words = [("backward", 0), ("give_one", 0), ("norm", 0), ("backward", 1), ("step", 0)]
    play_both(words, OPTIMIZERS[0])
