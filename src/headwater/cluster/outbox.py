"""Where the coordinator's machines put what they want sent, kept and done."""

from __future__ import annotations

from headwater.cluster.effects import Effects, Job
from headwater.cluster.fleet import Fleet
from headwater.errors import HeadwaterError
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Asker, Instruction, Outgoing


class Outbox:
    """Collects what one event comes to. ``fleet`` says over which connection a shard's primary is reached."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._durable: dict[str, bytes | None] = {}
        self._jobs: list[Job] = []
        self._send: list[Instruction] = []

    def reply(self, asker: Asker, message: m.Reply) -> None:
        """Answer a request."""
        self._send.append(Outgoing(asker.peer, Frame(Kind.REPLY, seq=asker.seq, body=m.pack(message))))

    def fail(self, asker: Asker, error: HeadwaterError) -> None:
        """Refuse a request."""
        self._send.append(Outgoing(asker.peer, Frame(Kind.ERROR, seq=asker.seq, body=m.error_body(error))))

    def notify(self, peer: int, message: m.Notice, shard: int = 0) -> None:
        """To whoever is at this connection."""
        self._send.append(Outgoing(peer, Frame(Kind.NOTICE, shard=shard, body=m.pack(message))))

    def tell(self, shard: int, message: m.Notice | m.Request, seq: int = 0) -> None:
        """To the primary of a shard. If none is there this is dropped; the next one is told anew (``Views.brief``)."""
        view = self._fleet.views.get(shard)
        server = self._fleet.servers.get(view.primary.server) if view is not None and view.primary is not None else None
        if server is not None and server.peer is not None:
            kind = Kind.REQUEST if isinstance(message, m.Create) else Kind.NOTICE
            self._send.append(Outgoing(server.peer, Frame(kind, shard=shard, seq=seq, body=m.pack(message))))

    def put(self, instruction: Instruction) -> None:
        """Any other frame, or a connection to make."""
        self._send.append(instruction)

    def save(self, key: str, value: bytes | None) -> None:
        """Have a key durable before anything is sent; None deletes it."""
        self._durable[key] = value

    def do(self, job: Job) -> None:
        """Have the host work on files."""
        self._jobs.append(job)

    def take(self) -> Effects:
        """All of it, once."""
        effects = Effects(self._durable, self._jobs, self._send)
        self._durable, self._jobs, self._send = {}, [], []
        return effects
