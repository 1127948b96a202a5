"""A relay with its sockets: readers' on one side, the line to where its versions come from on the other."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Callable, Sequence

from headwater.client.connecting import dial_for
from headwater.client.control import Dial
from headwater.errors import ProtocolError, UsageError
from headwater.relay.core import KEEP, Relay, RelayEffects
from headwater.relay.events import Event, News
from headwater.relay.feeder import ANSWER, Feeder
from headwater.transports import address as addresses
from headwater.transports.loop import Loop
from headwater.transports.memory import close_all
from headwater.transports.schemes import listen
from headwater.versions.part_store import PartStore
from headwater.wire import versions as v
from headwater.wire.auth import token_from_environment
from headwater.wire.frames import Frame
from headwater.wire.outgoing import Instruction

_ANY = ("0.0.0.0", "::", "")


class RelayHost:
    """Serves a ``Relay``; ``report`` is told the news."""

    def __init__(self, relay: Relay, report: Callable[[News], None]) -> None:
        self.relay = relay
        self.feeder: Feeder | None = None
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._report = report

    def landing(self, peer: int, frame: Frame) -> memoryview:
        raise ProtocolError(f"{frame.kind.name} with a payload: a relay takes no values from its readers")

    def receive(self, peer: int, frame: Frame, fds: tuple[int, ...]) -> list[Instruction]:
        close_all(fds)
        return self._carry_out(self.relay.receive(peer, frame, time.monotonic()))

    def closed(self, peer: int) -> list[Instruction]:
        return self._carry_out(self.relay.closed(peer, time.monotonic()))

    def tick(self, now: float) -> list[Instruction]:
        return self._carry_out(self.relay.tick(now))

    def work(self) -> list[Instruction]:
        return []

    def woken(self) -> list[Instruction]:
        """Threads have something: deltas that readers wait for, events of the other side."""
        out = self._carry_out(self.relay.woken())
        while not self.events.empty():
            out += self._carry_out(self.relay.happened(self.events.get(), time.monotonic()))
        return out

    def dialed(self, key: int, peer: int | None) -> list[Instruction]:
        return []

    def _carry_out(self, effects: RelayEffects) -> list[Instruction]:
        """All but the frames, which the loop sends."""
        for order in effects.orders:
            if self.feeder is not None:
                self.feeder.do(order)
        for news in effects.news:
            self._report(news)
        return effects.frames


class Serving:
    """A relay of ``models`` of the cluster or relay at ``upstream``; ``run`` serves until ``stop`` or a signal.

    ``listen_at``: where readers connect; ``advertise``: what readers elsewhere are told to connect to, instead. The
    token, for both sides, comes from the environment. ``dial``: how ``upstream`` is reached, if not by its address.

    Raises ``UsageError`` (an open port without a token, no model), ``AddressInUse``, ``Unreachable``,
    ``AuthenticationFailed``.
    """

    def __init__(
        self,
        models: Sequence[str],
        upstream: str,
        *,
        listen_at: str = "tcp://127.0.0.1:0",
        advertise: str | None = None,
        keep: int = KEEP,
        report: Callable[[News], None] = lambda news: None,
        dial: Dial | None = None,
    ) -> None:
        if not models:
            raise UsageError("name a model that the relay is to follow; nothing was started")
        asked = addresses.parse(listen_at)
        if asked.host in _ANY and not advertise:
            raise UsageError(f"{asked} is not where anybody finds this relay: say by what address (--advertise)")
        token = token_from_environment()
        tcp = listen(asked, token)
        self.address = str(tcp.address)
        try:
            host = addresses.host_identity()
            local = f"local://headwater-{secrets.token_hex(12)}" if host else ""
            me = v.Holder(advertise or self.address, local, host)
            self.part_store = PartStore(share=bool(host), wake=self._wake)
            self.host = RelayHost(Relay(me, self.part_store, models, upstream, keep, time.monotonic()), report)
            self.feeder = Feeder(dial or dial_for(upstream, ANSWER), self.part_store.pool, self._post)
        except BaseException:
            tcp.close()
            raise
        self.loop = Loop(self.host, token)
        self.loop.serve(tcp)
        if local:
            self.loop.serve(listen(addresses.parse(local), token))
        self.host.feeder = self.feeder

    def _wake(self) -> None:
        self.loop.wake()

    def _post(self, event: Event) -> None:
        self.host.events.put(event)
        self.loop.wake()

    def run(self) -> None:
        """Serve until ``stop`` or a signal; then close everything. What readers map stays theirs."""
        self.feeder.start()
        try:
            self.loop.run()
        finally:
            self.feeder.close()
            self.part_store.close()

    def stop(self) -> None:
        """From any thread."""
        self.loop.stop()
