"""What the coordinator says of the cluster, a few times a second, asked directly and not through a proxy."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from headwater.errors import HeadwaterError, LinkBroken
from headwater.transports.address import Address
from headwater.transports.channel import Channel
from headwater.transports.dial import ask, dial
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind

PERIOD = 0.1


@dataclass(frozen=True, slots=True)
class Sight:
    """One answer, and when it was asked for."""

    asked: float
    status: m.ClusterStatus

    def redundant(self, pids: Collection[int]) -> bool:
        """Every shard has all its copies, on servers that are these processes.

        A coordinator that has just been started again believes that all are alive until it knows better.
        """
        here = {s.server for s in self.status.servers if s.state == "alive" and s.pid in pids}
        shards = self.status.shards
        return bool(shards) and all(
            s.copies >= s.wanted and {s.primary, *s.backups} <= here and len(s.backups) + 1 >= s.wanted for s in shards
        )


class Monitor:
    """Asks in a thread of its own: a coordinator that hangs does not hang the run."""

    def __init__(self, address: Address, token: bytes) -> None:
        self.sight: Sight | None = None
        self.problem = ""
        self._address, self._token = address, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headwater-monitor", daemon=True)
        self._thread.start()

    def redundant_since(self, moment: float, pids: Collection[int]) -> bool:
        """Whether an answer to a question asked after ``moment`` said that nothing is missing on these processes."""
        return self.sight is not None and self.sight.asked > moment and self.sight.redundant(pids)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with contextlib.closing(dial(self._address, self._token, 1.0)) as channel:
                    self._ask(channel)
            except (HeadwaterError, OSError) as error:
                self.problem = f"{type(error).__name__}: {error}"
            self._stop.wait(PERIOD)

    def _ask(self, channel: Channel) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            asked = time.monotonic()
            reply = ask(channel, Frame(Kind.REQUEST, seq=number, body=m.pack(m.Status())), 2.0)[0][0]
            if reply.kind != Kind.REPLY:
                raise LinkBroken(f"{reply.kind.name} to a question for the status")
            status = m.unpack_reply(reply.body)
            if isinstance(status, m.ClusterStatus):
                self.sight = Sight(asked, status)
            self._stop.wait(PERIOD)
