"""Tensors over raw memory, for both ends of the wire."""

from __future__ import annotations

import math

import torch

from headwater.errors import ShapeMismatch
from headwater.types import ITEMSIZE, ParameterSpec

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEMSIZE}
"""Every dtype a dense table may hold, by its name on the wire."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name on the wire of a torch dtype.

    Raises:
        ShapeMismatch: a table cannot hold this dtype.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ShapeMismatch(f"a table cannot hold {dtype}; it holds: {', '.join(DTYPES)}") from None


def view(buffer: torch.Tensor, offset: int, parameter: ParameterSpec) -> torch.Tensor:
    """The parameter that lies at byte ``offset`` of ``buffer`` (uint8, 1-D), in its shape and dtype; no copy."""
    flat = buffer[offset : offset + parameter.nbytes].view(DTYPES[parameter.dtype])
    return flat.view(parameter.shape)


def finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite; integers always are.

    One pass that only reads: a sum is finite only if all terms are. A sum of finite terms may overflow, so
    the exact and slower check has the last word.
    """
    if not tensor.is_floating_point():
        return True
    if math.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def to_bytes(tensor: torch.Tensor) -> tuple[bytes, str]:
    """The elements of ``tensor`` in C order as little-endian bytes, and the dtype's name."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes(), dtype_name(tensor.dtype)


def from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of its own from ``to_bytes``.

    Raises:
        ShapeMismatch: unknown dtype, or the bytes do not fill the shape.
    """
    if dtype not in DTYPES or min(shape, default=0) < 0 or len(data) != math.prod(shape) * ITEMSIZE[dtype]:
        raise ShapeMismatch(f"{len(data)} bytes do not make a tensor of shape {shape} and dtype {dtype}")
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
