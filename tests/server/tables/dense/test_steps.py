"""What a step is made of: sums in rank order, skipped parameters, new hyperparameters, refusals."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import ShapeMismatch, UnknownOptimizer
from headwater.server.tables.base import Contribution
from headwater.server.tables.dense import DenseShard, state_bytes
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec, Segment
from tests.server.tables.dense.tools import Sharded, gradients, reference, same, table

BIG = ((70000,), (600_000,), (5,), (33,))


def _assert_same(ours: Sharded, theirs: Sequence[torch.Tensor]) -> None:
    for parameter, a, b in zip(ours.spec.parameters, ours.values(), theirs, strict=True):
        assert same(a, b), f"{parameter.name}: {int((a != b).sum())} of {a.numel()} differ"


def _pair(spec: DenseSpec, shards: int = 2) -> tuple[Sharded, list[torch.Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(3)
    start = list(gradients(spec, generator).values())
    return Sharded(spec, shards, start), [value.clone() for value in start], generator


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("name", "hyper"),
    [("SGD", {"lr": 0.1, "momentum": 0.9}), ("AdamW", {"fused": True}), ("AdamW", {"fused": False}), ("RMSprop", {})],
)
def test_contributions_are_summed_in_order_then_divided_then_scaled(name: str, hyper: dict, shards: int) -> None:
    spec = table(name, BIG, groups=[hyper])
    ours, theirs, generator = _pair(spec, shards)
    optimizer = reference(spec, theirs)
    for workers, divide, scale in ((3, 3, 0.3), (2, 2, None), (1, 1, 0.7), (3, 1, None), (1, 2, 0.5)):
        given = [gradients(spec, generator) for _ in range(workers)]
        for index, value in enumerate(theirs):
            total = given[0][index].clone()
            for other in given[1:]:
                total += other[index]
            if divide > 1:
                total /= divide
            value.grad = total if scale is None else total.mul_(torch.tensor(scale))
        optimizer.step()
        ours.step(given, divide, scale)
    _assert_same(ours, theirs)
    ours.assert_padding_is_zero()


def test_order_of_the_sum_matters_and_is_kept() -> None:
    spec = table("SGD", [(4,)], groups=[{"lr": 1.0}])
    workers = [{0: torch.full((4,), x)} for x in (1e8, 3.0, -1e8)]
    ours = Sharded(spec, 1)
    ours.step(workers)
    expected = -((torch.tensor(1e8) + 3.0) - 1e8)
    assert torch.equal(ours.values()[0], expected.expand(4))
    assert expected != -3.0


@settings(max_examples=60)
@given(
    name=st.sampled_from(["SGD", "AdamW", "Adagrad", "NAdam"]),
    shards=st.integers(1, 3),
    seed=st.integers(0, 5),
    steps=st.lists(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=3), min_size=1, max_size=5),
)
def test_any_coverage_is_as_in_torch(name: str, shards: int, seed: int, steps: list[list[set[int]]]) -> None:
    """Each worker covers some parameters; one that nobody covers is skipped, and its step count stands still."""
    hyper = {"momentum": 0.9} if name == "SGD" else {}
    spec = table(name, [(3,), (20000,), (17,), (64,), (35000,)], groups=[{"lr": 0.1, **hyper}])
    generator = torch.Generator().manual_seed(seed)
    start = list(gradients(spec, generator).values())
    ours, theirs = Sharded(spec, shards, start, seed), [value.clone() for value in start]
    optimizer = reference(spec, theirs, **({"fused": True} if name in ("AdamW", "Adagrad") else {}))
    for workers in steps:
        given = [{i: g for i, g in gradients(spec, generator).items() if i in chosen} for chosen in workers]
        for index, value in enumerate(theirs):
            parts = [g[index] for g in given if index in g]
            value.grad = None
            for part in parts:
                value.grad = part.clone() if value.grad is None else value.grad + part
            if value.grad is not None and len(workers) > 1:
                value.grad /= len(workers)
        optimizer.step()
        ours.step(given, divide=len(workers))
        for shard in ours.shards:
            shard._planner.validate()
    _assert_same(ours, theirs)
    ours.assert_padding_is_zero()


def test_a_gradient_of_a_part_of_the_shard_without_its_padding() -> None:
    spec = table("SGD", [(3,), (5,)], groups=[{"lr": 1.0, "momentum": 0.9}])
    memory = torch.zeros(128, dtype=torch.uint8)
    shard = DenseShard(spec, [Segment(0, 0, 3, 0, 12), Segment(1, 0, 5, 64, 20)], 128, memory)
    for _ in range(2):
        shard.step([Contribution(torch.ones(5).view(torch.uint8), ((64, 84),), base=64)])
    assert torch.equal(memory[64:84].view(torch.float32), torch.full((5,), -2.9))
    shard._memory.scratch(torch.float32).fill_(7.0)  # left by a step before
    shard.step([Contribution(torch.ones(5).view(torch.uint8), ((64, 84),), base=64)] * 2, divide=2)
    assert not memory[:64].any()
    assert not memory[84:].any()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "NAdam"])
def test_schedulers_reach_the_kernel(name: str) -> None:
    spec = table(name, [(100,), (7,)], groups=[{"lr": 0.1}, {"lr": 0.2}])
    ours, theirs, generator = _pair(spec)
    optimizer = reference(spec, theirs, **({"fused": True} if name.startswith("Ada") else {}))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        grads = gradients(spec, generator)
        for index, value in enumerate(theirs):
            value.grad = grads[index]
        optimizer.step()
        ours.step([grads])
        schedule.step()
        for shard in ours.shards:
            shard.set_groups([{"lr": group["lr"]} for group in optimizer.param_groups])
    _assert_same(ours, theirs)


def test_momentum_may_begin_and_pause() -> None:
    spec = table("SGD", [(100,), (7,)], groups=[{"lr": 0.1}])
    ours, theirs, generator = _pair(spec)
    optimizer = reference(spec, theirs)
    for momentum in (0.0, 0.9, 0.9, 0.0, 0.5):
        grads = gradients(spec, generator)
        optimizer.param_groups[0]["momentum"] = momentum
        for shard in ours.shards:
            shard.set_groups([{"momentum": momentum}])
        for index, value in enumerate(theirs):
            value.grad = grads[index]
        optimizer.step()
        ours.step([grads])
    _assert_same(ours, theirs)


@pytest.mark.parametrize("groups", [[{"lr": -1.0}], [{"learning_rate": 0.1}], [{}, {}], [{"nesterov": True}]])
def test_bad_groups_change_nothing(groups: list[dict]) -> None:
    ours = Sharded(table("SGD", [(4,)], groups=[{"lr": 1.0}]), 1)
    with pytest.raises(UnknownOptimizer, match=r"nothing was changed|has no hyperparameter"):
        ours.shards[0].set_groups(groups)
    ours.step([{0: torch.ones(4)}])
    assert torch.equal(ours.values()[0], -torch.ones(4))


@pytest.mark.parametrize(
    "contribution",
    [
        Contribution(torch.zeros(128, dtype=torch.uint8), ((0, 8),)),
        Contribution(torch.zeros(128, dtype=torch.uint8), ((4, 20),)),
        Contribution(torch.zeros(128, dtype=torch.uint8), ((64, 128), (0, 64))),
        Contribution(torch.zeros(256, dtype=torch.uint8), ((0, 192),)),
        Contribution(torch.zeros(32, dtype=torch.uint8), ((0, 84),)),
        Contribution(torch.zeros(128, dtype=torch.uint8), ((0, 84),), base=64),
    ],
)
def test_a_contribution_that_does_not_fit_is_refused(contribution: Contribution) -> None:
    spec = table("AdamW", [(3,), (5,)])
    shard = DenseShard(
        spec, [Segment(0, 0, 3, 0, 12), Segment(1, 0, 5, 64, 20)], 128, torch.zeros(128, dtype=torch.uint8)
    )
    with pytest.raises(ShapeMismatch):
        shard.step([contribution])
    assert shard.read_slots() == []


@pytest.mark.parametrize(
    ("segments", "size"),
    [
        ([Segment(0, 0, 3, 0, 16)], 64),
        ([Segment(0, 0, 4, 0, 16)], 64),
        ([Segment(0, 0, 3, 4, 12)], 64),
        ([Segment(0, 0, 3, 64, 12)], 64),
        ([Segment(0, 0, 3, 64, 12), Segment(1, 0, 5, 0, 20)], 128),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments: list[Segment], size: int) -> None:
    with pytest.raises(ShapeMismatch):
        DenseShard(table("SGD", [(3,), (5,)]), segments, size, torch.zeros(size, dtype=torch.uint8))


def test_matrix_optimizers_refuse_a_part() -> None:
    spec = table("Muon", [(4, 4)])
    with pytest.raises(ShapeMismatch, match="whole"):
        DenseShard(spec, [Segment(0, 0, 8, 0, 32)], 64, torch.zeros(64, dtype=torch.uint8))


def test_assign_takes_any_dtype_and_integer_means_round_down() -> None:
    names = ("float32", "int64", "int8", "bool")
    spec = DenseSpec(
        "t", tuple(ParameterSpec(n, (3,), n) for n in names), OptimizerSpec("Assign", ({},))
    )  # fmt: skip
    ours = Sharded(spec, 2)

    def given(a: list[int]) -> dict[int, torch.Tensor]:
        return {i: torch.tensor(a).to(getattr(torch, n)) for i, n in enumerate(names)}

    ours.step([given([1, 0, -7])])
    assert [v.tolist() for v in ours.values()] == [[1, 0, -7], [1, 0, -7], [1, 0, -7], [True, False, True]]
    ours.step([given([100, 0, -7]), given([101, 0, 0])], divide=2)
    assert [v.tolist() for v in ours.values()] == [
        [100.5, 0, -3.5],
        [100, 0, -4],
        [100, 0, -4],
        [True, False, True],
    ]


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_consumed_bytes_are_reported_once_and_completely(name: str) -> None:
    spec = table(name, [(3_000_000,), (5,)])
    ours = Sharded(spec, 1)
    shard = ours.shards[0]
    seen: list[tuple[int, int]] = []
    shard.after_block = lambda lo, hi: seen.append((lo, hi))
    grads = {0: torch.ones(3_000_000), 1: torch.ones(5)}
    ours.step([grads])
    assert seen == []
    ours.step([grads, grads])
    assert len(seen) in (3, 4)
    assert seen[0][0] == 0
    assert all(before[1] <= after[0] < before[1] + 64 for before, after in itertools.pairwise(seen))
    assert shard.segments[-1].end <= seen[-1][1] <= shard.size
    seen.clear()
    ours.step([{1: torch.ones(5)}, {1: torch.ones(5)}])
    assert [lo for lo, _ in seen] == [shard.segments[-1].offset]


@pytest.mark.parametrize(
    ("name", "hyper", "slots"),
    [("SGD", {}, 0), ("SGD", {"momentum": 0.9}, 1), ("AdamW", {}, 2), ("Adam", {"amsgrad": True}, 3),
     ("Adagrad", {}, 1), ("RMSprop", {"centered": True}, 2), ("NAdam", {}, 2), ("Muon", {}, 1)],
)  # fmt: skip
def test_state_bytes_is_values_slots_and_a_gradient(name: str, hyper: dict, slots: int) -> None:
    spec = table(name, [(64, 32), (16, 16)], groups=[hyper])
    ours = Sharded(spec, 1)
    shard = ours.shards[0]
    assert state_bytes(spec, shard.segments) == (2 + slots) * shard.size
    ours.step([gradients(spec, torch.Generator().manual_seed(0))])
    assert shard.nbytes == pytest.approx((1 + slots) * shard.size, abs=64)


def test_empty_parameters_and_no_contribution_do_nothing() -> None:
    spec = table("AdamW", [(0,), (2, 0), ()])
    ours = Sharded(spec, 1)
    ours.shards[0].step([])
    ours.step([{0: torch.zeros(0), 1: torch.zeros(2, 0), 2: torch.tensor(1.0)}])
    assert ours.values()[2] != 0
    assert {index for index, *_ in ours.shards[0].read_slots()} == {2}


def _one() -> tuple[DenseShard, torch.Tensor]:
    """A shard of four elements, all 0, that a step takes the gradient from; and its values."""
    spec = table("SGD", [(4,)], groups=[{"lr": 1.0}])
    values = torch.zeros(64, dtype=torch.uint8)
    return DenseShard(spec, [Segment(0, 0, 4, 0, 16)], 64, values), values.view(torch.float32)[:4]


def test_memory_that_comes_again_is_read_anew_each_time() -> None:
    """A run keeps its view of a gradient: of this one, from this byte on."""
    shard, values = _one()
    gradient = torch.zeros(128, dtype=torch.uint8)
    numbers = gradient.view(torch.float32)
    for base, first in ((0, 0), (0, 0), (-16, 4), (-16, 4), (0, 0)):
        numbers.copy_(torch.arange(32.0))
        before = values.clone()
        shard.step([Contribution(gradient, ((0, 16),), base)])
        assert torch.equal(values, before - numbers[first : first + 4])
    other = torch.ones(32).view(torch.uint8)
    before = values.clone()
    shard.step([Contribution(other, ((0, 16),))])
    assert torch.equal(values, before - 1)


def test_a_gradient_that_its_owner_lets_go_of_is_freed() -> None:
    """A worker that is gone takes its memory along, whatever a step has kept of it."""
    shard, _ = _one()
    owner = np.zeros(64, np.uint8)
    there = weakref.ref(owner)
    gradient = torch.from_numpy(owner)
    del owner
    shard.step([Contribution(gradient, ((0, 16),))])
    assert there() is not None
    del gradient
    assert there() is None
