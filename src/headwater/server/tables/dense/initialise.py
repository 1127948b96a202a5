"""First values of a parameter: the same numbers on any number of shards."""

from __future__ import annotations

import hashlib
import math

import torch

from headwater.errors import UsageError
from headwater.types import Init, ParameterSpec

CHUNK = 65536
"""Elements drawn from one generator. Chunks count from the parameter's first element."""


def fill(out: torch.Tensor, parameter: ParameterSpec, start: int, seed: int) -> None:
    """Fill ``out`` (1-D, the parameter's dtype) with elements ``start``, … of the flattened parameter.

    Each chunk of 65536 elements has a generator of its own, seeded by (seed, name, chunk), and is drawn whole
    even if only a part of it is wanted. ``values`` leaves the memory as it is: a client assigns it.

    Raises:
        UsageError: a Xavier or Kaiming init on a parameter without a fan (fewer than two dimensions), or a
            random one on a dtype that is not floating point.
    """
    init = resolve(parameter)
    if init.kind == "values":
        return
    if init.kind == "constant":
        out.fill_(init.a)
        return
    position, stop = start, start + len(out)
    while position < stop:
        chunk = position // CHUNK
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, parameter.numel)
        drawn = _draw(init, last - first, _generator(seed, parameter.name, chunk))
        end = min(last, stop)
        out[position - start : end - start].copy_(drawn[position - first : end - first])
        position = end


def resolve(parameter: ParameterSpec) -> Init:
    """The parameter's init as ``values``, ``constant``, ``normal``, ``truncated_normal`` or ``uniform``."""
    init = parameter.init
    if init.kind in ("zeros", "ones"):
        return Init("constant", float(init.kind == "ones"))
    if init.kind in ("constant", "values"):
        return init
    if parameter.dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise UsageError(f"parameter {parameter.name!r} is {parameter.dtype}; init {init.kind!r} needs floats")
    if not init.kind.startswith(("xavier", "kaiming")):
        return init
    fan_in, fan_out = _fans(parameter)
    if init.kind.startswith("xavier"):
        std = init.a * math.sqrt(2.0 / (fan_in + fan_out))
    else:
        std = math.sqrt(2.0 / (1 + init.a**2)) / math.sqrt(fan_in)
    if init.kind.endswith("normal"):
        return Init("normal", 0.0, std)
    return Init("uniform", -math.sqrt(3.0) * std, math.sqrt(3.0) * std)


def _fans(parameter: ParameterSpec) -> tuple[int, int]:
    """As torch.nn.init: (out, in, *receptive field)."""
    shape = parameter.shape
    if len(shape) < 2 or 0 in shape:
        raise UsageError(
            f"parameter {parameter.name!r} has shape {shape}; init {parameter.init.kind!r} needs two dimensions "
            "or more, none of them 0"
        )
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _generator(seed: int, name: str, chunk: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{chunk}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _draw(init: Init, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` float32 numbers, drawn in float32 for every dtype."""
    drawn = torch.empty(count, dtype=torch.float32, device="cpu")
    if init.kind == "uniform":
        return drawn.uniform_(init.a, init.b, generator=generator)
    if init.kind == "normal":
        return drawn.normal_(init.a, init.b, generator=generator)
    return torch.nn.init.trunc_normal_(
        drawn, init.a, init.b, init.a - 2 * init.b, init.a + 2 * init.b, generator=generator
    )
