"""A relay's line to where its versions come from: one thread hears what there is, another fetches."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable

import msgspec

from headwater.client.control import Control, Dial
from headwater.client.runtime import Runtime, Threads
from headwater.errors import DeadlineExceeded, HeadwaterError, InternalError, ProtocolError, VersionExpired
from headwater.readers.fetch import Fetcher, Got
from headwater.relay.events import Base, Event, Failed, Fetched, Job, Listed, PartKey, Silent, same
from headwater.transports.address import host_identity
from headwater.transports.buffers import BufferPool
from headwater.types import VersionInfo
from headwater.wire import delta
from headwater.wire import messages as m
from headwater.wire import versions as v

BEAT = 1.0  # seconds between two signs of life
JOIN = 30.0  # seconds that the other side may take to let it in: servers may be on their way
POLL = 1.0  # seconds after which the list is asked for although there is no news
ANSWER = 5.0  # seconds in which the other side has to answer
AGAIN = 0.2  # seconds between two attempts to reach it
STALL = 30.0  # seconds in which some bytes of a part must come
END = 10.0  # seconds that a fetch under way has to end in, when the relay does


class Feeder:
    """``post`` is called with what happens, from threads of its own. ``pool``: where fetched parts go.

    Raises what the other side refuses a reader with, or ``Unreachable``.
    """

    def __init__(
        self, dial: Dial, pool: BufferPool, post: Callable[[Event], None], runtime: Runtime | None = None
    ) -> None:
        self._runtime = runtime or Threads()
        join = m.Join("reader", self._runtime.token(), host_identity(), os.getpid())
        self._control = Control(dial, join, self._runtime, JOIN)
        self._fetcher = Fetcher(dial, share=False, pool=pool)
        self._post = post
        self._closed = threading.Event()
        self._jobs: queue.SimpleQueue[Job | v.Release | None] = queue.SimpleQueue()
        self._turn = 0  # how many leases this relay has asked for; a turn is the number of one of them
        self._asking = False  # whether the last one's answer has not come
        self._open: dict[int, int] = {}  # turns of the leases that stand, and the numbers of their versions
        self._guard = threading.Lock()
        self._begun: tuple[VersionInfo | None, dict[PartKey, Got]] = (None, {})  # of a version that did not come whole
        self._threads = [
            threading.Thread(target=self._listen, name="headwater-relay-list", daemon=True),
            threading.Thread(target=self._work, name="headwater-relay-fetch", daemon=True),
        ]

    @property
    def fetched_bytes(self) -> int:
        """Bytes of parts and deltas that came."""
        return self._fetcher.fetched_bytes

    def start(self) -> None:
        """Begin to post what happens."""
        self._stop = self._runtime.every(BEAT, self._beat)
        for thread in self._threads:
            thread.start()

    def do(self, order: Job | v.Release) -> None:
        """Fetch a version, or end a lease; in their turn."""
        self._jobs.put(order)

    def close(self) -> None:
        """Leave. A fetch under way is given up."""
        self._closed.set()
        self._stop()
        self._jobs.put(None)
        self._fetcher.hang_up()
        with contextlib.suppress(HeadwaterError):
            self._control.leave()
        self._control.close()
        for thread in self._threads:
            thread.join(END)
        self._fetcher.close()

    def _beat(self) -> None:
        with self._guard:
            holding = v.Holding(tuple(self._open.items()), self._turn - self._asking)
        with contextlib.suppress(HeadwaterError):
            self._control.notify(m.Heartbeat())
            self._control.notify(holding)

    # ---- what there is ---------------------------------------------------------------------------

    def _listen(self) -> None:
        known = 0
        while not self._closed.is_set():
            try:
                listed = self._control.ask(v.ListVersions(after=known), POLL if known else ANSWER)
                if not isinstance(listed, v.VersionList):
                    raise ProtocolError(f"{type(listed).__name__} came in answer to the question for versions")
            except DeadlineExceeded as error:
                if not known:
                    self._post(Silent(f"no answer in {ANSWER:.0f} s ({error.code})"))
                known = 0  # no news, or nobody there: the next question tells
            except Exception as error:  # noqa: BLE001 - a relay serves on, and says why it hears nothing
                known = 0
                if not self._closed.is_set():
                    self._post(Silent(str(error) if isinstance(error, HeadwaterError) else repr(error)))
                    self._closed.wait(AGAIN)
            else:
                known = listed.revision
                self._post(Listed(listed))

    # ---- fetching --------------------------------------------------------------------------------

    def _work(self) -> None:
        while (order := self._jobs.get()) is not None:
            if isinstance(order, v.Release):
                self._release(order.number)
            elif not self._closed.is_set():
                self._post(self._outcome(order))
                delta.warm()  # the next one may be a delta
            del order  # a job's loans hold memory

    def _outcome(self, job: Job) -> Event:
        try:
            return self._fetch(job)
        except HeadwaterError as error:
            return Failed(job, error)
        except Exception as error:  # noqa: BLE001 - a relay serves on, and says what happened
            return Failed(job, InternalError(f"{type(error).__name__}: {error}"))

    def _fetch(self, job: Job) -> Fetched:
        began, before = self._runtime.now(), self.fetched_bytes
        leased = self._lease(job)
        base = nearest(job)
        try:
            parts = self._parts(job, leased, base)
        except BaseException:
            self._release(job.info.number)
            raise
        seconds = self._runtime.now() - began
        return Fetched(job, leased, parts, base.number, self.fetched_bytes - before, seconds)

    def _lease(self, job: Job) -> v.Leased:
        info = job.info
        with self._guard:
            self._turn, self._asking = self._turn + 1, True
        try:
            leased = self._control.ask(v.Lease(info.model, info.name, turn=self._turn), ANSWER)
            if not isinstance(leased, v.Leased):
                raise ProtocolError(f"{type(leased).__name__} came in answer to the wish for a lease")
            with self._guard:
                self._open[self._turn] = leased.info.number
        finally:
            self._asking = False
        if not same(leased.info, info):
            self._release(leased.info.number)
            raise VersionExpired(f"version {info.name!r} (number {info.number}) is another one by now")
        return leased

    def _release(self, number: int) -> None:
        """End the lease of a version, if there is one."""
        with self._guard:
            turn = next((turn for turn, leased in self._open.items() if leased == number), 0)
            self._open.pop(turn, None)
        with contextlib.suppress(HeadwaterError):  # then it ends with the next beat
            if turn:
                self._control.notify(v.Release(number, turn))

    def _parts(self, job: Job, leased: v.Leased, base: Base) -> dict[PartKey, Got]:
        """All parts of a version. What came before something went wrong need not come again."""
        before, got = self._begun
        if before is None or not same(before, job.info):
            for part in got.values():
                self._fetcher.pool.give(part.buffer)
            got = {}
        self._begun = (job.info, got)
        missing = [turned(at, job.attempt) for at in leased.parts if (at.shard, at.table) not in got]

        def arrived(part: Got) -> None:
            got[part.at.shard, part.at.table] = part

        self._fetcher.parts(job.info.number, missing, base.number, base.buffers, STALL, arrived)
        self._begun = (None, {})
        return got


def nearest(job: Job) -> Base:
    """The version that the fewest steps lie between; the one before, of two."""
    wanted = job.info.number
    return min(job.bases, key=lambda base: (abs(base.number - wanted), base.number), default=Base(0, {}, ()))


def turned(at: v.PartAt, attempt: int) -> v.PartAt:
    """The same part, with another holder first: the one before may be what is wrong."""
    first = attempt % max(1, len(at.holders))
    return msgspec.structs.replace(at, holders=(*at.holders[first:], *at.holders[:first]))
