"""A module that follows a source of versions: for models that answer by one forward, not token by token."""

from __future__ import annotations

import contextlib
import copy
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from headwater.gateway.engine_types import EngineClosed, Source
from headwater.gateway.follow import StagedVersion, VersionFollower
from headwater.gateway.weights import Bindable
from headwater.types import VersionInfo

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds that the following thread has to end."""


@dataclass(frozen=True, slots=True)
class LiveStatistics:
    """A moment of a ``Live`` module; the fields are those of ``EngineStatistics`` with the same names."""

    version: VersionInfo
    versions: tuple[int, ...]
    swaps: int
    refused_versions: int
    stale_since: float | None
    error: str


@dataclass(eq=False, slots=True)
class _Held:
    """A version in memory: given back when it is not the newest any more and no forward runs on it."""

    ready: StagedVersion
    users: int = 0

    @property
    def version(self) -> VersionInfo:
        return self.ready.binding.version


class Live:
    """A module whose values are those of the newest version under a tag.

    A forward runs on one version from its beginning to its end. A new one is made ready beside it and is there for the
    next forward. A version that does not fit the module is passed over; it and a source that does not answer leave the
    last version in service.

    Args:
        module: in the mode it is to run in; its own values stand in for those that a version lacks.
        source: where versions come from; it must have one.
        tag: which version.
        dtype: of floating parameters; None: as the version has them.
        threads: forwards at once; each has a module of its own, all share the values.
        retry: seconds between two questions to a source that does not answer.

    Raises:
        ShapeMismatch: the first version is not one of this module.
        HeadwaterError: whatever the source raises at first.
    """

    def __init__(
        self,
        module: nn.Module,
        source: Source,
        *,
        tag: str = "latest",
        dtype: torch.dtype | None = None,
        threads: int = 1,
        retry: float = 1.0,
    ) -> None:
        self._lock = threading.Lock()
        self._twins = [Bindable(each, dtype) for each in (module, *(_twin(module) for _ in range(threads - 1)))]
        self._free: queue.SimpleQueue[Bindable | None] = queue.SimpleQueue()  # None: closed, and nothing comes back
        for twin in self._twins:
            self._free.put(twin)
        self._swaps = 0
        self._follower = VersionFollower(source, self._twins[0].fit, self._swap, tag=tag, retry=retry)
        self._current = _Held(self._follower.first(None))
        self._living = [self._current]
        self._follower.start(self._current.version)

    @contextlib.contextmanager
    def hold(self) -> Iterator[tuple[nn.Module, VersionInfo]]:
        """The module at the newest version, for one forward of the calling thread. Raises ``EngineClosed``."""
        with self._lock:
            held = self._current
            held.users += 1
        twin = self._next_free()
        try:
            if twin is None:
                raise EngineClosed("the gateway is shutting down; nothing was computed: ask another one")
            twin.bind(held.ready.binding)
            with torch.inference_mode():
                yield twin.module, held.version
        finally:
            with self._lock:
                held.users -= 1
                if twin is not None:
                    twin.bind(self._current.ready.binding)  # idle, it refers to no old version, whose memory may go
            if twin is not None:
                self._free.put(twin)
            self._give_back(every=twin is None)

    def statistics(self) -> LiveStatistics:
        with self._lock:
            return LiveStatistics(
                version=self._current.version,
                versions=tuple(held.version.number for held in self._living),
                swaps=self._swaps,
                refused_versions=self._follower.refused,
                stale_since=self._follower.stale_since,
                error=self._follower.error,
            )

    def close(self) -> None:
        """End following. Waits for the forwards that run. Twice does nothing."""
        self._follower.close(_PATIENCE)
        for _ in self._twins:
            twin = self._next_free()
            if twin is not None:
                twin.forget(self._current.ready.binding)
        self._free.put(None)
        self._give_back(every=True)

    def _next_free(self) -> Bindable | None:
        twin = self._free.get()
        if twin is None:
            self._free.put(None)  # for whoever waits too
        return twin

    def _swap(self) -> None:
        """Called by the follower when a version is ready."""
        ready = self._follower.take()
        if ready is None:
            return
        with self._lock:
            self._current = _Held(ready)
            self._living.append(self._current)
            self._swaps += 1
        for _ in self._twins:  # each module in turn, between two forwards of it
            twin = self._next_free()
            if twin is not None:
                twin.bind(ready.binding)
                self._free.put(twin)
        self._give_back()
        version = ready.binding.version
        log.info("version %s (number %d, step %d) answers from now on", version.name, version.number, version.step)

    def _give_back(self, *, every: bool = False) -> None:
        with self._lock:
            old = [held for held in self._living if not held.users and (every or held is not self._current)]
            self._living = [held for held in self._living if held not in old]
        for held in old:
            held.ready.release()


def _twin(module: nn.Module) -> nn.Module:
    """The same module with the same tensors: a second place to bind other ones."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
