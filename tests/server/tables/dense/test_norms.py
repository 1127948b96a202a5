"""The norm of a gradient does not depend on shards, threads or addresses; clipping is torch's."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.server.tables.base import Contribution
from headwater.server.tables.dense import DenseShard
from headwater.wire.exact import clip_factor, exact_add, exact_sum, merge
from tests.server.tables.dense.tools import Sharded, gradients, layouts, same, table

SPEC = table("SGD", [(1,), (7,), (70000,), (16384,), (33,), (100, 200), (3,)])


def _norm(ours: Sharded, workers: list[dict[int, torch.Tensor]], divide: int = 1) -> float:
    given = zip(ours.shards, ours.contributions(workers), strict=True)
    return merge(shard.square_norm(contributions, divide) for shard, contributions in given)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_shards_and_threads_do_not_matter(name: str) -> None:
    spec = table(name, [p.shape for p in SPEC.parameters], groups=[{}, {}])
    generator = torch.Generator().manual_seed(1)
    workers = [gradients(spec, generator) for _ in range(3)]
    norms = {_norm(Sharded(spec, shards, seed=shards), workers, 3) for shards in (1, 2, 3, 5)}
    torch.set_num_threads(2)
    try:
        norms.add(_norm(Sharded(spec, 2), workers, 3))
    finally:
        torch.set_num_threads(1)
    assert len(norms) == 1


def test_addresses_do_not_matter() -> None:
    ((segments, size),) = layouts(SPEC, 1)
    gradient = torch.randn(size // 4, generator=torch.Generator().manual_seed(1)).view(torch.uint8)
    for low, high in zip([0, *(s.end for s in segments)], [*(s.offset for s in segments), size], strict=True):
        gradient[low:high] = 0
    shard = DenseShard(SPEC, segments, size, torch.zeros(size, dtype=torch.uint8))
    found = set()
    for shift in (0, 4, 16, 60):
        room = torch.zeros(size + 64, dtype=torch.uint8)
        room[shift : shift + size] = gradient
        found.add(tuple(shard.square_norm([Contribution(room[shift : shift + size], ((0, size),))])))
    assert len(found) == 1


def test_value_and_coverage() -> None:
    grads = gradients(SPEC, torch.Generator().manual_seed(2))
    ours = Sharded(SPEC, 2)
    for chosen in (set(range(7)), {0, 2, 6}, set()):
        some = {i: g for i, g in grads.items() if i in chosen}
        exact = math.fsum(float(x) ** 2 for g in some.values() for x in g.double().reshape(-1).tolist())
        assert _norm(ours, [some]) == pytest.approx(exact, rel=1e-14)
    halves = _norm(ours, [grads, grads], 2)
    assert halves == _norm(ours, [grads])


def test_clipping_is_that_of_torch() -> None:
    spec = table("SGD", groups=[{"lr": 0.1}])
    grads = gradients(spec, torch.Generator().manual_seed(3))
    ours = Sharded(spec, 3)
    parameters = [torch.zeros(p.shape, requires_grad=True) for p in spec.parameters]
    for index, parameter in enumerate(parameters):
        parameter.grad = grads[index].clone()
    norm, factor = clip_factor(1.0, _norm(ours, [grads]))
    expected = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert norm == pytest.approx(expected.item(), rel=1e-5)
    assert factor is not None
    # torch's norm is a float32: with our exact one as its factor, the step is the same to the last bit
    ours.step([grads], scale=factor)
    theirs = [torch.zeros(p.shape) for p in spec.parameters]
    for index, value in enumerate(theirs):
        value.add_(grads[index] * torch.tensor(factor), alpha=-0.1)
    assert all(same(a, b) for a, b in zip(ours.values(), theirs, strict=True))


@pytest.mark.parametrize(("bad", "says"), [(math.nan, math.isnan), (math.inf, math.isinf), (-math.inf, math.isinf)])
def test_not_finite(bad: float, says: object) -> None:
    grads = gradients(SPEC, torch.Generator().manual_seed(2))
    grads[2][12345] = bad
    total = _norm(Sharded(SPEC, 2), [grads])
    assert callable(says)
    assert says(total)
    norm, factor = clip_factor(1.0, total)
    assert says(norm)
    assert factor is not None


def test_clip_factor() -> None:
    assert clip_factor(1.0, 0.25) == (0.5, None)
    assert clip_factor(1.0, 4.0) == (2.0, 1.0 / (2.0 + 1e-6))
    assert clip_factor(1.0, math.inf) == (math.inf, 0.0)
    assert clip_factor(0.0, 4.0) == (2.0, 0.0)


FLOATS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(st.lists(FLOATS, max_size=20), st.randoms(use_true_random=False))
def test_a_sum_is_exact_however_its_terms_are_dealt(values: list[float], rng: object) -> None:
    exact = sum(map(Fraction, values), Fraction(0))
    assert sum(map(Fraction, exact_sum(values)), Fraction(0)) == exact
    parts: list[list[float]] = [[], [], []]
    for value in values:
        part = rng.randrange(3)  # type: ignore[attr-defined]
        parts[part] = exact_add(parts[part], value)
    assert merge(parts) == math.fsum(values)


def test_sums_beyond_the_doubles() -> None:
    assert exact_sum([1e308, 1e308]) == [math.inf]
    assert exact_sum([]) == []
    assert merge([[], []]) == 0.0
    assert merge([[math.inf], [1.0]]) == math.inf
    assert math.isnan(merge([[math.nan], [math.inf]]))
