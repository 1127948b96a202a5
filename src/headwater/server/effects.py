"""What follows from an event at a server, in the order in which it must be done (as ``Ready`` in etcd-io/raft).

The shards, nodes and peers of one server add to one ``Effects``. Whoever serves the server (``loop.Loop``, the
simulator) does what the fields say, from the first to the last, before the next event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from headwater.server.peers import Peer
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Dial, Instruction, Outgoing


class Dialer(Protocol):
    """Who asked for a connection, and hears what became of it: its number, or ``None``."""

    def dialed(self, key: int, peer: int | None) -> Peer | None:
        """Who is at the other end; ``None``: nobody wants the connection any more, or it could not be made."""


@dataclass(slots=True)
class Effects:
    """See above.

    1. ``instructions``: frames to send and servers to dial, in this order. None of them acknowledges or accepts a
       record that is not yet where it must be: a primary's log holds its acknowledgements back until every follower
       and its own disk have the record (``replication.log``), a follower its acceptance until its disk has
       (``Upstream.synced``). So nothing here has to wait for 3.
    2. ``accepted``: followers have accepted records. They apply them when 1 has left (``Server.work``), so that the
       primary and its followers compute at the same time.
    3. ``unsynced``: records wait for the disk. It must have them before the server waits for the next event
       (``Server.sync``, once for all of them); what was held back for them comes out of that call.

    ``dials``: who asked for a ``Dial``, by its key.
    """

    instructions: list[Instruction] = field(default_factory=list)
    accepted: bool = False
    unsynced: bool = False
    dials: dict[int, Dialer] = field(default_factory=dict)

    def dial(self, asker: Dialer, dial: Dial) -> None:
        self.dials[dial.key] = asker
        self.instructions.append(dial)

    def add(self, instructions: Iterable[Instruction], asker: Dialer) -> None:
        """What another state machine says; its dials are ``asker``'s."""
        for x in instructions:
            if isinstance(x, Dial):
                self.dials[x.key] = asker
            self.instructions.append(x)

    def tell(self, peer: int, frame: Frame, fds: tuple[int, ...] = (), *, close: bool = False) -> None:
        """Send a frame, and descriptors beside it; then perhaps close the connection."""
        self.instructions.append(Outgoing(peer, frame, fds, close))

    def bye(self, peer: int, shard: int = 0) -> None:
        """Leave another server."""
        self.instructions.append(Outgoing(peer, Frame(Kind.NOTICE, shard=shard), close=True))

    def drain(self) -> list[Instruction]:
        """1, which begins anew."""
        found, self.instructions = self.instructions, []
        return found
