"""The seam for another framework: an optimizer of numpy arrays trains through the framework-free half."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from headwater import integrations
from headwater.errors import GradientModified, NonFiniteGradient, ParameterModified
from headwater.integrations.base.data_plan import PlanReader
from headwater.integrations.base.steps import TrainOptions
from headwater.types import Async, Bulk, Stale
from tests.integrations.base.numpy_optimizer import NumpyOptimizer
from tests.integrations.torch.fake_table import FakeClient
from tests.integrations.torch.support import workers

Array = npt.NDArray[np.float32]
SGD = TrainOptions("SGD", Bulk(), bucket_bytes=64)


def start() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {"weight": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}


def data(seed: int, count: int = 16) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 5)).astype(np.float32)
    return x, (x @ np.arange(15, dtype=np.float32).reshape(5, 3) + 1).astype(np.float32)


def gradients(arrays: dict[str, Array], seed: int) -> dict[str, Array]:
    """Of half the mean squared error of a linear model."""
    x, y = data(seed)
    error = (x @ arrays["weight"] + arrays["bias"] - y) / np.float32(len(x))
    return {"weight": x.T @ error, "bias": error.sum(0)}


class NumpySGD:
    """The reference. Its numbers are powers of two, so that products round nowhere."""

    def __init__(self) -> None:
        self.arrays, self.lr, self.momentum = start(), np.float32(0.125), np.float32(0.5)
        self.buffers: dict[str, Array] = {}

    def step(self, given: list[dict[str, Array]]) -> None:
        for name, array in self.arrays.items():
            mean = sum(each[name] for each in given) / np.float32(len(given))
            old = self.buffers.get(name)
            self.buffers[name] = mean if old is None else self.momentum * old + mean
            array -= self.lr * self.buffers[name]


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_numpy_trains_as_numpy_does_alone(world: int, servers: int) -> None:
    reference = NumpySGD()
    for step in range(12):
        if step == 6:
            reference.lr /= np.float32(2)
        if step == 9:
            reference.arrays["bias"][1] = 0.75
        reference.step([gradients(reference.arrays, step * world + rank) for rank in range(world)])

    def life(client: Any) -> dict[str, Array]:
        opt = NumpyOptimizer(client, start(), SGD, lr=0.125, momentum=0.5)
        for step in range(12):
            if step == 6:  # a scheduler
                opt.groups[0]["lr"] /= 2
            if step == 9:  # the script writes a parameter
                opt.arrays["bias"][1] = 0.75
            result = opt.step(gradients(opt.arrays, step * world + client.rank))
            assert result is not None
            assert result.clock == step + 1
        return {name: array.copy() for name, array in opt.arrays.items()}

    for found in workers(world, life, servers):
        for name, array in reference.arrays.items():
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("sync", [Stale(1), Async()])
def test_the_other_policies_train_too(sync: Stale | Async) -> None:
    def life(client: Any) -> list[float]:
        opt = NumpyOptimizer(client, start(), TrainOptions("SGD", sync), lr=0.125)
        losses = []
        for step in range(30):
            x, y = data(1000)
            losses.append(float(np.square(x @ opt.arrays["weight"] + opt.arrays["bias"] - y).mean()))
            opt.step(gradients(opt.arrays, step * 2 + client.rank))
        return losses

    for losses in workers(2, life):
        assert losses[-1] < losses[0] / 4


def test_what_is_not_finite_is_an_error_or_a_step_that_all_skip() -> None:
    bad = {"weight": np.full((5, 3), np.nan, np.float32)}

    def life(client: Any) -> bool:
        opt = NumpyOptimizer(client, start(), TrainOptions("SGD", Bulk(), nonfinite="skip"), lr=0.125)
        before = {name: array.copy() for name, array in opt.arrays.items()}
        result = opt.step(bad if client.rank else gradients(opt.arrays, 0))
        assert result is not None
        assert all(np.array_equal(array, before[name]) for name, array in opt.arrays.items())
        return result.applied

    assert workers(2, life) == [False, False]

    client: Any = FakeClient()
    opt = NumpyOptimizer(client, start(), SGD, lr=0.125)
    with pytest.raises(NonFiniteGradient, match="weight"):
        opt.step(bad)
    assert ("step", ()) not in opt.table.calls


def test_buckets_leave_when_ready_and_hyperparameters_once() -> None:
    client: Any = FakeClient()
    opt = NumpyOptimizer(client, start(), TrainOptions("SGD", Bulk(), bucket_bytes=1), lr=0.125)
    opt.table.calls.clear()
    for _ in range(2):
        opt.step(gradients(opt.arrays, 0))
    opt.groups[0]["lr"] = 0.5
    opt.step(gradients(opt.arrays, 0))
    assert opt.table.pushes == [("bias",), ("weight",)] * 3
    said = [groups[0]["lr"] for groups in opt.table.groups if groups is not None]
    assert said == [0.125, 0.5]


def test_what_left_and_is_applied_cannot_be_taken_back() -> None:
    client: Any = FakeClient()
    opt = NumpyOptimizer(client, start(), TrainOptions("SGD", Async(), bucket_bytes=1, overlap=True), lr=0.125)
    bias = opt.parameters[1]
    bias.changed = True
    opt.steps.gradients.ready(bias)
    assert opt.steps.gradients.have_left()
    with pytest.raises(ParameterModified, match="have left already"):
        opt.steps.write_first({"bias": opt.table.values["bias"]})
    bias.changed = True
    with pytest.raises(GradientModified, match="a part of the step may be applied"):
        opt.steps.gradients.finish([bias])


def test_two_workers_share_the_samples_of_a_plan() -> None:
    def life(client: Any) -> list[int]:
        opt = NumpyOptimizer(client, start(), TrainOptions("SGD", Async()), lr=0.125)
        reader = PlanReader(40, 2, 0, client=client, name="data", chunk=4, overlap=True, lag=None)
        used = []
        for _epoch in reader.epochs():
            for index in reader:
                opt.step(gradients(opt.arrays, index))
                reader.commit(1)
                used.append(index)
        return used

    first, second = workers(2, life)
    assert sorted(first + second) == sorted([*range(40)] * 2)


def test_the_framework_free_half_names_no_framework() -> None:
    folder = Path(integrations.__path__[0]) / "base"
    files = sorted(folder.glob("*.py"))
    assert len(files) > 5
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        only_types = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("headwater.integrations.torch") for name in names), path
            if id(node) not in only_types:
                assert not any(name.split(".")[0] in ("torch", "jax", "keras") for name in names), path


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
