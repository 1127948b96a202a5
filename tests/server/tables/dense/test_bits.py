"""Every kernel against torch.optim on whole tensors: the same bits, however the table is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwater.types import DenseSpec
from tests.server.tables.dense.tools import Sharded, gradients, reference, same, table

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": True}),
]
for _name in ("Adam", "AdamW"):
    for _fused in (True, False):
        CASES += [
            (_name, {"lr": 0.1, "fused": _fused, "weight_decay": 0.1}),
            (_name, {"lr": 0.1, "fused": _fused, "amsgrad": True, "betas": (0.8, 0.95)}),
            (_name, {"lr": 0.1, "fused": _fused, "maximize": True, "eps": 0.0}),
        ]
CASES += [
    ("Adam", {"fused": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "fused": True}),
    ("Adagrad", {"lr": 0.1, "fused": True, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adagrad", {"lr": 0.1, "fused": False, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 0.0}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adadelta", {"weight_decay": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"weight_decay": 0.1}),
    ("Rprop", {}),
    ("ASGD", {"weight_decay": 0.1, "t0": 1.0}),
    ("Adafactor", {"weight_decay": 0.1}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in hyper.items())}" for name, hyper in CASES]


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(("name", "hyper"), CASES, ids=IDS)
def test_float32_steps_are_those_of_torch(name: str, hyper: dict[str, Any], shards: int) -> None:
    _compare(table(name, groups=[hyper]), shards, steps=4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "hyper"), CASES, ids=IDS)
def test_other_dtypes(name: str, hyper: dict[str, Any], dtype: str) -> None:
    # torch._fused_sgd_ leaves most of a bfloat16 or float16 tensor as it was; Headwater runs the unfused kernel
    broken = name == "SGD" and dtype != "float64"
    _compare(table(name, groups=[hyper], dtype=dtype), 2, steps=3, **({"fused": False} if broken else {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_many_small_parameters_without_a_gap(name: str, fused: bool, dtype: str) -> None:
    """Unfused kernels unroll two vectors: where a tensor of an odd number of them ends shows in the last bit."""
    hyper = {"weight_decay": 0.1, "maximize": True, "lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    spec = table(name, [(96,), (32,), (160,)] * 70, dtype, groups=[{**hyper, "fused": fused and name != "SGD"}])
    _compare(spec, 1, steps=4)


@pytest.mark.parametrize("shards", [1, 2])
def test_muon(shards: int) -> None:
    _compare(table("Muon", [(16, 24), (40, 8), (33, 33)], groups=[{"lr": 0.1}]), shards, steps=3)


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_groups_keep_their_hyperparameters(name: str) -> None:
    _compare(table(name, groups=[{"lr": 0.1}, {"lr": 0.01, "weight_decay": 0.0}]), 2, steps=3)


def _compare(spec: DenseSpec, shards: int, steps: int, **extra: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    start = list(gradients(spec, generator).values())
    ours = Sharded(spec, shards, start, seed=shards)
    theirs = [value.clone() for value in start]
    if spec.optimizer.name in ("Adam", "AdamW", "Adagrad") and "fused" not in spec.optimizer.groups[0]:
        extra["fused"] = True
    optimizer = reference(spec, theirs, **extra)
    for _ in range(steps):
        grads = gradients(spec, generator)
        for index, value in enumerate(theirs):
            value.grad = grads[index].clone()
        optimizer.step()
        ours.step([grads])
    for index, (a, b) in enumerate(zip(ours.values(), theirs, strict=True)):
        assert same(a, b), f"{spec.parameters[index]}: {int((a != b).sum())} of {a.numel()} differ"
    ours.assert_padding_is_zero()
