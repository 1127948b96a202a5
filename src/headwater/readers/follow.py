"""A module that is kept current: a thread fetches, the swap happens between two forwards."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwater.errors import DeadlineExceeded, HeadwaterError, LinkError, ShapeMismatch
from headwater.readers import gate
from headwater.readers.weights import Weights, check
from headwater.types import VersionInfo

if TYPE_CHECKING:
    from headwater.readers.reading import Reader

POLL = 5.0  # seconds after which the question for news is asked again
RETRY = 0.5  # seconds after which a cluster that could not be reached is tried again


@dataclass(frozen=True, slots=True)
class FollowerStatistics:
    """``swaps`` so far; of the last one: seconds of ``pause`` between two forwards, and of ``sync`` from news to swap.

    ``error``: why the module is not current, empty if it is, as far as this reader knows.
    """

    version: VersionInfo | None
    swaps: int
    pause: float
    sync: float
    error: str


@dataclass(slots=True)
class _Staged:
    """A version that is ready to be swapped in."""

    weights: Weights
    tensors: Mapping[str, torch.Tensor]
    since: float


class Follower:
    """Keeps the parameters and buffers of ``module`` those of the version that ``name`` means.

    A background thread waits for news, leases the version and makes it ready; before the next ``module(...)`` call
    begins, and while no other is under way, the parameters are pointed at the new memory. A forward never sees two
    versions. ``module.version`` is the ``VersionInfo`` that answers. A slow module skips to the newest.

    Args:
        name: ``"latest"``; a tag, which may come later and move; or a version, to pin it.
        every: at most one swap per so many seconds.
        cast: convert tensors to the module's dtype (a copy of the version) instead of taking the version's own dtype.
        wait: return only when the first version is in the module (within the reader's timeout); else the module
            keeps its values until then.

    Parameters on another device than the CPU are copied there by the background thread, and swapped in the same way.
    When no server can be reached the module keeps its version and ``statistics().error`` says so.

    While it is followed, the module's class is one that is made for it; a copy of it is not followed. What changes the
    class itself (``GraphModule.recompile``, parametrizations of the root) comes before or after. Around
    ``torch.func.functional_call`` put ``hold``, so that no swap goes into the tensors that it lends to the module.

    Raises:
        ShapeMismatch: the module has not the version's tensors; nothing was changed. When a later version does not
            fit, the module keeps the one before and ``statistics().error`` says so.
        DeadlineExceeded: with ``wait``, if there is no version in time.
    """

    def __init__(
        self,
        reader: Reader,
        module: torch.nn.Module,
        name: str = "latest",
        *,
        every: float = 0.0,
        cast: bool = False,
        wait: bool = True,
    ) -> None:
        self._reader = reader
        self._module: Any = module
        self._name = name
        self._every = every
        self._cast = cast
        self._places = _places(module)
        self._gate = threading.Condition()
        self._running = 0  # forwards under way, and holders
        self._mine = threading.local()
        self._staged: _Staged | None = None
        self._current: Weights | None = None
        self._swaps = 0
        self._pause = self._sync = 0.0
        self._refused = ""  # why the newest version is not in the module
        self._unheard = ""  # why nothing is heard of newer ones
        self._closed = threading.Event()
        gate.put(module, self)
        module.version = None  # type: ignore[assignment]
        try:
            if wait:
                reader.wait(name=name)
                self._stage()
                with self.hold():
                    pass
                if self._current is None:
                    raise ShapeMismatch(self._refused)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._follow, name="headwater-follow", daemon=True)
        self._thread.start()

    @property
    def version(self) -> VersionInfo | None:
        """What the module answers with, None before the first version."""
        return None if self._current is None else self._current.version

    def statistics(self) -> FollowerStatistics:
        """How the module stands."""
        return FollowerStatistics(self.version, self._swaps, self._pause, self._sync, self._refused or self._unheard)

    @contextlib.contextmanager
    def hold(self) -> Iterator[VersionInfo | None]:
        """Inside, the version stays as it is: for what takes several forwards, such as generating a text.

        Once a newer version is ready, forwards that begin in other threads wait for the end of this: do not wait for
        them inside.
        """
        self._enter()
        try:
            yield self.version
        finally:
            self._leave()

    @property
    def closed(self) -> bool:
        """Whether it follows no more."""
        return self._closed.is_set()

    def close(self) -> None:
        """Follow no more; the module keeps its present values, which stay valid."""
        self._closed.set()
        gate.take_away(self._module)
        with self._gate:
            staged, self._staged = self._staged, None
        for weights in (staged.weights if staged is not None else None, self._current):
            if weights is not None:
                weights.release()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---- forwards --------------------------------------------------------------------------------

    def _enter(self) -> None:
        """A forward begins. Before the outermost one in its thread a version that is ready is swapped in."""
        depth = getattr(self._mine, "depth", 0)
        with self._gate:
            if not depth:
                while self._staged is not None and self._running:  # those under way end on the version they began with
                    self._gate.wait(POLL)
                if self._staged is not None:
                    self._swap()
            self._running += 1
        self._mine.depth = depth + 1

    def _leave(self) -> None:
        self._mine.depth -= 1
        with self._gate:
            self._running -= 1
            self._gate.notify_all()

    def _swap(self) -> None:
        """Point the module at the staged version: no bytes are moved."""
        staged, self._staged = self._staged, None
        assert staged is not None
        begun = time.perf_counter()
        try:
            self._point(staged.tensors)
        except (KeyError, AttributeError, RuntimeError, TypeError) as error:
            number = staged.weights.version.number
            self._refused = (
                f"version number {number} does not go into this module any more, which was changed ({error!r}): it "
                "keeps the version before. Follow the changed module"
            )
            self._end(staged.weights)
            return
        old, self._current = self._current, staged.weights
        self._module.version = staged.weights.version
        now = time.perf_counter()
        self._swaps, self._pause, self._sync, self._refused = self._swaps + 1, now - begun, now - staged.since, ""
        self._end(old)

    def _point(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """All of them or, if one cannot be, none."""
        pairs = [(owner[key], tensor) for name, tensor in tensors.items() for owner, key in self._places[name]]
        before = [(mine, mine.data) for mine, _ in pairs]
        try:
            for mine, tensor in pairs:
                mine.data = tensor
        except BaseException:
            for mine, data in before:
                mine.data = data
            raise

    def _end(self, old: Weights | None) -> None:
        """The lease of the version before ends on the thread: that is a message, and a forward is waiting."""
        if old is not None:
            threading.Thread(target=old.release, name="headwater-release", daemon=True).start()

    # ---- the thread ------------------------------------------------------------------------------

    def _follow(self) -> None:
        known = self.version
        last = time.monotonic() if known else -math.inf
        while not self._closed.is_set():
            try:
                found = self._news(known)
                if found is None:
                    continue
                if self._closed.wait(max(0.0, last + self._every - time.monotonic())):
                    return
                known = self._stage()
                last = time.monotonic()
            except ShapeMismatch as error:
                known, self._refused = found, str(error)
            except Exception as error:  # noqa: BLE001 - such as no memory on the device: the next version may fit
                self._unheard = str(error) if isinstance(error, HeadwaterError) else repr(error)
                self._closed.wait(RETRY if isinstance(error, LinkError) else POLL)

    def _news(self, known: VersionInfo | None) -> VersionInfo | None:
        """Another version than ``known``; None if there is none for a while."""
        try:
            found = self._reader.wait(known or 0, self._name, POLL)
        except DeadlineExceeded:
            found = None
        self._unheard = ""
        return found

    def _stage(self) -> VersionInfo:
        """Make what the name means now ready: everything that takes time."""
        since = time.perf_counter()
        weights = self._reader.lease(self._name)
        try:
            tensors = self._ready(weights)
        except BaseException:
            weights.release()
            raise
        with self._gate:
            skipped = None if self._staged is None else self._staged.weights
            if self._closed.is_set():
                skipped = weights
            else:
                self._staged = _Staged(weights, tensors, since)
        if skipped is not None:
            skipped.release()
        return weights.version

    def _ready(self, weights: Weights) -> dict[str, torch.Tensor]:
        into = {name: owner[key] for name, ((owner, key), *_) in self._places.items() if key in owner}
        check(weights.shapes(), into, weights.version)
        ready = {}
        for name, tensor in weights.items():
            mine = into[name]
            if tensor.dtype != mine.dtype and not self._cast:
                raise ShapeMismatch(
                    f"{name!r} is {mine.dtype} here and {tensor.dtype} in version {weights.version.name!r}; nothing "
                    "was changed. Follow with cast=True, or convert the module"
                )
            ready[name] = tensor.to(mine.device, mine.dtype)
        if any(ready[name].device.type == "cpu" and not self._cast for name in ready):
            weights.touch()  # else the first forward would wait for each page
        return ready


_Place = tuple[Mapping[str, torch.Tensor], str]


def _places(module: torch.nn.Module) -> dict[str, list[_Place]]:
    """Where each tensor stands, by its first name; tied ones share the name, and the tensor."""
    places: dict[str, list[_Place]] = {}
    for prefix, child in module.named_modules():
        for kind in (child._parameters, child._buffers):  # noqa: SLF001 - torch has no public way to a module's own
            for key, tensor in kind.items():
                if tensor is not None:
                    places.setdefault(f"{prefix}.{key}" if prefix else key, []).append((kind, key))
    return places
