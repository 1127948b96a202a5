"""Reaching another process: the one place where connections are made, by clients, servers and readers alike."""

from __future__ import annotations

from collections.abc import Callable

from headwater.errors import HeadwaterError, LinkBroken, ProtocolError, Unreachable
from headwater.transports.address import Address
from headwater.transports.channel import Channel, send_all
from headwater.transports.receiver import Arrived, Receiver
from headwater.transports.schemes import scheme_of
from headwater.wire import auth
from headwater.wire import messages as m
from headwater.wire.frames import Frame, Kind, encode

HANDSHAKE = 10.0  # seconds
_LIMIT = 4096  # bytes of body before the peer has proved itself


def dial(address: Address, token: bytes | None, timeout: float) -> Channel:
    """Connect and shake hands. Raises ``Unreachable`` or ``AuthenticationFailed``."""
    try:
        channel = scheme_of(address).connect(address, timeout)
    except OSError as error:
        raise Unreachable(
            f"nobody answers at {address} ({error.strerror or error}); is the cluster running and the address right?"
        ) from None
    try:
        channel.settimeout(min(timeout, HANDSHAKE))
        _shake_hands(channel, token or b"")
        channel.settimeout(0)
    except (OSError, HeadwaterError) as error:
        channel.close()
        if isinstance(error, HeadwaterError) and not isinstance(error, LinkBroken):
            raise
        raise Unreachable(f"{address} accepted the connection but did not finish the handshake: {error}") from None
    return channel


def exchange(channel: Channel, receiver: Receiver, frame: Frame) -> list[Arrived]:
    """Say something, and wait, as long as ``settimeout`` said, for what comes in return: at least one frame."""
    send_all(channel, encode(frame))
    found: list[Arrived] = []
    while not found:
        found += receiver.read()
    return found


def ask(
    channel: Channel, frame: Frame, timeout: float, landing: Callable[[Frame], memoryview] | None = None
) -> list[Arrived]:
    """The answer, and all that came with it, to the end of a frame: another receiver may take over there.

    Raises ``OSError`` (``TimeoutError``) and ``LinkError``.
    """
    channel.settimeout(timeout)
    receiver = Receiver(channel, landing or _no_payload)
    found = exchange(channel, receiver, frame)
    while not receiver.between:
        found += receiver.read()
    channel.settimeout(0)
    return found


def _shake_hands(channel: Channel, token: bytes) -> None:
    """The client's side of FORMAT.md, section 3: the server proves itself first."""
    mine = auth.nonce()
    receiver = Receiver(channel, _no_payload, limit=_LIMIT)
    hello = Frame(Kind.HELLO, body=m.pack(m.Hello(mine, "headwater")))
    challenge = m.unpack(_expect(exchange(channel, receiver, hello), Kind.CHALLENGE).body, m.Challenge)
    auth.check_nonce(challenge.nonce)
    auth.check(token, "server", mine, challenge.nonce, challenge.proof)
    proof = Frame(Kind.PROOF, body=m.pack(m.Proof(auth.proof(token, "client", mine, challenge.nonce))))
    _expect(exchange(channel, receiver, proof), Kind.WELCOME)


def _expect(arrived: list[Arrived], kind: Kind) -> Frame:
    frame = arrived[0][0]
    if frame.kind == Kind.ERROR:
        raise m.read_error(frame.body)
    if frame.kind != kind:
        raise ProtocolError(f"{frame.kind.name} instead of {kind.name} in the handshake")
    return frame


def _no_payload(frame: Frame) -> memoryview:
    raise ProtocolError(f"{frame.kind.name} with a payload, where none is expected")
