"""What ``Assign`` makes of contributions under ``mean``: what is equal stays, to the bit; the rest is averaged."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec
from tests.server.tables.dense.tools import Sharded

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def mean(*given: torch.Tensor, shards: int = 1) -> torch.Tensor:
    """Of one worker each, as the servers compute it."""
    name = str(given[0].dtype).removeprefix("torch.")
    spec = DenseSpec("t", (ParameterSpec("b", tuple(given[0].shape), name),), OptimizerSpec("Assign", ({},)), Bulk())
    ours = Sharded(spec, shards)
    ours.step([{0: tensor} for tensor in given], divide=len(given))
    return ours.values()[0]


def bits(tensor: torch.Tensor) -> list[int]:
    numbers: list[int] = tensor.contiguous().view(torch.uint8).flatten().tolist()
    return numbers


@pytest.mark.parametrize("count", [2, 3, 5, 7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_equal_stays_to_the_bit(dtype: torch.dtype, count: int) -> None:
    info = torch.finfo(dtype)
    edges = [info.min, info.max, info.tiny, math.inf, -math.inf, math.nan, -0.0, 0.0, 0.1, 1 / 3]
    wave = torch.sin(torch.arange(20_000.0, dtype=torch.float64))
    given = torch.cat([torch.tensor(edges, dtype=torch.float64), wave]).to(dtype)
    assert bits(mean(*[given.clone() for _ in range(count)], shards=2)) == bits(given)
    other = given.clone()
    other[3000] = 9  # one that differs changes nobody else
    found = mean(given, *[other] * (count - 1), shards=2)
    assert bits(found[:3000]) == bits(given[:3000])
    assert bits(found[3001:]) == bits(given[3001:])
    assert found[3000] != given[3000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_floats_is_their_sum_in_order_by_their_number(dtype: torch.dtype) -> None:
    given = [torch.randn(40_000, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    assert torch.equal(mean(*given, shards=3), (given[0] + given[1] + given[2]) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_halves_is_rounded_once(dtype: torch.dtype) -> None:
    given = [torch.randn(999, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    assert torch.equal(mean(*given), ((given[0].double() + given[1].double() + given[2].double()) / 3).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_that_overflows_is_no_infinity(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    found = mean(*[torch.tensor([x], dtype=dtype) for x in (top, top, top / 2)])
    assert found.item() == pytest.approx(top * (5 / 6), rel=0.01)
    low = mean(*[torch.tensor([x], dtype=dtype) for x in (-top, -top / 2)])
    assert low.item() == pytest.approx(-top * 0.75, rel=0.01)


def test_infinities_and_nan_are_those_that_were_contributed() -> None:
    a = torch.tensor([math.inf, math.inf, math.nan, 1.0, -0.0])
    b = torch.tensor([1.0, -math.inf, 1.0, 2.0, 0.0])
    found = mean(a, b)
    assert found[0] == math.inf
    assert found[1].isnan()
    assert found[2].isnan()
    assert found[3:].tolist() == [1.5, 0.0]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_exact_and_rounded_down(dtype: torch.dtype, count: int) -> None:
    info = torch.iinfo(dtype)
    edges = torch.tensor([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype=dtype)
    assert torch.equal(mean(*[edges] * count), edges)
    given = [edges.roll(i) for i in range(count)]
    columns = zip(*[g.tolist() for g in given], strict=True)
    expected = [math.floor(sum(map(Fraction, column)) / count) for column in columns]
    assert mean(*given).tolist() == expected


def test_the_sum_is_left_as_it_is() -> None:
    """``reduce="sum"`` of what one worker sends is that; of several it is their sum."""
    spec = DenseSpec("t", (ParameterSpec("b", (2,)),), OptimizerSpec("Assign", ({},)), Bulk("sum"))
    ours = Sharded(spec, 1)
    ours.step([{0: torch.tensor([-0.0, 3.0])}, {0: torch.tensor([-0.0, 3.0])}])
    assert ours.values()[0].tolist() == [0.0, 6.0]
