"""A relay's core with another side that a test writes: versions by name, fetched on order, no sockets, no clock."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np
import xxhash

from headwater.errors import HeadwaterError
from headwater.layout.dense import layout
from headwater.readers.fetch import Got
from headwater.relay.core import Relay, RelayEffects
from headwater.relay.events import Event, Failed, Fetched, Job, Listed, News, Silent
from headwater.transports.buffers import BufferPool
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec, VersionInfo
from headwater.versions.part_store import PartStore
from headwater.wire import messages as m
from headwater.wire import sums
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Instruction, Outgoing

ME = v.Holder("tcp://127.0.0.1:1", "local://relay", "here")
FAR = v.Holder("tcp://127.0.0.1:2", "", "there")
UPSTREAM = "tcp://127.0.0.1:3"
SPEC = DenseSpec("lm", (ParameterSpec("w", (32768,)),), OptimizerSpec("SGD", ({"lr": 0.1},)))
SHARDS = 2

Answer = TypeVar("Answer")
A, B = 1, 2  # readers' connections


class FakeUpstream:
    """``now``: the clock. ``theirs``: what the other side has, by number."""

    def __init__(self, *models: str, keep: int = 3) -> None:
        self.part_store = PartStore()
        self.relay = Relay(ME, self.part_store, models or ("lm",), UPSTREAM, keep, 0.0)
        self.now = 0.0
        self.theirs: dict[int, v.VersionStatus] = {}
        self.pool = BufferPool(share=False)
        self.said: list[Instruction] = []
        self.orders: list[Job | v.Release] = []
        self.news: list[News] = []
        self._seqs = 0

    # ---- the other side --------------------------------------------------------------------------

    def has(self, number: int, name: str = "", *tags: str, model: str = "lm", era: str = "") -> VersionInfo:
        """The other side has this version from now on. ``era``: which cluster's it is."""
        for other in [each for each in self.theirs.values() if each.info.model == model]:  # a tag means one version
            left = tuple(tag for tag in other.tags if tag not in tags)
            self.theirs[other.info.number] = msgspec.structs.replace(other, tags=left)
        content = _content(model, number, era)
        info = VersionInfo(
            model, number, name or f"v{number}", number - 1, number, 1000.0 + number, (model,), len(content),
            xxhash.xxh3_64_hexdigest(content),
        )  # fmt: skip
        self.theirs[number] = v.VersionStatus(info, "ready", tags, 0, 1)
        return info

    def lists(self, silent: float = 0.0, why: str = "") -> None:
        """The other side says what it has."""
        self.happens(Listed(v.VersionList(tuple(self.theirs.values()), 1, silent, why)))

    def happens(self, event: Event) -> None:
        self._keep(self.relay.happened(event, self.now))

    def silent(self, why: str = "nobody answers") -> None:
        self.happens(Silent(why))

    def job(self) -> Job:
        """The version that is to be fetched; there must be one."""
        return next(order for order in self.orders if isinstance(order, Job))

    def idle(self) -> bool:
        return not any(isinstance(order, Job) for order in self.orders)

    def released(self) -> list[int]:
        """The leases on the other side that were ended."""
        return [order.number for order in self.orders if isinstance(order, v.Release)]

    def fetch(self, era: str = "", delta: bytes | None = None, base: int = 0) -> VersionInfo:
        """What is to be fetched comes."""
        job = self.job()
        self.orders.remove(job)
        info = job.info
        parts, at = {}, []
        content = _content(info.model, info.number, era)
        spec = msgspec.structs.replace(SPEC, name=info.model)
        for shard, size in enumerate(layout(spec, SHARDS).sizes):
            buffer = self.pool.take(size)
            buffer.array[:] = np.resize(np.frombuffer(content, dtype=np.uint8), size)
            found = sums.checksums(buffer.array)
            at.append(v.PartAt(shard, 7, size, sums.digest(found), (FAR,)))
            encoded = None if delta is None else memoryview(delta)
            parts[shard, 7] = Got(at[-1], buffer, found, encoded)
        leased = v.Leased(info, SHARDS, (7,), ((7, spec),), tuple(at))
        self.happens(Fetched(job, leased, parts, base, 123, 0.5))
        return info

    def fetch_all(self) -> list[str]:
        """Until nothing is to be fetched; the names, in their order."""
        names = []
        while not self.idle():
            names.append(self.fetch().name)
        return names

    def fail(self, error: HeadwaterError) -> None:
        """What is to be fetched does not come."""
        job = self.job()
        self.orders.remove(job)
        self.happens(Failed(job, error))

    # ---- readers ---------------------------------------------------------------------------------

    def tick(self, seconds: float = 0.1) -> None:
        """Time passes, in steps as a loop's."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now = min(until, self.now + 0.1)
            self._keep(self.relay.tick(self.now))

    def beat(self, *peers: int) -> None:
        for peer in peers:
            self.notify(peer, m.Heartbeat())

    def join(self, peer: int, session: int | None = None) -> None:
        joined = self.ask(peer, m.Join("reader", peer if session is None else session), m.Joined)
        assert joined.relay
        assert joined.durable
        assert joined.rank == -1

    def send(self, peer: int, message: m.Request) -> int:
        """Ask; the answer may come later, under this number."""
        self._seqs += 1
        frame = Frame(Kind.REQUEST, seq=self._seqs, body=m.pack(message))
        self._keep(self.relay.receive(peer, frame, self.now))
        return self._seqs

    def notify(self, peer: int, message: m.Notice) -> None:
        self._keep(self.relay.receive(peer, Frame(Kind.NOTICE, body=m.pack(message)), self.now))

    def gone(self, peer: int) -> None:
        self._keep(self.relay.closed(peer, self.now))

    def answer(self, seq: int) -> m.Reply | HeadwaterError | None:
        """What has come under this number."""
        for out in self.said:
            if isinstance(out, Outgoing) and out.frame.seq == seq and out.frame.kind in (Kind.REPLY, Kind.ERROR):
                failed = out.frame.kind == Kind.ERROR
                return m.read_error(out.frame.body) if failed else m.unpack_reply(out.frame.body)
        return None

    def bytes_of(self, seq: int) -> bytes:
        """The bytes that came under this number."""
        frames = [out.frame for out in self.said if isinstance(out, Outgoing) and out.frame.seq == seq]
        return b"".join(bytes(frame.payload) for frame in frames if frame.payload is not None)

    def ask(self, peer: int, message: m.Request, kind: type[Answer]) -> Answer:
        """Ask for what is answered at once. Raises what it is refused with."""
        answer = self.answer(self.send(peer, message))
        if isinstance(answer, HeadwaterError):
            raise answer
        assert isinstance(answer, kind)
        return answer

    def lease(self, peer: int, name: str = "latest", model: str = "lm", turn: int = 0) -> v.Leased:
        return self.ask(peer, v.Lease(model, name, turn=turn), v.Leased)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Versions that are here, with their tags."""
        return {each.info.name: each.tags for each in self.listed().versions}

    def listed(self) -> v.VersionList:
        return self.ask(99, v.ListVersions(), v.VersionList)

    def content(self, leased: v.Leased, shard: int = 0, base: int = 0) -> bytes:
        """A part, as a reader gets it over another connection."""
        seq = self.send(98, v.Fetch(leased.info.number, shard, 7, base))
        answer = self.answer(seq)
        if isinstance(answer, HeadwaterError):
            raise answer
        return self.bytes_of(seq)

    def _keep(self, effects: RelayEffects) -> None:
        self.said += effects.frames
        self.orders += effects.orders
        self.news += effects.news


def _content(model: str, number: int, era: str) -> bytes:
    return f"{model} {number} {era}.".encode()
