"""A source of versions in this process's own memory: for a model that is just served, for benches and for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from headwater.errors import DeadlineExceeded
from headwater.types import VersionInfo

if TYPE_CHECKING:
    from torch import Tensor


class MemoryWeights(Mapping[str, "Tensor"]):
    """A version out of a ``MemorySource``; ``leases`` of the source counts those not released."""

    def __init__(self, source: MemorySource, version: VersionInfo, tensors: Mapping[str, Tensor]) -> None:
        self._source = source
        self._tensors: Mapping[str, Tensor] = tensors
        self._released = False
        self.version = version

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def release(self) -> None:
        """Give the version back; twice does nothing."""
        if not self._released:
            self._released = True
            self._tensors = {}
            self._source.given_back(self.version.number)


class MemorySource:
    """Versions that are published into this process's memory. All of a model's tags are its newest version.

    It begins with a version without tensors, number 0: the model's own values.
    """

    def __init__(self, model: str) -> None:
        self._changed = threading.Condition()
        self._tensors: Mapping[str, Tensor] = {}
        self._newest = VersionInfo(model, 0, "base", 0, 0, time.time(), (), 0, "")
        self.leases: dict[int, int] = {}

    def publish(self, tensors: Mapping[str, Tensor], name: str = "") -> VersionInfo:
        """Make a version of ``tensors``, which must not change any more."""
        with self._changed:
            last = self._newest
            number = last.number + 1
            nbytes = sum(t.nbytes for t in tensors.values())
            self._newest = VersionInfo(
                last.model, number, name or f"v{number}", last.number, number, time.time(), (last.model,), nbytes, ""
            )
            self._tensors = dict(tensors)
            self._changed.notify_all()
            return self._newest

    def lease(self, name: str = "latest") -> MemoryWeights:
        """The newest version, whatever the tag."""
        with self._changed:
            number = self._newest.number
            self.leases[number] = self.leases.get(number, 0) + 1
            return MemoryWeights(self, self._newest, self._tensors)

    def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo:
        """The newest version once it is not ``after``; ``DeadlineExceeded`` after ``timeout`` seconds."""
        number = after if isinstance(after, int) else after.number
        with self._changed:
            if not self._changed.wait_for(lambda: self._newest.number != number, timeout):
                raise DeadlineExceeded(f"version {number} of {self._newest.model} is still the newest; wait again")
            return self._newest

    def given_back(self, number: int) -> None:
        """A lease of ``number`` was released."""
        with self._changed:
            self.leases[number] -= 1
            if not self.leases[number]:
                del self.leases[number]
