"""Holders of versions that a test can make answer as it likes, and a fetcher that asks them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import numpy as np

from headwater.errors import (
    DeadlineExceeded,
    HeadwaterError,
    LinkBroken,
    ProtocolError,
)
from headwater.layout.dense import layout
from headwater.layout.words import spans
from headwater.readers.fetch import Fetcher
from headwater.readers.stored import Base, Stored
from headwater.readers.weights import Weights
from headwater.transports import memory
from headwater.transports.stream import Handler
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec, VersionInfo
from headwater.wire import delta
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind
from headwater.wire.sums import checksums, digest, pack

SPEC = DenseSpec("t", (ParameterSpec("w", (400_000,)),), OptimizerSpec("SGD", ({"lr": 1.0},)))
SHARDS = 2
PLAN = layout(SPEC, SHARDS)
Said = tuple[Frame, bytes, tuple[int, ...]]


@cache
def state(number: int) -> list[np.ndarray]:
    """The parts of version ``number``, by shard; a few words differ from those of another."""
    made = []
    for shard, size in enumerate(PLAN.sizes):
        words = np.random.default_rng(shard).integers(0, 1 << 32, size // 4, dtype=np.uint32)
        words[number::1000] += number
        made.append(words.view(np.uint8))
    return made


def leased(number: int = 1, **changes: Any) -> v.Leased:
    parts = tuple(
        v.PartAt(shard, 1, len(part), digest(checksums(part)), (v.Holder(f"inproc://{shard}", "", ""),))
        for shard, part in enumerate(state(number))
    )
    info = VersionInfo("m", number, f"v{number}", 0, 0, 0.0, ("t",), sum(PLAN.sizes), f"{number}")
    return msgspec.structs.replace(v.Leased(info, SHARDS, (1,), ((1, SPEC),), parts), **changes)


class Holders:
    """Who answers, and how: ``answer`` makes what is said to a question of the honest answer to it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answer: Callable[[Frame, v.Fetch, list[Said]], Sequence[Said]] = lambda frame, fetch, said: said
        self.links: list[Link] = []
        self.asked: list[v.Fetch] = []
        self.unmapped: list[v.Unmap] = []
        self.shared = False
        self.refused: HeadwaterError | None = None
        self.fetcher = Fetcher(self._dial, now=lambda: self.now)

    def _dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        if self.refused is not None:
            error, self.refused = self.refused, None
            raise error
        self.links.append(Link(self, handler))
        return self.links[-1]

    def honest(self, frame: Frame, fetch: v.Fetch) -> list[Said]:
        """A whole part in two pieces, a delta where there is a base, or memory."""
        part = state(fetch.number)[fetch.shard]
        sums = pack(checksums(part))

        def reply(encoding: v.Encoding, nbytes: int, fds: tuple[int, ...] = ()) -> Said:
            return Frame(Kind.REPLY, seq=frame.seq, body=m.pack(v.Part(len(part), sums, encoding, nbytes))), b"", fds

        if fetch.shared:
            fd = memory.create("part", len(part))
            os.pwrite(fd, part.tobytes(), 0)
            return [reply("shared", 0, (fd,))]
        data, encoding = part.tobytes(), "whole"
        if fetch.base:
            words = spans(SPEC, PLAN.segments[fetch.shard], len(part))
            encoded = delta.encode(state(fetch.base)[fetch.shard], part, words)
            assert encoded is not None
            data, encoding = encoded, "delta"
        half = len(data) // 2
        return [
            reply(encoding, len(data)),  # type: ignore[arg-type]
            (Frame(Kind.PIECE, 0, seq=frame.seq, stop=half, payload_length=half), data[:half], ()),
            (
                Frame(Kind.PIECE, Flag.END, seq=frame.seq, start=half, stop=len(data), payload_length=len(data) - half),
                data[half:],
                (),
            ),
        ]

    def store(self, number: int = 1, base: Stored | Base | None = None, **changes: Any) -> Stored:
        return self.fetcher.store(leased(number, **changes), {1: SPEC}, base, self.now + 100)


class Link:
    """One connection to them. What arrives is taken as a socket's reader takes it."""

    def __init__(self, holders: Holders, handler: Handler) -> None:
        self.shared = holders.shared
        self.error: HeadwaterError | None = None
        self.queue: deque[Said] = deque()
        self._holders, self._handler = holders, handler

    def send(self, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        if self.error is not None:
            raise self.error
        message = m.unpack_request(frame.body) if frame.kind == Kind.REQUEST else m.unpack_notice(frame.body)
        if isinstance(message, v.Unmap):
            self._holders.unmapped.append(message)
            return
        assert isinstance(message, v.Fetch)
        self._holders.asked.append(message)
        self.queue += self._holders.answer(frame, message, self._holders.honest(frame, message))

    def pump(self, done: Callable[[], bool], deadline: float) -> None:
        while not done():
            if self.error is not None:
                raise self.error
            if not self.queue:
                self._holders.now = deadline
                raise DeadlineExceeded("nothing came")
            frame, payload, fds = self.queue.popleft()
            try:
                if frame.payload_length:
                    self._handler.landing(frame)[:] = payload
                self._handler.receive(frame, fds)
            except (LinkBroken, ProtocolError) as error:
                self.error = error
                raise

    def prefetch(self, done: Callable[[], bool]) -> None:
        raise AssertionError

    def close(self) -> None:
        self.error = self.error or LinkBroken("closed")
        for _, _, fds in self.queue:
            memory.close_all(fds)
        self.queue.clear()


def right(stored: Stored, number: int) -> bool:
    weights = Weights(stored, lambda: None, lambda: None)
    found = weights["w"].numpy().view(np.uint8)
    wanted = np.zeros(PLAN.size, np.uint8)
    parts = state(number)
    for block in PLAN.blocks:
        wanted[block.start : block.start + block.size] = parts[block.shard][block.local : block.local + block.size]
    return bool(np.array_equal(found.ravel(), wanted[PLAN.offsets[0] : PLAN.offsets[0] + found.size]))


def part_of(said: list[Said], **changes: Any) -> list[Said]:
    """The same answer with another ``Part``."""
    (frame, data, fds), *rest = said
    part = m.unpack_reply(frame.body)
    return [(replace(frame, body=m.pack(msgspec.structs.replace(part, **changes))), data, fds), *rest]
