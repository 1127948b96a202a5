"""Answers to readers of a process's parts: memory, bytes or a delta. Deltas are made by a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from headwater.errors import ClusterError, ProtocolError, VersionExpired
from headwater.layout.dense import BLOCK
from headwater.transports.buffers import Buffer
from headwater.types import Span
from headwater.versions.parts import Encoded, Held, Key, PartOutbox
from headwater.wire import delta
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind, seal
from headwater.wire.outgoing import Asker, Instruction, Outgoing
from headwater.wire.sums import pack

log = logging.getLogger("headwater")

DELTAS = 8
"""Encoded deltas of one part that are kept, each from another base; together they are no larger than the part."""


@dataclass(slots=True)
class _Given:
    """A part whose memory one reader may map.

    ``count``: how often the reader was given it, less how often it has said that it unmapped it. It says so without
    naming the mapping, so the buffers are the reader's until ``count`` is 0.
    """

    buffers: set[Buffer] = field(default_factory=set)
    count: int = 0


class _Job(NamedTuple):
    """A delta to be encoded, if it takes no more than ``most`` of the part.

    The views keep both parts' memory from being used again meanwhile.
    """

    held: Held
    key: Key
    base: int
    old: memoryview
    new: memoryview
    spans: tuple[Span, ...]
    most: float


class PartAnswers:
    """``parts``: what is held here. ``wake`` makes the owner call ``woken`` soon; without it there are no threads.

    ``checked``: frames carry checksums of their bytes, beside the parts' own.
    """

    def __init__(
        self, parts: Mapping[Key, Held], outbox: PartOutbox, wake: Callable[[], None] | None, *, checked: bool
    ) -> None:
        self.sent_bytes = 0  # over connections
        self._parts = parts
        self._outbox = outbox
        self._wake = wake
        self._checked = checked
        self._given: dict[tuple[Key, int], _Given] = {}  # by whom the descriptors went to
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[Held, Key, int, bytes | None]] = queue.SimpleQueue()
        self._encoder: threading.Thread | None = None

    def receive(self, peer: int, frame: Frame) -> None:
        """A reader's question or word. Raises ``ProtocolError`` for what a reader does not say."""
        if frame.kind == Kind.REQUEST:
            request = m.unpack_request(frame.body)
            if isinstance(request, v.Fetch):
                self._outbox.frames += self._fetch(Asker(peer, frame.seq), request)
                return
            raise ProtocolError(f"{type(request).__name__} from a reader of versions")
        if frame.kind != Kind.NOTICE:
            raise ProtocolError(f"{frame.kind.name} from a reader of versions")
        notice = m.unpack_notice(frame.body) if frame.body else None
        if isinstance(notice, v.Unmap):
            self._unmapped(Key(notice.number, notice.shard, notice.table), peer)

    def _unmapped(self, key: Key, peer: int) -> None:
        given = self._given.get((key, peer))
        if given is None:
            return
        given.count -= 1
        if not given.count:
            self._forget((key, peer), clean=True)

    def _forget(self, given: tuple[Key, int], *, clean: bool) -> None:
        for buffer in self._given.pop(given).buffers:
            buffer.forget(given[1], clean=clean)

    def closed(self, peer: int) -> None:
        """A reader's connection ended. It may still map what it was given."""
        for given in [given for given in self._given if given[1] == peer]:
            self._forget(given, clean=False)
        for held in self._parts.values():
            for base, waiting in held.waiting.items():
                held.waiting[base] = [asked for asked in waiting if asked.peer != peer]

    def _fetch(self, asked: Asker, request: v.Fetch) -> list[Instruction]:
        key = Key(request.number, request.shard, request.table)
        held = self._parts.get(key)
        if held is None or held.sums is None:
            return [_refuse(asked, _expired(key))]
        if request.shared and held.buffer.fd >= 0:
            held.buffer.readers.add(asked.peer)
            given = self._given.setdefault((key, asked.peer), _Given())
            given.buffers.add(held.buffer)
            given.count += 1
            body = m.pack(self._part(held, "shared", 0))
            return [Outgoing(asked.peer, Frame(Kind.REPLY, seq=asked.seq, body=body), (held.buffer.fd,))]
        base = self._parts.get(key._replace(number=request.base))
        if base is None or base.sums is None or base is held or base.buffer.size != held.buffer.size:
            return self._whole(asked, held)
        most = delta.worth(request.link) if request.link > 0 else delta.DENSE
        if request.base in held.deltas:
            encoded = held.deltas[request.base]
            if encoded is not None or held.tried.get(request.base, most) >= most:
                fits = encoded is not None and len(encoded) <= most * held.buffer.size
                return self._answer(asked, held, encoded if fits else None)
        waiting = held.waiting.get(request.base)
        if waiting is not None:  # it is being made
            if any(other.peer == asked.peer for other in waiting):
                raise ProtocolError(f"a reader asked for one delta of {key} again before it was answered")
            waiting.append(asked)
        else:
            held.waiting[request.base] = [asked]
            held.tried[request.base] = most
            self._encode(_Job(held, key, request.base, base.buffer.lend(), held.buffer.lend(), held.spans, most))
        if self._wake is None:
            self.woken()
        return []

    def _answer(self, asked: Asker, held: Held, encoded: Encoded | None) -> list[Instruction]:
        if encoded is None:
            return self._whole(asked, held)
        return self._send(asked, self._part(held, "delta", len(encoded)), memoryview(encoded))

    def _whole(self, asked: Asker, held: Held) -> list[Instruction]:
        if self._wake is not None:
            self._start()  # who fetches one version whole will ask for a delta to the next
        return self._send(asked, self._part(held, "whole", held.buffer.size), held.buffer.lend())

    def _part(self, held: Held, encoding: v.Encoding, nbytes: int) -> v.Part:
        assert held.sums is not None
        return v.Part(held.buffer.size, pack(held.sums), encoding, nbytes)

    def _send(self, asked: Asker, part: v.Part, data: memoryview) -> list[Instruction]:
        """The reply, then the bytes in blocks: so that other connections get their turn."""
        self.sent_bytes += len(data)
        out: list[Instruction] = [Outgoing(asked.peer, Frame(Kind.REPLY, seq=asked.seq, body=m.pack(part)))]
        for at in range(0, len(data), BLOCK):
            piece = data[at : at + BLOCK]
            end = Flag.END if at + len(piece) == len(data) else Flag.NONE
            frame = Frame(Kind.PIECE, end, seq=asked.seq, start=at, stop=at + len(piece), payload=piece)
            if self._checked:
                seal(frame)
            out.append(Outgoing(asked.peer, frame))
        return out

    def dropped(self, key: Key, held: Held) -> None:
        """A part is not held any more: a reader that waits for a delta to it is told."""
        for waiting in held.waiting.values():
            self._outbox.frames += [_refuse(asked, _expired(key)) for asked in waiting]

    # ---- deltas ----------------------------------------------------------------------------------

    def _encode(self, job: _Job) -> None:
        if self._wake is None:
            self._made.put(_made(job))
            return
        self._start()
        self._jobs.put(job)

    def _start(self) -> None:
        if self._encoder is None:
            self._encoder = threading.Thread(target=self._run, name="headwater-delta", daemon=True)
            self._encoder.start()

    def _run(self) -> None:
        delta.warm()
        while (job := self._jobs.get()) is not None:
            self._made.put(_made(job))
            del job  # its views hold memory
            if self._wake is not None:
                self._wake()

    def _encoded(self, key: Key, base: int, encoded: bytes | None) -> list[Instruction]:
        held = self._parts[key]
        held.deltas[base] = encoded
        while len(held.deltas) > DELTAS or (len(held.deltas) > 1 and _bytes_of(held.deltas) > held.buffer.size):
            oldest = next(iter(held.deltas))
            del held.deltas[oldest]
            held.tried.pop(oldest, None)
        return [x for asked in held.waiting.pop(base, ()) for x in self._answer(asked, held, encoded)]

    def woken(self) -> None:
        """Deltas that have been made."""
        while not self._made.empty():
            held, key, base, encoded = self._made.get()
            if self._parts.get(key) is held:  # else dropped meanwhile, perhaps for another; who waited was told
                self._outbox.frames += self._encoded(key, base, encoded)

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)


def _made(job: _Job) -> tuple[Held, Key, int, bytes | None]:
    old, new = np.frombuffer(job.old, dtype=np.uint8), np.frombuffer(job.new, dtype=np.uint8)
    try:
        return job.held, job.key, job.base, delta.encode(old, new, job.spans, job.most)
    except Exception:  # whatever it is, the next one may go well, and readers wait for this one
        log.exception("no delta from version number %d to %s: it is sent whole", job.base, job.key)
        return job.held, job.key, job.base, None


def _bytes_of(deltas: Mapping[int, Encoded | None]) -> int:
    return sum(len(encoded) for encoded in deltas.values() if encoded is not None)


def _refuse(asked: Asker, error: ClusterError) -> Outgoing:
    return Outgoing(asked.peer, Frame(Kind.ERROR, seq=asked.seq, body=m.error_body(error)))


def _expired(key: Key) -> VersionExpired:
    return VersionExpired(
        f"version number {key.number} is not held here (shard {key.shard}, table {key.table}): it was retired, or this "
        "process has just begun. Lease the newest one"
    )
