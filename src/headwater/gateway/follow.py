"""The thread that follows a source of versions and makes the next one ready, beside the thread that computes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken, ShapeMismatch
from headwater.gateway.engine_types import Source, Weights
from headwater.gateway.sources import MemorySource
from headwater.gateway.weights import Binding
from headwater.types import VersionInfo

_log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds of one question to the source; between two of them the thread sees that it should end."""


@dataclass(slots=True)
class StagedVersion:
    """A leased version that fits the model. ``seconds``: what it took from the lease to here."""

    binding: Binding
    lease: Weights
    seconds: float

    def release(self) -> None:
        """Give the version back. Its tensors must not be used any more."""
        self.lease.release()


class VersionFollower:
    """Keeps at most one version ready for ``take``: a newer one replaces one that was not taken.

    ``fit`` makes tensors ready for the model and may raise ``ShapeMismatch``: that version is passed over. ``wake`` is
    called when a version is ready. A source that fails is asked again every ``retry`` seconds; meanwhile
    ``stale_since`` (``time.time()``) and ``error`` tell of it, and what was taken before stays good.
    """

    def __init__(
        self,
        source: Source,
        fit: Callable[[Weights, VersionInfo], Binding],
        wake: Callable[[], None],
        *,
        tag: str,
        retry: float,
    ) -> None:
        self._source = source
        self._fit = fit
        self._wake = wake
        self._tag = tag
        self._retry = retry
        self._lock = threading.Lock()
        self._next: StagedVersion | None = None
        self._ended = threading.Event()
        self._leasing = threading.Lock()
        self.refused = 0
        self.stale_since: float | None = None
        self.error = ""

    def first(self, base: VersionInfo | None) -> StagedVersion:
        """The version to begin with: the source's or, if it has none and ``base`` is given, the model's own values."""
        try:
            return self._lease()
        except HeadwaterError as error:
            if base is None or isinstance(error, ShapeMismatch):
                raise
            self._failed(error)
            own = MemorySource(base.model).lease()
            return StagedVersion(self._fit(own, base), own, 0.0)

    def start(self, newest: VersionInfo) -> None:
        """Follow the source from ``newest`` on."""
        threading.Thread(target=self._run, args=(newest,), name="headwater-follow", daemon=True).start()

    @property
    def has_next(self) -> bool:
        return self._next is not None

    def take(self) -> StagedVersion | None:
        """The version that became ready, once."""
        with self._lock:
            ready, self._next = self._next, None
            return ready

    def close(self, timeout: float) -> None:
        """End, and give back what was not taken. A question that the source has not answered yet is not waited for."""
        self._ended.set()
        if self._leasing.acquire(timeout=timeout):
            self._leasing.release()
        ready = self.take()
        if ready:
            ready.release()

    def _lease(self) -> StagedVersion:
        began = time.perf_counter()
        lease = self._source.lease(self._tag)
        try:
            return StagedVersion(self._fit(lease, lease.version), lease, time.perf_counter() - began)
        except BaseException:
            lease.release()
            raise

    def _run(self, known: VersionInfo) -> None:
        while not self._ended.is_set():
            try:
                known = self._follow_once(known)
            except Exception as error:  # noqa: BLE001 - whatever a source raises, what we have goes on being served
                self._failed(error)
                self._ended.wait(self._retry)

    def _follow_once(self, known: VersionInfo) -> VersionInfo:
        """Wait for another version than ``known`` and offer it; returns it, or ``known`` if there is none for now."""
        try:
            seen = self._source.wait(known, self._tag, _PATIENCE)
        except DeadlineExceeded:
            self._waited()
            return known
        with self._leasing:
            if self._ended.is_set():
                return seen
            try:
                ready = self._lease()
            except ShapeMismatch as error:
                self.refused += 1
                self.error = str(error)
                _log.error("%s", error)
                return seen
            self.stale_since, self.error = None, ""
            self._offer(ready)
            return ready.binding.version

    def _offer(self, ready: StagedVersion) -> None:
        with self._lock:
            missed, self._next = self._next, ready
        if missed:
            missed.release()
        self._wake()

    def _waited(self) -> None:
        """No other version has come. A reader waits for its cluster as it does for a version, and knows for which."""
        statistics = getattr(self._source, "statistics", None)
        now = statistics() if statistics else None
        if now is not None and not now.connected:
            self._failed(LinkBroken(now.error or "the source is not connected"))
        elif self.stale_since is not None:
            self.stale_since, self.error = None, ""

    def _failed(self, error: Exception) -> None:
        if self._ended.is_set():
            return
        if self.stale_since is None:
            self.stale_since = time.time()
            _log.warning("no new versions: %s; the last one goes on being served", error)
        self.error = str(error)
