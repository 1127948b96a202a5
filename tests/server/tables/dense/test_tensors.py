"""Tensors over raw memory."""

from __future__ import annotations

import math

import pytest
import torch

from headwater.errors import ShapeMismatch
from headwater.types import ITEMSIZE, ParameterSpec
from headwater.wire.tensors import DTYPES, dtype_name, finite, view


def test_every_dtype_has_its_size_and_name() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEMSIZE
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())
    with pytest.raises(ShapeMismatch, match="complex64"):
        dtype_name(torch.complex64)


def test_a_view_is_the_memory() -> None:
    memory = torch.zeros(256, dtype=torch.uint8)
    view(memory, 64, ParameterSpec("w", (2, 3)))[1, 2] = 1.0
    assert memory[84:88].view(torch.float32).item() == 1.0
    assert view(memory, 0, ParameterSpec("s", ())).shape == ()
    assert view(memory, 0, ParameterSpec("e", (0, 4))).shape == (0, 4)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite(dtype: str, bad: float) -> None:
    tensor = torch.full((1000,), torch.finfo(DTYPES[dtype]).max, dtype=DTYPES[dtype])  # whose sum is not finite
    assert finite(tensor)
    tensor[500] = bad
    assert not finite(tensor)
    assert finite(torch.zeros(0, dtype=DTYPES[dtype]))
    assert finite(torch.ones(3, dtype=torch.int64))
