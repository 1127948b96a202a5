"""Kinds of buffers: which have a mean over workers, which stay where they are, which are views of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from headwater.errors import UsageError
from headwater.types import ITEMSIZE
from headwater.wire.tensors import DTYPES

_AVERAGED = {DTYPES[name] for name in ITEMSIZE} - {torch.bool}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 1 << 20
"""Bytes up to which a watched buffer is always read; of a larger one only if its version or place has changed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a buffer lives, and its name in the table."""

    path: str
    module: torch.nn.Module
    key: str

    @property
    def buffer(self) -> torch.Tensor | None:
        """The module's present one."""
        return self.module._buffers.get(self.key)  # noqa: SLF001 - get_buffer() raises where there is none


@dataclass(slots=True)
class Tie:
    """A buffer that is a view of a parameter, in whose memory it must stay when that moves.

    ``offset``: in elements from the parameter's first.
    """

    place: Place
    parameter: torch.nn.Parameter
    offset: int
    stride: tuple[int, ...]  # the parameter's

    def follow(self) -> None:
        """Lie where the parameter lies now."""
        buffer, parameter = self.place.buffer, self.parameter.detach()
        if buffer is None or parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
            return
        if parameter.stride() != self.stride:
            raise UsageError(
                f"buffer {self.place.path!r} is a view of a parameter whose memory format changes in the table; make "
                "the parameter contiguous before the optimizer, or the buffer a clone()"
            )
        at = parameter.storage_offset() + self.offset
        buffer.data = parameter.as_strided(buffer.shape, buffer.stride(), at)


@dataclass(slots=True)
class Sorted:
    """A model's buffers. Those that are not persistent are in none but ``ties``: they are no part of its state."""

    places: dict[str, Place] = field(default_factory=dict)  # have a mean
    kept: list[Place] = field(default_factory=list)  # have none
    ties: list[Tie] = field(default_factory=list)


def sort(model: torch.nn.Module, *, told: bool) -> Sorted:
    """Each buffer once, by the first name under which the model has it.

    Raises ``UsageError`` for one without values or a shape (if ``told``), or one that shares memory with parameters
    and is no view of one of them.
    """
    found = Sorted()
    parameters = _by_storage(model.parameters())
    empty: list[Place] = []
    for path, buffer in model.named_buffers():
        owner, _, key = path.rpartition(".")
        module = model.get_submodule(owner)
        place = Place(plain_name(path), module, key)
        tie = _tie(place, buffer, parameters)
        if tie is not None:
            found.ties.append(tie)
        elif key not in module._non_persistent_buffers_set:  # noqa: SLF001 - the one place where torch keeps it
            if told:
                _check_filled(path, buffer)
            if not averaged(buffer):
                found.kept.append(place)
            elif buffer.numel():
                found.places[place.path] = place
            else:
                empty.append(place)
    if found.places:
        found.places.update({place.path: place for place in empty})
    else:  # a table holds at least one element
        found.kept.extend(empty)
    return found


def averaged(buffer: torch.Tensor) -> bool:
    """Whether it has a mean over workers: plain strided numbers of a dtype that a table holds, and not bool."""
    return _plain(buffer) and buffer.dtype in _AVERAGED and not buffer.is_neg()


def plain_name(path: str) -> str:
    """Without what ``torch.compile`` puts into names."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def same_bits(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the buffer, seen from the CPU, is ``value`` (of its shape) in the buffer's dtype already."""
    if not buffer.is_cpu:
        return False
    dtype = buffer.dtype
    bits = _BITS[dtype.itemsize]
    plain = buffer.detach() if buffer.requires_grad else buffer
    return torch.equal(plain.view(bits), (value if value.dtype is dtype else value.to(dtype)).view(bits))


def write(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value`` into the buffer, whatever its memory looks like: expanded, made in inference mode."""
    with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
        if not _overlaps(buffer):
            buffer.copy_(value)
            return
        span = 1 + sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
        flat = buffer.detach().as_strided((span,), (1,))
        index = torch.arange(span, device="cpu").as_strided(buffer.shape, buffer.stride())
        # What shares memory was contributed alike by each worker, and so is averaged alike.
        flat[index.reshape(-1).to(buffer.device)] = value.reshape(-1).to(buffer.device, buffer.dtype)


class Kept:
    """A persistent buffer that stays this worker's, watched for changes.

    ``late``: it was registered after the optimizer was made; then it counts as changed.
    """

    def __init__(self, place: Place, *, late: bool = False) -> None:
        self.path = place.path
        self._place = place
        self._late = late
        self._seen: torch.Tensor | None = None
        self._stamp = -1, -1
        self._last = 0
        self._first = self.fingerprint()

    @property
    def kind(self) -> str:
        """In words, for a message."""
        buffer = self._place.buffer
        if self._late:
            return "registered after the optimizer was made"
        if buffer is None or (averaged(buffer) and buffer.numel()):
            return "empty when the optimizer was made"
        if type(buffer) is not torch.Tensor:
            return type(buffer).__name__
        return str(buffer.dtype if buffer.layout is torch.strided else buffer.layout).removeprefix("torch.")

    def changed(self) -> bool:
        """Whether it is not what it was at the beginning."""
        return self.fingerprint() != self._first or self._late

    def fingerprint(self) -> int:
        """63 bits of its content."""
        buffer = self._place.buffer
        if buffer is None:
            return 0
        stamp = (-1, -1) if buffer.is_inference() else (buffer._version, _address(buffer))  # noqa: SLF001
        if buffer is not self._seen or stamp != self._stamp or buffer.numel() * buffer.element_size() <= _SMALL:
            hashed = xxhash.xxh3_64(repr((buffer.dtype, buffer.numel())).encode())
            for piece in _pieces(buffer):
                hashed.update(memoryview(piece.numpy()))  # type: ignore[arg-type]
            self._seen, self._stamp, self._last = buffer, stamp, hashed.intdigest() >> 1
        return self._last


def digest(kept: Iterable[Kept]) -> int:
    """Of those that have changed, 63 bits; 0 if none has."""
    changed = [(each.path, each.fingerprint()) for each in kept if each.changed()]
    return xxhash.xxh3_64(repr(changed).encode()).intdigest() >> 1 if changed else 0


def _pieces(buffer: torch.Tensor) -> Iterator[torch.Tensor]:
    """All that it holds, as bytes on the CPU."""
    inner: Any = getattr(buffer, "__tensor_flatten__", None)
    with torch.no_grad():
        if inner is not None:
            for name in inner()[0]:
                yield from _pieces(getattr(buffer, name))
            return
        if buffer.is_nested:
            for part in buffer.unbind():
                yield from _pieces(part)
            return
        subclass = buffer.layout is torch.strided and type(buffer) is not torch.Tensor
        plain = (buffer.detach().as_subclass(torch.Tensor) if subclass else buffer.detach()).cpu()
        if plain.is_quantized:
            plain = plain.int_repr()
        if plain.layout is torch.sparse_coo:
            plain = plain.coalesce()
            parts: Sequence[torch.Tensor] = (plain.indices(), plain.values())
        elif plain.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = plain.crow_indices(), plain.col_indices(), plain.values()
        elif plain.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = plain.ccol_indices(), plain.row_indices(), plain.values()
        else:
            parts = (plain if plain.layout is torch.strided else plain.to_dense(),)
        for part in parts:
            yield part.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _address(buffer: torch.Tensor) -> int:
    return buffer.data_ptr() if _plain(buffer) else 0


def _check_filled(path: str, buffer: torch.Tensor) -> None:
    if torch.nn.parameter.is_lazy(buffer):
        raise UsageError(f"buffer {path!r} has no shape yet: run one forward through the lazy module first")
    if buffer.is_meta:
        raise UsageError(
            f"buffer {path!r} is on the meta device and has no values: make the module's buffers on the CPU, or "
            "pass buffers='local' and fill them yourself"
        )


# ---- memory --------------------------------------------------------------------------------------


def _by_storage(parameters: Iterable[torch.nn.Parameter]) -> dict[int, list[torch.nn.Parameter]]:
    """Trainable parameters, which move into the table, by the address of their storage."""
    found: dict[int, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad and _in_memory(parameter):
            found.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    return found


def _in_memory(tensor: torch.Tensor) -> bool:
    return _plain(tensor) and tensor.device.type == "cpu" and tensor.numel() > 0


def _plain(tensor: torch.Tensor) -> bool:
    usual = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return usual and not tensor.is_nested


def _tie(place: Place, buffer: torch.Tensor, parameters: dict[int, list[torch.nn.Parameter]]) -> Tie | None:
    if not _in_memory(buffer):
        return None
    start, stop = _extent(buffer)
    for parameter in parameters.get(buffer.untyped_storage().data_ptr(), ()):
        first, last = _extent(parameter)
        if start < last and first < stop:
            if first <= start and stop <= last and buffer.dtype is parameter.dtype:
                offset = (start - first) // buffer.element_size()
                return Tie(place, parameter, offset, parameter.stride())
            raise UsageError(
                f"buffer {place.path!r} shares memory with a parameter and is not a view of it alone, in its dtype; "
                "the parameter moves into the table's memory, and the buffer would stay. Make it a clone()"
            )
    return None


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes from its first element to past its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one place."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
