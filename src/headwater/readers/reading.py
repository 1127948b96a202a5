"""``headwater.reader``: a client that only reads published versions. Importing it loads no torch; a lease does."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from headwater.client import publication
from headwater.client.connecting import dial_for
from headwater.client.control import Control
from headwater.client.runtime import Runtime, Threads
from headwater.errors import (
    DeadlineExceeded,
    HeadwaterError,
    InternalError,
    LinkError,
    UsageError,
    VersionExpired,
)
from headwater.readers.fetch import SILENT, Counts, Fetcher, Got
from headwater.readers.stored import Base
from headwater.transports.address import host_identity
from headwater.types import TableSpec, VersionInfo
from headwater.wire import messages as m
from headwater.wire import versions as v

if TYPE_CHECKING:
    import torch

    from headwater.readers.follow import Follower
    from headwater.readers.line import Dial
    from headwater.readers.stored import Stored
    from headwater.readers.weights import Weights

T = TypeVar("T")
LATEST = "latest"
BEAT = 1.0  # seconds between two signs of life: its leases end 10 s after the last
QUIET = 5.0  # seconds without an answer after which one is asked for
ANSWER = 3.0  # seconds in which it has to come
AGAIN = 0.05  # seconds until a lease that failed for somebody's death is asked for again


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """How a reader stands.

    ``connected``: the cluster answered last time, or a relay that hears from its cluster. ``version``: the newest one
    that was leased here. ``age``: seconds since when it may not be the newest any more, 0 while connected. ``error``:
    what went wrong last, empty while connected. ``leases``: that are open. ``fetched_bytes``: that came over
    connections; shared memory does not count.
    """

    connected: bool
    version: VersionInfo | None
    age: float
    error: str
    leases: int
    fetched_bytes: int
    parts: Counts


def reader(
    model: str = "model",
    address: str | None = None,
    *,
    timeout: float | None = None,
    share: bool = True,
) -> Reader:
    """Read the published versions of a table set.

    Args:
        model: the table set: the ``name`` of the trainer's ``headwater.Optimizer``.
        address: of the coordinator or of a relay, as for ``headwater.connect``; default ``HEADWATER_ADDRESS``. The
            token comes from the environment as there.
        timeout: seconds that any wait may take (``HEADWATER_TIMEOUT``, else 300).
        share: map the memory of servers on this host instead of copying it.

    Raises:
        Unreachable: nobody answers there.
        AuthenticationFailed: the token is wrong or missing.
    """
    patience = float(os.environ.get("HEADWATER_TIMEOUT", "300")) if timeout is None else timeout
    return Reader(model, dial_for(address, patience), timeout=patience, share=share)


class Reader:
    """Made by ``headwater.reader``. Thread-safe, and a context manager."""

    def __init__(
        self, model: str, dial: Dial, *, timeout: float, share: bool = True, runtime: Runtime | None = None
    ) -> None:
        self.model = model
        self.timeout = timeout
        self._runtime = runtime or Threads()
        session = self._runtime.token()
        self._control = Control(dial, m.Join("reader", session, host_identity(), os.getpid()), self._runtime, timeout)
        self._dial = dial
        self._fetcher = Fetcher(dial, share=share, now=self._runtime.now)
        self._specs: dict[int, TableSpec] = {}
        self._known: dict[int, int] = {}  # their fingerprints
        self._stored: weakref.WeakValueDictionary[int, Stored] = weakref.WeakValueDictionary()
        self._base: Base | None = None  # kept: what the next delta is applied to
        self._newest: VersionInfo | None = None  # that was leased
        self._turn = 0  # how many leases this reader has asked for; a turn is the number of one of them
        self._asking: set[int] = set()  # turns whose answer has not come
        self._open: dict[int, int] = {}  # turns of the leases that stand, and the numbers of their versions
        self._guard = threading.RLock()
        self._fetching = threading.RLock()
        self._heard = self._runtime.now()
        self._error = ""
        self._silence = (0.0, "")  # of a relay's cluster: since when, and what is known of it; empty: it answers
        self._closed = False
        self._stop = self._runtime.every(BEAT, self._beat)

    # ---- leases ----------------------------------------------------------------------------------

    def lease(self, name: str = LATEST, timeout: float | None = None) -> Weights:
        """Hold a version: by its name, by a tag, or the newest. All of it, or an error.

        On the host of the servers nothing is copied, and it takes the same time for every size. From elsewhere the
        version is fetched; what this reader has of an older one is used, so that only what changed travels.

        Raises:
            UnknownVersion: no version or tag of that name.
            VersionExpired: it was retired, or died with the servers that held it.
            DeadlineExceeded: not in ``timeout`` seconds (default: the reader's).
            LinkError: the cluster cannot be reached. Versions that are leased already stay whole.
        """
        return self._patiently(name, timeout, self._leased)

    def raw(self, name: str = LATEST, timeout: float | None = None) -> dict[tuple[str, int], bytes]:
        """A version's bytes by (table, shard), as the kind of table has published them: where they are no tensors.

        Raises as ``lease``, which is over when this returns.
        """
        return self._patiently(name, timeout, self._raw)

    def _patiently(self, name: str, timeout: float | None, take: Callable[[str, float], T]) -> T:
        """Until somebody who lives has it, or the deadline."""
        _check_name(name)
        deadline = self._runtime.now() + (self.timeout if timeout is None else timeout)
        while True:
            try:
                return take(name, deadline)
            except (LinkError, VersionExpired) as error:  # somebody died, or the newest is another one now
                self._failed(error)
                lasting = isinstance(error, VersionExpired) and name != LATEST
                if lasting or self._closed or self._runtime.now() + AGAIN >= deadline or self._control.gone:
                    raise
                self._runtime.sleep(AGAIN)

    def _hold(self, name: str, deadline: float) -> tuple[int, v.Leased]:
        """A lease, and the turn that ends it."""
        with self._guard:
            self._turn = turn = self._turn + 1
            self._asking.add(turn)
        try:
            patience = max(0.0, deadline - self._runtime.now())
            leased = self._ask(v.Lease(self.model, name, tuple(self._known.items()), patience, turn), deadline)
            if not isinstance(leased, v.Leased):
                raise InternalError(f"{type(leased).__name__} came in answer to the wish for a lease")
            self._open[turn] = leased.info.number
            return turn, leased
        finally:
            with self._guard:
                self._asking.discard(turn)

    def _leased(self, name: str, deadline: float) -> Weights:
        from headwater.readers.weights import Weights

        turn, leased = self._hold(name, deadline)
        try:
            stored = self._store_in_turn(leased, deadline)
            with self._guard:
                if name == LATEST or self._newest is None or leased.info.number > self._newest.number:
                    self._newest = stored.info
        except BaseException:
            self._release(turn)
            raise
        return Weights(stored, lambda: self._release(turn), partial(self._forget, turn))

    def _raw(self, name: str, deadline: float) -> dict[tuple[str, int], bytes]:
        turn, leased = self._hold(name, deadline)
        specs = {**self._specs, **dict(leased.specs)}
        found: dict[tuple[str, int], bytes] = {}

        def got(part: Got) -> None:
            found[specs[part.at.table].name, part.at.shard] = part.buffer.array.tobytes()

        fetcher = Fetcher(self._dial, share=False, now=self._runtime.now)  # into memory that is this call's
        try:
            fetcher.parts(leased.info.number, leased.parts, 0, {}, SILENT, got)
        finally:
            fetcher.close()
            self._release(turn)
        return found

    def _store_in_turn(self, leased: v.Leased, deadline: float) -> Stored:
        patience = max(0.0, deadline - self._runtime.now())
        if not self._fetching.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded(
                f"another thread of this reader still fetches a version; {leased.info.name!r} was not leased. Give it "
                "more time, or read with a reader of your own"
            )
        try:
            return self._store(leased, deadline)
        finally:
            self._fetching.release()

    def _store(self, leased: v.Leased, deadline: float) -> Stored:
        """The version in this process; one that is here already, if it is that: another cluster counts from 1 again."""
        for table, spec in leased.specs:
            self._specs[table], self._known[table] = spec, v.fingerprint(spec)
        number = leased.info.number
        stored = self._stored.get(number)
        if stored is None or stored.info != leased.info:
            stored = self._fetcher.store(leased, self._specs, self._base, deadline)
            self._stored[number] = stored
            if stored.buffers:  # shared memory needs no deltas
                self._base = Base(stored)
        return stored

    def _forget(self, turn: int) -> None:
        """Nobody refers to a lease any more, who had not released it: the next beat ends it."""
        self._open.pop(turn, None)

    def _release(self, turn: int) -> None:
        number = self._open.pop(turn, None)
        with contextlib.suppress(HeadwaterError):  # then it ends with the next beat
            if number is not None:
                self._control.notify(v.Release(number, turn))
        self._fetcher.settle()

    # ---- news ------------------------------------------------------------------------------------

    def wait(self, after: VersionInfo | int = 0, name: str = LATEST, timeout: float | None = None) -> VersionInfo:
        """Until ``name`` means another version than ``after``; a tag or version that is not there may come.

        ``after``: a version, or its number alone; versions of a cluster that was begun anew have the same numbers.
        Raises ``DeadlineExceeded`` after ``timeout`` seconds (default: the reader's), ``LinkError``.
        """
        _check_name(name)
        deadline = self._runtime.now() + (self.timeout if timeout is None else timeout)
        known = (after, "") if isinstance(after, int) else (after.number, after.digest)
        found = self._ask(v.Watch(self.model, name, *known), deadline)
        if not isinstance(found, v.Found):
            raise InternalError(f"{type(found).__name__} came in answer to the wish for a version")
        return found.info

    def versions(self) -> tuple[v.VersionStatus, ...]:
        """What there is of the model: versions with their states, tags and leases."""
        return publication.versions(self._ask_in_time, self.model)

    def tag(self, tag: str, name: str) -> None:
        """Let ``tag`` mean the version that ``name`` means now: see ``Client.tag``."""
        publication.tag(self._ask_in_time, self.model, tag, name)

    def untag(self, tag: str) -> None:
        """Take a tag away: see ``Client.untag``."""
        publication.untag(self._ask_in_time, self.model, tag)

    def rollback(self, tag: str, to: str | None = None) -> v.VersionStatus:
        """Move a tag to the parent of what it means now, or to ``to``: see ``Client.rollback``."""
        return publication.rollback(self._ask_in_time, self.model, tag, to)

    def retire(self, name: str) -> None:
        """Let a version go before its time: see ``Client.retire``."""
        self._ask_in_time(v.Retire(self.model, name))

    def follow(
        self,
        module: torch.nn.Module,
        name: str = LATEST,
        *,
        every: float = 0.0,
        cast: bool = False,
        wait: bool = True,
    ) -> Follower:
        """Keep a module current: see ``headwater.readers.Follower`` for the arguments."""
        from headwater.readers.follow import Follower

        return Follower(self, module, name, every=every, cast=cast, wait=wait)

    def statistics(self) -> ReaderStatistics:
        """How this reader stands now."""
        with self._guard:
            since, why = (self._heard, self._error) if self._error else self._silence
            age = self._runtime.now() - since if why else 0.0
            return ReaderStatistics(
                not why, self._newest, age, why, len(self._open), self._fetcher.fetched_bytes, self._fetcher.counts
            )

    # ---- the line to the coordinator -------------------------------------------------------------

    def _ask_in_time(self, message: m.Request) -> m.Reply:
        return self._ask(message, self._runtime.now() + self.timeout)

    def _ask(self, message: m.Request, deadline: float) -> m.Reply:
        try:
            answer = self._control.ask(message, max(0.0, deadline - self._runtime.now()))
        except LinkError as error:
            self._failed(error)
            raise
        self._reached()
        return answer

    def _reached(self) -> None:
        self._error, self._heard = "", self._runtime.now()

    def _failed(self, error: HeadwaterError) -> None:
        if isinstance(error, LinkError):
            self._error = str(error)

    def _holding(self) -> v.Holding:
        """The leases that stand. What was said of one may have been lost on the way; this comes again and again."""
        with self._guard:
            upto = min(self._asking, default=self._turn + 1) - 1
            leases = self._open.copy()  # at once: the garbage collector may end one
        return v.Holding(tuple(each for each in leases.items() if each[0] <= upto), upto)

    def _beat(self) -> None:
        quiet = self._runtime.now() - self._heard >= QUIET
        try:
            self._fetcher.settle()
            self._control.notify(m.Heartbeat())
            if self._turn:
                self._control.notify(self._holding())
            if (
                self._error or quiet or self._control.joined.relay
            ):  # a notice may be lost: only answers say who is there
                self._look(self._control.ask(v.ListVersions(self.model), ANSWER))
                self._reached()
        except DeadlineExceeded:  # the other side, or the way to it, is there and says nothing
            self._error = f"no answer in {ANSWER:.0f} s"
        except HeadwaterError as error:
            self._failed(error)

    def _look(self, listed: m.Reply) -> None:
        """What a relay says of where its versions come from."""
        if isinstance(listed, v.VersionList):
            why = f"the relay goes on with the versions that it has: {listed.why}" if listed.silent else ""
            self._silence = (self._runtime.now() - listed.silent, why)

    def close(self) -> None:
        """End all leases and leave. Tensors taken before stay valid. A fetch under way is given up."""
        if self._closed:
            return
        self._closed = True
        self._stop()
        self._fetcher.settle()
        self._fetcher.hang_up()
        with contextlib.suppress(HeadwaterError):
            self._control.leave()
        self._control.close()
        self._fetcher.close()
        self._base = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is no name of a version or tag, which is text; numbers are not names")
