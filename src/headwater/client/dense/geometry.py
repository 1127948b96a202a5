"""Where a shard's own bytes of a dense table lie in the table's flat memory, and which of them a push is cut into."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence

from headwater.layout.dense import Block
from headwater.types import DenseSpec, Segment

Span = tuple[int, int]


class ShardGeometry:
    """One shard's part of a table. Local bytes count from 0 on the shard; ``blocks`` are in their order."""

    def __init__(self, blocks: Sequence[Block], segments: Sequence[Segment]) -> None:
        self.blocks = tuple(blocks)
        self.segments = tuple(segments)
        self.size = sum(block.size for block in blocks)
        self._starts = [block.local for block in blocks]

    def spans_of(self, parameters: Collection[int]) -> list[Span]:
        """The local byte ranges of these parameters (by index), neighbours joined."""
        spans: list[Span] = []
        last = -2
        for i, segment in enumerate(self.segments):
            if segment.parameter in parameters:
                if last == i - 1:
                    spans[-1] = (spans[-1][0], segment.end)
                else:
                    spans.append((segment.offset, segment.end))
                last = i
        return spans

    def end_of(self, parameters: Collection[int]) -> int:
        """The local byte below which all of these parameters lie."""
        return max((s.end for s in self.segments if s.parameter in parameters), default=0)

    def parameters_in(self, spans: Sequence[Span]) -> set[int]:
        """The parameters (by index) of which a segment begins in ``spans``."""
        return {s.parameter for s in self.segments if any(a <= s.offset < b for a, b in spans)}

    def pieces(self, spec: DenseSpec, flats: Mapping[int, memoryview]) -> list[tuple[Segment, memoryview]]:
        """Of whole parameters (by index), the bytes that lie on this shard, segment by segment."""
        found = []
        for segment in self.segments:
            if segment.parameter in flats:
                p = spec.parameters[segment.parameter]
                size = p.nbytes // max(1, p.numel)
                found.append((segment, flats[segment.parameter][segment.start * size : segment.stop * size]))
        return found

    def cut(self, spans: Sequence[Span]) -> list[tuple[int, int, int]]:
        """Pieces of spans that end where blocks do: local start and end, and where that is in the flat memory."""
        pieces = []
        for start, stop in spans:
            at = start
            while at < stop:
                block = self.blocks[bisect_right(self._starts, at) - 1]
                end = min(stop, block.local + block.size)
                pieces.append((at, end, block.start + at - block.local))
                at = end
        return pieces

    def flat(self, local: int) -> int:
        """The flat offset of a local byte."""
        block = self.blocks[bisect_right(self._starts, local) - 1]
        return block.start + local - block.local
