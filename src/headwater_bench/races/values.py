"""The tables of the race: every element of every tensor follows from the step alone, so a read can be checked whole.

All values are whole numbers that their dtypes hold exactly, zero at step 0, under SGD with lr = 1: the gradient of a
step is what was less what will be. In the table ``dense`` every element changes with every step; in ``sparse`` one in
64 does, so that deltas are worth their while; one tensor is bfloat16, for the other width of words. These two are
small, so that a million reads can be checked; ``large`` takes so long to copy that the next step overtakes the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec

MODEL, LARGE = "races", "large"
MODELS: dict[str, tuple[str, ...]] = {MODEL: ("dense", "sparse"), LARGE: ("large",)}
"""The tables of each model."""

SPARSE = 64  # one element in so many changes with a step
RING = 251  # bfloat16 holds whole numbers up to 256
WINDOW = 200  # steps around the expected one among which a wrong tensor's own is looked for

SIZES: dict[str, dict[str, int]] = {
    "dense": {"d0": 49152, "d1": 4096, "d2": 4096, "d3": 4096, "h0": 8192},
    "sparse": {"s0": 49152, "s1": 4096, "s2": 4096},
    "large": {"l0": 6 << 20},
}
"""Elements by table and tensor. The long ones are cut over all shards."""

Array = np.ndarray[Any, Any]
Verdict = Literal["whole", "torn", "mixed", "mislabelled"]


class ReadCheck(NamedTuple):
    """What a read was; ``words`` say what was wrong with it."""

    verdict: Verdict
    words: str = ""


def specs(model: str) -> tuple[DenseSpec, ...]:
    """The tables of a model as the publisher declares them."""
    return tuple(
        DenseSpec(
            table,
            tuple(
                ParameterSpec(name, (count,), "bfloat16" if name[0] == "h" else "float32")
                for name, count in sizes.items()
            ),
            OptimizerSpec("SGD", ({"lr": 1.0},)),
            Bulk("sum"),
        )
        for table, sizes in ((table, SIZES[table]) for table in MODELS[model])
    )


@lru_cache(maxsize=16)
def _place(name: str, count: int) -> Array:
    """A small number for each place, so that bytes at a wrong place are seen too."""
    return np.arange(count, dtype=np.int32) % (5 if name[0] == "h" else 97) + 1


def number(name: str, count: int, step: int) -> Array:
    """Whole numbers, int32, 1-D: the values of a tensor after ``step`` steps."""
    place = _place(name, count)
    if name[0] == "h":
        return np.asarray(step * place % RING)
    if name[0] == "s":
        at = np.arange(count, dtype=np.int32)
        return np.asarray(((step + at) // SPARSE - at // SPARSE) * place)
    return np.asarray(step * place)


@lru_cache(maxsize=64)
def bits(name: str, count: int, step: int) -> Array:
    """The same in the words that the tensor's memory holds: uint32, or uint16 for bfloat16."""
    values = torch.from_numpy(number(name, count, step))
    if name[0] == "h":
        return np.asarray(values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16))
    return np.asarray(values.to(torch.float32).numpy().view(np.uint32))


def words(name: str, tensor: torch.Tensor) -> Array:
    """A tensor's memory as ``bits`` has it; a view."""
    if name[0] == "h":
        return np.asarray(tensor.view(torch.int16).numpy().view(np.uint16))
    return np.asarray(tensor.numpy().view(np.uint32))


def gradient(name: str, count: int, step: int) -> torch.Tensor:
    """What takes a tensor to ``step`` from the step before."""
    return torch.from_numpy(number(name, count, step - 1) - number(name, count, step))


COUNT = {name: count for sizes in SIZES.values() for name, count in sizes.items()}
NAMES = {model: {name for table in tables for name in SIZES[table]} for model, tables in MODELS.items()}


def check(tensors: Mapping[str, torch.Tensor], step: int, model: str = MODEL) -> ReadCheck:
    """Every element of every tensor against the step that the read's label names."""
    if tensors.keys() != NAMES[model]:
        return ReadCheck("mislabelled", f"tensors {sorted(tensors)}")
    wrong = [name for name, tensor in tensors.items() if not _equal(name, tensor, step)]
    return ReadCheck("whole") if not wrong else _diagnose(tensors, wrong, step)


def _equal(name: str, tensor: torch.Tensor, step: int) -> bool:
    expected = bits.__wrapped__ if name[0] == "l" else bits  # one large tensor is as large as all the cache
    return bool((words(name, tensor) == expected(name, COUNT[name], step)).all())


def _diagnose(tensors: Mapping[str, torch.Tensor], wrong: list[str], step: int) -> ReadCheck:
    """Torn: a tensor of no single step. Mixed: tensors of several. Mislabelled: all of one that is not the label's."""
    steps = {name: step if name not in wrong else _step_of(name, tensors[name].clone(), step) for name in tensors}
    said = f"label says step {step}; found {steps}"
    if None in steps.values():
        return ReadCheck("torn", f"{said} (None: of no single step)")
    return ReadCheck("mixed" if len(set(steps.values())) > 1 else "mislabelled", said)


def _step_of(name: str, tensor: torch.Tensor, near: int) -> int | None:
    candidates = range(max(0, near - WINDOW), near + WINDOW + 1)
    own = words(name, tensor)
    for each in candidates:  # not through ``bits``: its cache is for what is expected
        if bool((own == bits.__wrapped__(name, COUNT[name], each)).all()):
            return each
    return None
