"""The other processes of ``headwater bench relay``: a relay, and readers behind it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import headwater
from headwater.relay.events import News, Taken
from headwater.relay.serving import Serving

if TYPE_CHECKING:
    from headwater.readers import Reader, Weights

MODEL = "model"
PATIENCE = 300.0  # seconds
KEEP = 2  # versions: the newest, and the base of its delta


class RelayProcess:
    """A relay of the bench's model, which serves from a thread."""

    def __init__(self) -> None:
        self._taken = threading.Condition()
        self._numbers: set[int] = set()
        self._serving: Serving | None = None

    def begin(self, upstream: str) -> str:
        """Its address."""
        self._serving = Serving([MODEL], upstream, keep=KEEP, report=self._report)
        threading.Thread(target=self._serving.run, name="relay", daemon=True).start()
        return self._serving.address

    def _report(self, news: News) -> None:
        if isinstance(news, Taken):
            with self._taken:
                self._numbers.add(news.info.number)
                self._taken.notify_all()

    def wait(self, number: int) -> bool:
        """Until it has taken a version; whether it has."""
        with self._taken:
            return self._taken.wait_for(lambda: number in self._numbers, PATIENCE)

    def sent(self) -> int:
        """Bytes that its readers had so far, over connections."""
        assert self._serving is not None
        return self._serving.part_store.sent_bytes

    def end(self) -> bool:
        """It ends."""
        if self._serving is not None:
            self._serving.stop()
        return True


class Readers:
    """Readers behind a relay, over TCP if the environment says so."""

    def __init__(self) -> None:
        self._readers: list[Reader] = []
        self._joined: Reader | None = None
        self._weights: Weights | None = None

    def crowd(self, address: str, count: int) -> int:
        """So many readers join."""
        self._readers = [headwater.reader(MODEL, address, timeout=PATIENCE) for _ in range(count)]
        return count

    def lease(self) -> int:
        """Each of them leases the newest version; the lowest number among these."""
        numbers = []
        for reader in self._readers:
            with reader.lease() as weights:
                numbers.append(weights.version.number)
        return min(numbers)

    def part(self) -> int:
        """They leave."""
        while self._readers:
            self._readers.pop().close()
        return 0

    def join(self, address: str) -> float:
        """A new reader; seconds from nothing to the newest version in its memory."""
        start = time.perf_counter()
        self._joined = headwater.reader(MODEL, address, timeout=PATIENCE)
        self._weights = self._joined.lease()
        return time.perf_counter() - start

    def catch_up(self) -> float:
        """The reader that joined takes the newest version, which is another one by now. Seconds."""
        assert self._joined is not None
        assert self._weights is not None
        start = time.perf_counter()
        self._weights.release()
        self._weights = None
        self._weights = self._joined.lease()
        return time.perf_counter() - start

    def current(self, address: str) -> float:
        """A new reader, until no newer version is known than the one that it has. Seconds."""
        seconds = self.join(address)
        while self._stale():
            seconds += self.catch_up()
        return seconds

    def _stale(self) -> bool:
        assert self._joined is not None
        assert self._weights is not None
        newest = max(each.info.number for each in self._joined.versions() if each.state == "ready")
        return newest != self._weights.version.number

    def leave(self) -> list[int]:
        """The reader that joined is gone: the bytes that it fetched, and how many parts came as deltas."""
        assert self._joined is not None
        found = self._joined.statistics()
        if self._weights is not None:
            self._weights.release()
        self._joined.close()
        self._joined = self._weights = None
        return [found.fetched_bytes, found.parts.deltas]
