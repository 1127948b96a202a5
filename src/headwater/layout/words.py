"""Which bytes of a part hold words of which size, for the delta codec."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.layout.dense import layout
from headwater.types import ITEMSIZE, DenseSpec, Segment, Span


def spans(spec: DenseSpec, segments: Sequence[Segment], size: int) -> tuple[Span, ...]:
    """The whole part of ``size`` bytes as stretches of 2-byte and of 4-byte words.

    Padding belongs to the stretch before it: it is zero in every version, so it costs nothing.
    """
    found: list[Span] = []
    for segment in sorted(segments, key=lambda segment: segment.offset):
        word = 2 if ITEMSIZE[spec.parameters[segment.parameter].dtype] == 2 else 4
        if found and found[-1].word == word:
            continue
        start = segment.offset if found else 0
        if found:
            found[-1] = found[-1]._replace(stop=start)
        found.append(Span(start, size, word))
    return tuple(found)


def dense_spans(spec: DenseSpec, shards: int, shard: int, size: int) -> tuple[Span, ...]:
    """``spans`` of one shard's part of a table over so many."""
    return spans(spec, layout(spec, shards).segments[shard], size)
