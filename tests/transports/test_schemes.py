"""A kind of channel that the tests add: a cluster lives on it, and says nothing in plain."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import headwater
from headwater.errors import ProtocolError, UsageError
from headwater.transports.address import Address, parse
from headwater.transports.dial import dial
from headwater.transports.schemes import listen, scheme_of
from headwater.transports.stream import StreamLink
from headwater.wire.frames import MAGIC, Frame, Kind, encode
from tests.patience import PATIENCE
from tests.test_exactness import one_process, spec, unpack, worker
from tests.transports.xor_channel import SCHEME, XorChannel, plain

TOKEN = "hidden"


def start(stack: ExitStack, *arguments: str) -> str:
    """A process of a cluster; where it listens."""
    ready, write = os.pipe()
    command = [sys.executable, "-m", "tests.transports.xor_channel", *arguments, "--listen", f"{SCHEME}://127.0.0.1:0"]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([*command, "--ready-fd", str(write)], pass_fds=(write,), cwd=root)
    os.close(write)
    stack.callback(process.wait, PATIENCE)
    stack.callback(process.terminate)
    with os.fdopen(ready) as file:
        return str(json.loads(file.readline())["address"])


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster with one server; all speak over XOR."""
    monkeypatch.setenv("HEADWATER_TOKEN", TOKEN)
    monkeypatch.setenv("HEADWATER_TRANSPORT", "tcp")
    with ExitStack() as stack:
        address = start(stack, "--role", "coordinator")
        start(stack, "--role", "server", "--coordinator", address)
        yield address


def test_two_workers_train_over_a_channel_that_hides_its_bytes(
    coordinator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coordinator.startswith(f"{SCHEME}://")
    wire = bytearray()
    monkeypatch.setattr(XorChannel, "wire", wire)
    table = spec("adamw", "hidden", 1.0)
    with ThreadPoolExecutor(2) as pool:
        lives = [pool.submit(worker, coordinator, 1, rank, 2, table) for rank in range(2)]
        results = [life.result(PATIENCE) for life in lives]
    expected = one_process(unpack(results[0][0]), "adamw", 2, 1.0)
    assert [digests for _, digests in results] == [expected, expected]
    assert wire.count(MAGIC) == 0
    assert plain(wire).count(MAGIC) > 16, "what these workers said did not go over this channel"


def test_both_sides_must_speak_it(coordinator: str) -> None:
    hidden = parse(coordinator)
    with pytest.raises(ProtocolError, match="does not speak Headwater"):
        dial(Address("tcp", hidden.host, hidden.port), TOKEN.encode(), PATIENCE)
    with headwater.connect(coordinator, role="reader", timeout=PATIENCE) as client:
        assert [server.address.partition("://")[0] for server in client.status().servers] == [SCHEME]


def test_an_open_port_needs_a_token_whatever_the_scheme() -> None:
    with pytest.raises(UsageError, match="no token is set; nothing was bound"):
        listen(parse(f"{SCHEME}://0.0.0.0:0"), None)


def test_what_is_not_registered_is_refused() -> None:
    with pytest.raises(UsageError, match="is none of"):
        parse("rot13+tcp://127.0.0.1:1")
    with pytest.raises(UsageError, match="nothing is sent or received over inproc://"):
        scheme_of(parse("inproc://"))


class Poller:
    """Of a socket on which everything has arrived: to poll it when all of that is read would be to wait for ever."""

    def __init__(self, sock: socket.socket) -> None:
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        found = self._poll.poll(0)
        assert found, "it would sleep, and the rest is here"
        return found


class Kept:
    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def landing(self, frame: Frame) -> memoryview:
        return memoryview(bytearray(frame.payload_length))

    def receive(self, frame: Frame, fds: tuple[int, ...]) -> None:
        self.frames.append(frame)


def test_what_a_channel_has_read_ahead_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        payload = bytes(100_000)
        data = (
            encode(Frame(Kind.DATA, stop=len(payload), payload=memoryview(payload))) + payload + encode(Frame(Kind.ACK))
        )
        theirs.sendall(plain(data))
        kept = Kept()
        link = StreamLink(XorChannel(ours), kept)
        monkeypatch.setattr(link, "_poller", Poller(ours))
        link.pump(lambda: len(kept.frames) == 2, time.monotonic() + PATIENCE)
        assert [frame.kind for frame in kept.frames] == [Kind.DATA, Kind.ACK]
        link.close()
