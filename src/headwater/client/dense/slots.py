"""A table's optimizer state as it travels: cut where the shards' segments are, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from headwater.types import DenseSpec, Segment
from headwater.wire import messages as m
from headwater.wire.tensors import from_bytes, to_bytes

_REQUEST = 4 << 20  # bytes of optimizer state per request

Slots = Mapping[str, Mapping[str, torch.Tensor]]


def join_slots(spec: DenseSpec, pieces: Iterable[m.Slot]) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter and slot name, in the shapes of ``torch.optim``."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for slot in pieces:
        _place(spec, found, slot)
    for p in spec.parameters:
        for name, value in found.get(p.name, {}).items():
            if value.numel() == p.numel and value.ndim == 1:
                found[p.name][name] = value.view(p.shape)
    return found


def _place(spec: DenseSpec, found: dict[str, dict[str, torch.Tensor]], slot: m.Slot) -> None:
    p = spec.parameters[slot.parameter]
    piece = from_bytes(slot.data, slot.dtype, slot.shape)
    slots = found.setdefault(p.name, {})
    if piece.ndim != 1 or piece.numel() == p.numel:
        slots[slot.name] = piece
        return
    whole = slots.setdefault(slot.name, torch.zeros(p.numel, dtype=piece.dtype, device="cpu"))
    whole[slot.start : slot.start + piece.numel()] = piece


def slot_requests(table: int, spec: DenseSpec, segments: Sequence[Segment], slots: Slots) -> Iterator[m.SlotPart]:
    """What makes ``slots`` the whole state of one shard, which holds ``segments``: a few megabytes each."""
    batch: list[m.Slot] = []
    size, first = 0, True
    for slot in _cut(spec, segments, slots):
        batch.append(slot)
        size += len(slot.data)
        if size > _REQUEST:
            yield m.SlotPart(table, tuple(batch), True, first)
            batch, size, first = [], 0, False
    yield m.SlotPart(table, tuple(batch), False, first)


def _cut(spec: DenseSpec, segments: Sequence[Segment], slots: Slots) -> Iterator[m.Slot]:
    for segment in segments:
        p = spec.parameters[segment.parameter]
        for name, value in slots.get(p.name, {}).items():
            piece = value
            if value.numel() == p.numel and value.ndim and (segment.start, segment.stop) != (0, p.numel):
                piece = value.reshape(-1)[segment.start : segment.stop]
            data, dtype = to_bytes(piece)
            yield m.Slot(segment.parameter, name, segment.start, tuple(piece.shape), dtype, data)
