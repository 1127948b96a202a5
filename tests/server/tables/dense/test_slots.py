"""Optimizer state moves to a plain torch.optim optimizer and back, and training goes on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwater.errors import ShapeMismatch, UnknownOptimizer
from headwater.server.tables.base import Contribution
from tests.server.tables.dense.tools import Sharded, gradients, reference, same, table

FLAT = [(1,), (7, 3), (40000,), (33,)]
CASES: list[tuple[str, dict[str, Any], list[tuple[int, ...]]]] = [
    ("SGD", {"momentum": 0.9}, FLAT),
    ("Adam", {"amsgrad": True}, FLAT),
    ("AdamW", {}, FLAT),
    ("AdamW", {"fused": False}, FLAT),
    ("Adagrad", {"initial_accumulator_value": 0.1}, FLAT),
    ("RMSprop", {"momentum": 0.9, "centered": True}, FLAT),
    ("Adadelta", {}, FLAT),
    ("Adamax", {}, FLAT),
    ("NAdam", {}, FLAT),
    ("RAdam", {}, FLAT),
    ("Rprop", {}, FLAT),
    ("ASGD", {"t0": 1.0}, FLAT),
    ("Adafactor", {}, [*FLAT, (8, 6, 4), ()]),
    ("Muon", {}, [(8, 6), (40, 50)]),
]
SKIPPED = 1


def collect(ours: Sharded) -> dict[int, dict[str, torch.Tensor]]:
    """As a client does it: parts of all shards put together, in the parameter's shape."""
    parts: dict[tuple[int, str], list[tuple[int, torch.Tensor]]] = {}
    for shard in ours.shards:
        for parameter, name, start, tensor in shard.read_slots():
            parts.setdefault((parameter, name), []).append((start, tensor.clone()))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for (parameter, name), found in parts.items():
        found.sort(key=lambda part: part[0])
        if found[0][1].dim() == 1:
            tensor = torch.cat([part for _, part in found]).view(ours.spec.parameters[parameter].shape)
        else:
            tensor = found[0][1]
            assert all(torch.equal(tensor, part) for _, part in found)
        state.setdefault(parameter, {})[name] = tensor
    return state


def _steps(ours: Sharded, theirs: list[torch.Tensor], optimizer: torch.optim.Optimizer, seed: int, skip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(3):
        grads = gradients(ours.spec, generator)
        if skip or step == 1:
            del grads[SKIPPED]
        for index, value in enumerate(theirs):
            value.grad = grads.get(index)
        optimizer.step()
        ours.step([grads])


@pytest.mark.parametrize(("name", "hyper", "shapes"), CASES, ids=[f"{n}{h}" for n, h, _ in CASES])
def test_there_and_back(name: str, hyper: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    spec = table(name, shapes, groups=[hyper])
    start = list(gradients(spec, torch.Generator().manual_seed(0)).values())
    fused = {"fused": True} if name in ("Adam", "AdamW", "Adagrad") and "fused" not in hyper else {}
    first, theirs = Sharded(spec, 2, start), [value.clone() for value in start]
    optimizer = reference(spec, theirs, **fused)
    _steps(first, theirs, optimizer, seed=1, skip=True)
    state = collect(first)
    # Adagrad makes its state before the first step
    stepped = {i: optimizer.state[v] for i, v in enumerate(theirs) if optimizer.state[v].get("step", 1) != 0}
    _assert_state(state, {i: slots for i, slots in stepped.items() if slots})
    assert SKIPPED not in state
    assert set(first.shards[0].slot_names) | set(first.shards[1].slot_names) == {k for s in state.values() for k in s}

    second = Sharded(spec, 3, first.values(), seed=5)
    for shard in second.shards:
        for parameter, slots in state.items():
            for slot, tensor in slots.items():
                shard.write_slot(parameter, slot, 0, tensor)
    _steps(second, theirs, optimizer, seed=2, skip=False)
    assert all(same(a, b) for a, b in zip(second.values(), theirs, strict=True))
    _assert_state(collect(second), {i: optimizer.state[v] for i, v in enumerate(theirs)})


def _assert_state(state: dict[int, dict[str, torch.Tensor]], expected: dict[int, dict[str, Any]]) -> None:
    assert state.keys() == expected.keys()
    for index, slots in expected.items():
        assert state[index].keys() == {k for k, v in slots.items() if v is not None}
        for name, value in slots.items():
            if value is not None:
                wanted = torch.as_tensor(value)
                assert same(state[index][name], wanted), (index, name)
                assert state[index][name].shape == wanted.shape


@pytest.mark.parametrize("name", ["AdamW", "RAdam"])
def test_parts_of_a_slot_go_where_they_belong(name: str) -> None:
    spec = table(name, FLAT)
    ours = Sharded(spec, 3, seed=2)
    whole = torch.randn(40000, generator=torch.Generator().manual_seed(0))
    for lo, hi in ((0, 123), (123, 30000), (30000, 40000)):
        for shard in ours.shards:
            shard.write_slot(2, "step", 0, torch.tensor(3.0))
            shard.write_slot(2, "exp_avg", lo, whole[lo:hi])
    assert torch.equal(collect(ours)[2]["exp_avg"], whole)


@pytest.mark.parametrize("name", ["AdamW", "RAdam"])
def test_reset_forgets_everything(name: str) -> None:
    spec = table(name, FLAT)
    grads = gradients(spec, torch.Generator().manual_seed(0))
    fresh, used = Sharded(spec, 2, list(grads.values())), Sharded(spec, 2)
    used.step([grads])
    for shard in used.shards:
        shard.reset_slots()
        assert shard.read_slots() == []
    used.scatter(used.memories, grads)
    fresh.step([grads])
    used.step([grads])
    assert all(same(a, b) for a, b in zip(used.values(), fresh.values(), strict=True))


def test_equal_counts_are_stepped_together_again() -> None:
    spec = table("AdamW", [(16,)] * 50)
    ours = Sharded(spec, 1)
    shard = ours.shards[0]
    for index in range(50):
        shard.write_slot(index, "step", 0, torch.tensor(4.0))
    grads = gradients(spec, torch.Generator().manual_seed(0))
    ours.step([grads])
    whole = ((0, shard.size),)
    assert len(shard._planner.plan([Contribution(torch.zeros(shard.size, dtype=torch.uint8), whole)]).runs) == 1
    assert all(tensor == 5 for _, name, _, tensor in shard.read_slots() if name == "step")


@pytest.mark.parametrize(
    ("name", "has"), [("SGD", "none"), ("AdamW", "step, exp_avg, exp_avg_sq"), ("RMSprop", "step")]
)
def test_an_unknown_slot_is_refused(name: str, has: str) -> None:
    shard = Sharded(table(name, FLAT), 1).shards[0]
    with pytest.raises(UnknownOptimizer, match=rf"no slot 'momentum' for parameter 'p1'.*keeps: {has}"):
        shard.write_slot(1, "momentum", 0, torch.zeros(21))


def test_a_whole_slot_of_another_shape_is_refused() -> None:
    shard = Sharded(table("Adafactor", [(8, 6)]), 1).shards[0]
    with pytest.raises(ShapeMismatch, match="row_var"):
        shard.write_slot(0, "row_var", 0, torch.zeros(3, 1))
