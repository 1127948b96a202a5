"""Each fault of the proxy, on a server that sends back what it gets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from headwater_bench.rig.proxy import Owners, ProxyNetwork, Rule
from tests.patience import PATIENCE


class Echo:
    """Sends back what it gets; counts connections."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = self._sock.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    @staticmethod
    def _answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def network() -> Iterator[ProxyNetwork]:
    with ProxyNetwork(seed=1, identify=lambda port, towards: "me") as network:
        yield network


def _dial(network: ProxyNetwork, echo: Echo) -> socket.socket:
    return socket.create_connection(("127.0.0.1", network.open("echo", echo.address)), timeout=PATIENCE)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            break
        data += more
    return data


def test_without_a_rule_bytes_pass(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        sent = os.urandom(1 << 20)
        threading.Thread(target=sock.sendall, args=(sent,), daemon=True).start()
        assert _exactly(sock, len(sent)) == sent
        assert network.links() == [("me", "echo")]


def test_held_bytes_arrive_when_the_rule_is_lifted(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        sock.sendall(b"a")
        assert _exactly(sock, 1) == b"a"
        rule = network.apply(Rule("hold", "echo"))
        sock.sendall(b"bc")
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        network.lift(rule)
        sock.settimeout(PATIENCE)
        assert _exactly(sock, 2) == b"bc"


@pytest.mark.parametrize(("way", "arrives"), [("to", False), ("from", True)])
def test_one_way(network: ProxyNetwork, echo: Echo, way: str, arrives: bool) -> None:
    """With the answers held, the other side still gets what is sent."""
    seen = threading.Event()
    network._tap = lambda source, target: (lambda data: seen.set()) if target == "echo" else None
    with _dial(network, echo) as sock:
        network.apply(Rule("hold", "echo", way=way))  # type: ignore[arg-type]
        sock.sendall(b"x")
        assert seen.wait(10.0 if arrives else 0.05) is arrives
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_a_connection_that_lost_bytes_breaks_when_the_rule_is_lifted(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        rule = network.apply(Rule("swallow", "me", way="from"))
        sock.sendall(b"lost")
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        deadline, pause = time.monotonic() + PATIENCE, threading.Event()
        while not network.struck().get("swallow") and time.monotonic() < deadline:
            pause.wait(0.01)
        assert network.struck()["swallow"] >= 1
        network.lift(rule)
        sock.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_reset(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        sock.sendall(b"x")
        assert _exactly(sock, 1) == b"x"
        assert network.reset("nobody") == 0
        assert network.reset("echo", "me") == 1
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_flip_turns_one_bit(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        network.apply(Rule("flip", "echo", way="to", count=1))
        sent = bytes(1000)
        sock.sendall(sent)
        got = _exactly(sock, 1000)
        assert sum(byte.bit_count() for byte in got) == 1
        sock.sendall(sent)
        assert _exactly(sock, 1000) == sent


def test_truncation_closes_the_connection(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        network.apply(Rule("truncate", "echo", way="to"))
        sock.sendall(bytes(1000))
        try:
            got = _exactly(sock, 1000)
        except ConnectionResetError:
            got = b""
        assert len(got) < 1000


def test_delayed_bytes_keep_their_order(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        network.apply(Rule("delay", "echo", seconds=0.02))
        for i in range(20):
            sock.sendall(bytes([i]))
        assert _exactly(sock, 20) == bytes(range(20))
        assert network.struck()["delay"] >= 1


def test_nobody_behind_the_proxy_is_a_broken_connection(network: ProxyNetwork) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    port = network.open("gone", address)
    with (
        contextlib.suppress(ConnectionResetError),
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock,
    ):
        assert sock.recv(1) == b""


def test_an_end_is_passed_on(network: ProxyNetwork, echo: Echo) -> None:
    with _dial(network, echo) as sock:
        sock.sendall(b"last")
        sock.shutdown(socket.SHUT_WR)
        assert _exactly(sock, 4) == b"last"
        assert sock.recv(1) == b""


def test_owners_find_who_connected(echo: Echo) -> None:
    owners = Owners()
    owners.register("this test", os.getpid())
    with ProxyNetwork(identify=owners.find) as network, _dial(network, echo) as sock:
        sock.sendall(b"x")
        assert _exactly(sock, 1) == b"x"
        assert network.links() == [("this test", "echo")]
    assert Owners().find(1, 2) == "?"


@pytest.mark.parametrize(
    ("rule", "source", "target", "meant"),
    [
        (Rule("hold", "a"), "a", "b", True),
        (Rule("hold", "a"), "b", "a", True),
        (Rule("hold", "a", way="to"), "a", "b", False),
        (Rule("hold", "a", way="to"), "b", "a", True),
        (Rule("hold", "a", way="from"), "b", "a", False),
        (Rule("hold", "a", peer="c"), "a", "b", False),
        (Rule("hold", "a", peer="c"), "c", "a", True),
        (Rule("hold", "a"), "b", "c", False),
    ],
)
def test_whom_a_rule_concerns(rule: Rule, source: str, target: str, meant: bool) -> None:
    assert rule.concerns(source, target) is meant
