"""First values: the right distributions, and the same numbers on any number of shards."""

from __future__ import annotations

import math

import pytest
import torch

from headwater import init
from headwater.errors import UsageError
from headwater.server.tables.dense import initialise
from headwater.types import DenseSpec, Init, OptimizerSpec, ParameterSpec
from tests.server.tables.dense.tools import Sharded

SHAPE = (400, 500)


def _fill(
    how: Init, shape: tuple[int, ...] = SHAPE, dtype: str = "float32", name: str = "w", seed: int = 0
) -> torch.Tensor:
    parameter = ParameterSpec(name, shape, dtype, init=how)
    out = torch.full((parameter.numel,), 7, dtype=getattr(torch, dtype))
    initialise.fill(out, parameter, 0, seed)
    return out


@pytest.mark.parametrize(
    ("how", "mean", "std", "low", "high"),
    [
        (init.zeros(), 0, 0, 0, 0),
        (init.ones(), 1, 0, 1, 1),
        (init.constant(2.5), 2.5, 0, 2.5, 2.5),
        (init.normal(0.02, mean=1.0), 1.0, 0.02, 0.85, 1.15),
        (init.truncated_normal(0.5), 0, 0.5 * 0.8796, -1.0, 1.0),
        (init.uniform(-1, 3), 1, 4 / math.sqrt(12), -1, 3),
        (init.xavier_uniform(2.0), 0, 2 * math.sqrt(2 / 900), -2 * math.sqrt(6 / 900), 2 * math.sqrt(6 / 900)),
        (init.xavier_normal(), 0, math.sqrt(2 / 900), -1, 1),
        (init.kaiming_uniform(), 0, math.sqrt(2 / 500), -math.sqrt(6 / 500), math.sqrt(6 / 500)),
        (init.kaiming_normal(math.sqrt(5)), 0, math.sqrt(2 / 6 / 500), -1, 1),
    ],
)
def test_distributions(how: Init, mean: float, std: float, low: float, high: float) -> None:
    drawn = _fill(how).double()
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(len(drawn)) + 1e-7)
    assert drawn.std().item() == pytest.approx(std, rel=0.01, abs=1e-7)
    assert low - 1e-6 <= drawn.min().item() <= drawn.max().item() <= high + 1e-6
    if std:
        assert drawn.unique().numel() > 0.5 * len(drawn)


@pytest.mark.parametrize("shape", [(30, 20), (8, 4, 3, 3), (2, 5, 7)])
@pytest.mark.parametrize("kind", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_fans_are_those_of_torch(kind: str, shape: tuple[int, ...]) -> None:
    scale = getattr(init, kind)(0.5)
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    resolved = initialise.resolve(ParameterSpec("w", shape, init=scale))
    variance = 0.25 * 2 / (fan_in + fan_out) if kind.startswith("xavier") else 2 / 1.25 / fan_in
    std = resolved.b if resolved.kind == "normal" else (resolved.b - resolved.a) / math.sqrt(12)
    assert std == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["normal", "truncated_normal", "uniform"])
def test_shards_do_not_matter(kind: str, dtype: str) -> None:
    parameters = tuple(
        ParameterSpec(f"p{i}", shape, dtype, init=Init(kind, -0.5, 0.5))  # type: ignore[arg-type]
        for i, shape in enumerate([(3,), (200_000,), (65536,), (100, 70)])
    )
    spec = DenseSpec("t", parameters, OptimizerSpec("SGD", ({},)), seed=3)
    found = []
    for shards in (1, 2, 3):
        table = Sharded(spec, shards, seed=shards)
        for shard in table.shards:
            shard.initialise()
        table.assert_padding_is_zero()
        found.append(table.values())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_seed_name_and_chunk_matter() -> None:
    how = init.normal()
    base = _fill(how)
    assert torch.equal(base, _fill(how))
    assert not torch.equal(base, _fill(how, seed=1))
    assert not torch.equal(base, _fill(how, name="v"))
    assert not torch.equal(base[:65536], base[65536 : 2 * 65536])


def test_values_are_left_for_a_client() -> None:
    assert (_fill(Init("values")) == 7).all()
    assert (_fill(init.ones(), dtype="int64") == 1).all()
    assert _fill(init.ones(), dtype="bool").all()


@pytest.mark.parametrize(
    ("how", "shape", "dtype"),
    [
        (init.xavier_normal(), (3,), "float32"),
        (init.kaiming_uniform(), (3, 0), "float32"),
        (init.normal(), (3,), "int64"),
    ],
)
def test_what_cannot_be_drawn_is_refused(how: Init, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(UsageError, match="parameter 'w'"):
        _fill(how, shape, dtype)
    with pytest.raises(UsageError, match="parameter 'w'"):
        Sharded(DenseSpec("t", (ParameterSpec("w", shape, dtype, init=how),), OptimizerSpec("Assign", ({},))), 1)


def test_bad_arguments_are_refused() -> None:
    for call in (
        lambda: init.normal(-1.0),
        lambda: init.normal(math.nan),
        lambda: init.constant(math.inf),
        lambda: init.uniform(1.0, 0.0),
    ):
        with pytest.raises(UsageError):
            call()
