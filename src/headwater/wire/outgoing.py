"""What a state machine answers with: instructions to whoever hosts it. The machine itself sends nothing."""

from __future__ import annotations

from typing import NamedTuple

from headwater.wire.frames import Frame


class Outgoing(NamedTuple):
    """An instruction of a state machine: send ``frame``, and descriptors beside it, to ``peer``; then maybe close."""

    peer: int
    frame: Frame
    fds: tuple[int, ...] = ()
    close: bool = False


class Dial(NamedTuple):
    """An instruction of a state machine: connect to another server, and say what became of it under ``key``."""

    key: int
    address: str
    local: str
    host: str


Instruction = Outgoing | Dial


class Asker(NamedTuple):
    """Who waits for an answer: the peer, and the ``seq`` of its question."""

    peer: int
    seq: int
