"""Tensors in the bodies of /v1/predict: JSON's nested lists, or safetensors. Never pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import safetensors.torch
import torch
from msgspec import Meta
from torch import Tensor

from headwater.errors import InternalError
from headwater.gateway.openai_types import Label, VersionCard
from headwater.gateway.problems import Refusal

if TYPE_CHECKING:
    from headwater.types import VersionInfo

SAFETENSORS = "application/x-safetensors"
"""The content type of a safetensors body."""

Dtype = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
Nested = Annotated[
    Any,
    Meta(
        description="A number or a boolean, or lists of them nested as deeply as the tensor has dimensions.",
        extra_json_schema={"type": ["number", "boolean", "array"]},
    ),
]


class JsonTensor(msgspec.Struct, forbid_unknown_fields=True):
    """``data``: values in lists nested as deeply as the tensor has dimensions, or one value."""

    data: Nested
    dtype: Dtype = "float32"


class PredictRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of the module's forward: by name, or by position."""

    inputs: dict[str, JsonTensor] | list[JsonTensor]
    model: Label | None = None


class OutputTensor(msgspec.Struct):
    """As ``JsonTensor``. JSON has no NaN and no infinity: such values are null; safetensors keeps them."""

    dtype: str
    shape: list[int]
    data: Any


class Prediction(msgspec.Struct):
    """``outputs``: what forward returned: ``output`` if it is one tensor, else by its names or places."""

    outputs: dict[str, OutputTensor]
    model: str
    system_fingerprint: str
    version: VersionCard


def from_json(inputs: Mapping[str, JsonTensor] | Sequence[JsonTensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and named arguments. Raises ``Refusal``: values that are no tensor of that dtype."""
    if isinstance(inputs, Mapping):
        return [], {name: _tensor(value, f"inputs.{name}") for name, value in inputs.items()}
    return [_tensor(value, f"inputs[{place}]") for place, value in enumerate(inputs)], {}


def _tensor(given: JsonTensor, where: str) -> Tensor:
    dtype: torch.dtype = getattr(torch, given.dtype)
    try:
        found = torch.tensor(given.data)
        if found.is_floating_point():
            found = torch.tensor(given.data, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Refusal(400, f"{where}: these are no values of one tensor: {error}", param=where) from None
    made = found.to(dtype)
    if found.numel() and not dtype.is_floating_point and not torch.equal(made.to(found.dtype), found):
        raise Refusal(400, f"{where}: not all values are numbers of {given.dtype}", param=where)
    return made


def from_safetensors(body: bytes) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and named arguments: a tensor named ``0`` is the first. Raises ``Refusal``: not such a file."""
    try:
        found = safetensors.torch.load(body)
    except Exception as error:
        if type(error).__name__ != "SafetensorError" and not isinstance(error, ValueError | KeyError):
            raise
        raise Refusal(400, f"the body is not safetensors: {error}", slug="invalid_safetensors") from None
    places = sorted((name for name in found if name.isdecimal()), key=int)
    if places != [str(place) for place in range(len(places))]:
        raise Refusal(400, f"the places of tensors go from 0 on without a gap; here are {', '.join(places)}")
    return [found.pop(name) for name in places], found


def flatten(value: Any) -> dict[str, Tensor]:
    """What a forward returned, by name: a tensor is ``output``, a member of a mapping or sequence has a dotted path.

    The tensors are copies, which outlive the version that made them. Raises ``InternalError`` for what is no tensor.
    """
    if isinstance(value, Tensor):
        return {"output": _copy(value)}
    return {name: _copy(tensor) for name, tensor in _members(value, "")}


def _members(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    match value:
        case None:
            return
        case Tensor():
            yield path, value
        case bool() | int() | float():
            yield path, torch.tensor(value)
        case Mapping():
            for name, each in value.items():
                yield from _members(each, f"{path}.{name}".removeprefix("."))
        case tuple() | list():
            names = getattr(value, "_fields", range(len(value)))
            for name, each in zip(names, value, strict=True):
                yield from _members(each, f"{path}.{name}".removeprefix("."))
        case _:
            raise InternalError(
                f"the module returned a {type(value).__name__}{f' at {path}' if path else ''}; only tensors, and "
                "mappings and sequences of them, can be answered: that is for whoever wrote its forward"
            )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def to_json(outputs: Mapping[str, Tensor]) -> dict[str, OutputTensor]:
    return {name: _output(tensor) for name, tensor in outputs.items()}


def _output(tensor: Tensor) -> OutputTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_complex():
        raise InternalError(f"the module returned {dtype}, which JSON has no numbers for; ask for {SAFETENSORS}")
    return OutputTensor(dtype, list(tensor.shape), tensor.tolist())


def to_safetensors(outputs: dict[str, Tensor], version: VersionInfo) -> bytes:
    """The file's metadata name the version."""
    metadata = {"version": version.name, "number": str(version.number), "step": str(version.step)}
    return safetensors.torch.save(outputs, metadata)
