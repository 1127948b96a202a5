"""A live loop against strangers, liars, slow ones and noise: it closes them, serves the others, and stays small."""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headwater.errors import (
    AddressInUse,
    AuthenticationFailed,
    ClusterError,
    LinkBroken,
    ProtocolError,
    StaleEpoch,
    Unreachable,
    UsageError,
)
from headwater.transports import loop as loop_module
from headwater.transports import memory
from headwater.transports.address import Address, parse
from headwater.transports.dial import dial
from headwater.transports.schemes import listen
from headwater.types import Async, Bulk, DenseSpec, OptimizerSpec, ParameterSpec, Sync
from headwater.wire import auth
from headwater.wire import messages as m
from headwater.wire.frames import MAX_BODY, Flag, Frame, Kind, encode
from tests.server.serving import TOKEN, NodeHost, Wire, coordinator, serve

NUMEL = 20_000


def spec(sync: Sync) -> DenseSpec:
    return DenseSpec("t", (ParameterSpec("w", (NUMEL,)),), OptimizerSpec("SGD", ({"lr": 1.0},)), sync)


@pytest.fixture
def control() -> Iterator[Address]:
    with serve(coordinator()) as address:
        yield address


@pytest.fixture(params=["tcp", "unix"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[Address, NodeHost]]:
    """A server with table 1 (bulk) and table 2 (asynchronous)."""
    host = NodeHost()
    host.create(1, spec(Bulk()))
    host.create(2, spec(Async()))
    name = f"headwater-test-{os.getpid()}-{random.randbytes(4).hex()}" if request.param == "unix" else ""
    with serve(host, unix=name) as address:
        yield address, host


def status(address: Address) -> m.ClusterStatus:
    """What a good client of a coordinator gets."""
    with Wire(address) as wire:
        assert wire.greet().kind == Kind.WELCOME
        found = wire.ask(m.Status())
        assert isinstance(found, m.ClusterStatus)
        return found


# ---- the handshake -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [b"", b"another token", TOKEN + b" "])
def test_a_wrong_token_is_refused_and_the_connection_closed(control: Address, token: bytes) -> None:
    with Wire(control) as wire:
        answer = wire.greet(token)
        assert isinstance(m.read_error(answer.body), AuthenticationFailed)
        assert wire.ends() == []
    assert status(control)


def test_a_client_refuses_a_server_that_does_not_know_the_token(control: Address) -> None:
    for token in (b"another token", None):
        with pytest.raises(AuthenticationFailed, match="the server's token is wrong; nothing was sent"):
            dial(control, token, 5)
    dial(control, TOKEN, 5).close()


def test_a_proof_cannot_be_reflected(control: Address) -> None:
    with Wire(control) as wire:
        wire.send(Frame(Kind.HELLO, body=m.pack(m.Hello(auth.nonce(), "mirror"))))
        challenge = m.unpack(wire.read().body, m.Challenge)
        wire.send(Frame(Kind.PROOF, body=m.pack(m.Proof(challenge.proof))))
        assert isinstance(m.read_error(wire.read().body), AuthenticationFailed)


def test_a_proof_cannot_be_replayed(control: Address) -> None:
    mine = auth.nonce()
    with Wire(control) as wire:
        wire.send(Frame(Kind.HELLO, body=m.pack(m.Hello(mine, "test"))))
        theirs = m.unpack(wire.read().body, m.Challenge).nonce
        recorded = Frame(Kind.PROOF, body=m.pack(m.Proof(auth.proof(TOKEN, "client", mine, theirs))))
        wire.send(recorded)
        assert wire.read().kind == Kind.WELCOME
    with Wire(control) as wire:
        wire.send(Frame(Kind.HELLO, body=m.pack(m.Hello(mine, "test"))))
        assert m.unpack(wire.read().body, m.Challenge).nonce != theirs
        wire.send(recorded)
        assert isinstance(m.read_error(wire.read().body), AuthenticationFailed)


def test_nothing_is_served_before_or_behind_a_failed_proof(control: Address) -> None:
    request = Frame(Kind.REQUEST, seq=1, body=m.pack(m.Status()))
    with Wire(control) as wire:
        wire.send(request)
        assert [frame.kind for frame in wire.ends()] == [Kind.ERROR]
    with Wire(control) as wire:
        wire.send(Frame(Kind.HELLO, body=m.pack(m.Hello(auth.nonce(), "test"))))
        wire.read()
        wrong = encode(Frame(Kind.PROOF, body=m.pack(m.Proof(b"wrong"))))
        wire.sock.sendall(wrong + encode(request) + wrong)
        assert [frame.kind for frame in wire.ends()] == [Kind.ERROR]


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.HELLO, body=m.pack(m.Hello(b"short", "test"))),
        Frame(Kind.HELLO, body=b"\xc1"),
        Frame(Kind.HELLO, body=bytes(5000)),
        Frame(Kind.PROOF, body=m.pack(m.Proof(b""))),
        Frame(Kind.PUSH, stop=100, payload_length=100),
        Frame(Kind.PUSH, stop=1 << 34, payload_length=1 << 34),
        Frame(Kind.WELCOME),
    ],
    ids=["short nonce", "no msgpack", "large hello", "proof first", "payload", "large payload", "welcome"],
)
def test_a_handshake_that_is_none_ends_the_connection(control: Address, frame: Frame) -> None:
    with Wire(control) as wire:
        wire.send(frame)
        (answer,) = wire.ends()
        assert isinstance(m.read_error(answer.body), ProtocolError)
    assert status(control)


def test_who_does_not_finish_the_handshake_is_closed_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "HANDSHAKE", 0.0)
    monkeypatch.setattr(loop_module, "TICK", 0.01)
    with serve(coordinator()) as address, Wire(address) as silent, Wire(address) as slow:
        slow.sock.sendall(encode(Frame(Kind.HELLO))[:20])
        assert silent.ends() == slow.ends() == []


def test_a_client_gives_up_on_a_server_that_does_not_answer_the_handshake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = Address("tcp", "127.0.0.1", mute.getsockname()[1])
        with pytest.raises(Unreachable, match="did not finish the handshake"):
            dial(address, TOKEN, 0.05)


def test_a_client_is_not_confused_by_a_server_of_another_kind() -> None:
    def answer(sock: socket.socket) -> None:
        peer, _ = sock.accept()
        with peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" + b" " * 99)
            peer.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=answer, args=(other,))
        thread.start()
        with pytest.raises(ProtocolError, match="does not speak Headwater"):
            dial(Address("tcp", "127.0.0.1", other.getsockname()[1]), TOKEN, 5)
        thread.join()


def test_nobody_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(Unreachable, match=f"nobody answers at tcp://127.0.0.1:{port}"):
        dial(Address("tcp", "127.0.0.1", port), TOKEN, 5)
    with pytest.raises(Unreachable, match="nobody answers at local://"):
        dial(Address("local", "headwater-nobody"), TOKEN, 5)


# ---- listening -------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"tcp://127.0.0.1:{port} is in use"):
            listen(Address("tcp", "127.0.0.1", port), TOKEN)


@pytest.mark.parametrize("text", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0", "tcp://example.com:0"])
def test_an_address_that_others_reach_needs_a_token(text: str) -> None:
    for token in (None, b""):
        with pytest.raises(UsageError, match="no token is set; nothing was bound"):
            listen(parse(text), token)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on tcp://192\.0\.2\.1:0"):
        listen(parse("tcp://192.0.2.1:0"), TOKEN)


# ---- noise -------------------------------------------------------------------------------------------------


def mutations(chance: random.Random, good: list[bytes]) -> bytes:
    stream = bytearray(b"".join(chance.choices(good, k=chance.randint(1, 4))))
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(stream))
        match chance.randint(0, 3):
            case 0:
                stream[at] = chance.randrange(256)
            case 1:
                del stream[at : at + chance.randint(1, 8)]
            case 2:
                stream[at:at] = chance.randbytes(chance.randint(1, 8))
            case 3:
                del stream[at:]
        if not stream:
            break
    return bytes(stream)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def fuzz(address: Address, good: list[bytes], rounds: int, seed: int) -> None:
    """Each round is one authenticated connection that sends damaged frames and is then closed by either side."""
    chance = random.Random(seed)
    for _ in range(rounds):
        with Wire(address) as wire:
            assert wire.greet().kind == Kind.WELCOME
            try:
                wire.sock.sendall(mutations(chance, good))
                wire.sock.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # it was closed while it still sent
            wire.ends()


def test_damaged_frames_end_their_own_connection_only(control: Address, caplog: pytest.LogCaptureFixture) -> None:
    requests = [
        m.Status(),
        m.Leave(),
        m.Barrier("x", 1),
        m.Declare(spec(Bulk())),
        m.Initialised(1),
        m.Join("reader", 1),
    ]
    good = [encode(Frame(Kind.REQUEST, seq=i, body=m.pack(r))) for i, r in enumerate(requests)]
    good += [encode(Frame(Kind.NOTICE, body=m.pack(m.Heartbeat()))), encode(Frame(Kind.ERROR, seq=1))]
    with caplog.at_level(logging.ERROR):
        fuzz(address=control, good=good, rounds=50, seed=1)
        tracemalloc.start()
        fuzz(address=control, good=good, rounds=200, seed=2)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert kept < 4 << 20, "a connection's buffer takes 64 KiB"
    assert not caplog.records
    assert status(control).workers == ()


def bulk_push(seq: int, clock: int, flags: int = Flag.END, table: int = 1) -> bytes:
    payload = torch.ones(NUMEL).numpy().tobytes()
    frame = Frame(
        Kind.PUSH, flags, table=table, epoch=1, seq=seq, clock=clock, stop=len(payload), members=1,
        payload_length=len(payload),
    )  # fmt: skip
    return encode(frame) + payload


def test_damaged_frames_do_not_hurt_a_server(server: tuple[Address, NodeHost]) -> None:
    address, host = server
    chance = random.Random(3)
    size = NUMEL * 4
    for i in range(150):
        opening = encode(Frame(Kind.REQUEST, seq=1 << 62, body=m.pack(m.Open(1000 + i, 0, 0, 1))))
        table = chance.choice([1, 2])
        good = [
            bulk_push(1, 1, table=table),
            encode(Frame(Kind.PUSH, Flag.SHARED | Flag.END, table=table, epoch=1, seq=1, clock=1, stop=size)),
            encode(Frame(Kind.PULL, table=table, stop=size)),
            encode(Frame(Kind.ASSIGN, Flag.SHARED | Flag.END, table=table, stop=size)),
            encode(Frame(Kind.REQUEST, seq=5, body=m.pack(m.Attach(table, False)))),
            encode(Frame(Kind.REQUEST, seq=5, body=m.pack(m.Slots(table)))),
        ]
        with Wire(address) as wire:
            wire.greet()
            try:
                wire.sock.sendall(opening + mutations(chance, good))
                wire.sock.shutdown(socket.SHUT_WR)
            except OSError:
                continue
            wire.ends()
        host.node.shard.validate()
    with Wire(address) as wire:
        wire.greet()
        wire.ask(m.Open(5, 0, 0, 1))
        wire.send(Frame(Kind.PULL, table=1, stop=size))
        assert wire.read().length == size
    assert host.node.clients.links.keys() <= {max(host.node.clients.links, default=0)}, (
        "links of closed connections were kept"
    )


# ---- frames that are well made and still not allowed ----------------------------------------------------------


@pytest.mark.parametrize("table", [1, 2])
def test_a_shared_push_needs_shared_memory(server: tuple[Address, NodeHost], table: int) -> None:
    address, host = server
    with Wire(address) as wire:
        wire.greet()
        wire.ask(m.Open(5, 0, 0, 1))
        wire.send(
            Frame(Kind.PUSH, Flag.SHARED | Flag.END, table=table, epoch=1, seq=1, clock=1, stop=NUMEL * 4, members=1)
        )
        assert "without" in str(m.read_error(wire.ends()[0].body))
    with Wire(address) as wire:  # one thread serves all: what came before is done
        wire.greet()
    assert not host.node.clients.links


def test_bytes_for_memory_that_is_shared_read_only_are_refused(server: tuple[Address, NodeHost]) -> None:
    address, host = server
    if address.scheme != "local":
        pytest.skip("descriptors need a unix socket")
    size = host.node.shard.tables[1].size
    fd = memory.create("gradients", size)
    for table in (1, 2):
        with Wire(address) as wire:
            wire.greet()
            wire.ask(m.Open(5, 0, 0, 1))
            wire.ask(m.Attach(table, True, size), fds=(fd,))
            wire.sock.sendall(bulk_push(1, 1, table=table))
            assert "whose gradients this client shares" in str(m.read_error(wire.ends()[0].body))
    os.close(fd)


def test_wrong_descriptors_are_refused_and_closed(server: tuple[Address, NodeHost]) -> None:
    address, host = server
    if address.scheme != "local":
        pytest.skip("descriptors need a unix socket")
    size = host.node.shard.tables[1].size
    read, write = os.pipe()
    small = memory.create("small", 4096)
    attach = Frame(Kind.REQUEST, seq=1, body=m.pack(m.Attach(1, True, size)))
    cases: list[tuple[Frame, tuple[int, ...], str]] = [
        (attach, (read,), "no memfd"),
        (attach, (small,), "instead of"),
        (attach, (), "without a descriptor"),
        (attach, (small, small), "without a descriptor"),
        (Frame(Kind.REQUEST, seq=1, body=m.pack(m.Attach(1, True, 0))), (small,), "smaller than table 't'"),
        (Frame(Kind.REQUEST, seq=1, body=m.pack(m.Slots(1))), (small, read), ""),
        (Frame(Kind.REQUEST, seq=1, body=b"\xc1"), (small,), "cannot be read"),
        (Frame(Kind.PULL, table=1), (small,), "only a request carries"),
    ]
    witness = Wire(address)
    witness.greet()
    witness.ask(m.Open(6, 0, 0, 1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for frame, fds, says in cases:
        with Wire(address) as wire:
            wire.greet()
            wire.ask(m.Open(5, 0, 0, 1))
            wire.send(frame, fds=fds)
            wire.sock.shutdown(socket.SHUT_WR)
            answers = wire.ends()
            if says:
                assert says in str(m.read_error(answers[0].body))
    with Wire(address) as wire:
        wire.send(Frame(Kind.HELLO, body=m.pack(m.Hello(auth.nonce(), "x"))), fds=(small,))
        assert "only a request carries" in str(m.read_error(wire.ends()[0].body))
    with witness:  # one thread serves all: when it answers, what came before is done
        witness.ask(m.Slots(1))
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    memory.close_all((read, write, small))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (Frame(Kind.PUSH, table=9, stop=64, payload_length=64), "before a session"),
        (Frame(Kind.PUSH, table=1, stop=1 << 33, payload_length=1 << 33), "nothing was allocated"),
        (Frame(Kind.PUSH, table=1, start=1 << 60, stop=(1 << 60) + 64, payload_length=64), "nothing was allocated"),
        (
            Frame(Kind.ASSIGN, table=1, start=64, stop=NUMEL * 4 + 4160, payload_length=NUMEL * 4 + 4096),
            "nothing was allocated",
        ),
        (Frame(Kind.DATA, table=1, stop=1 << 33, payload_length=1 << 33), "DATA for table 1 before"),
        (Frame(Kind.ASSIGN, Flag.SHARED, table=1, stop=64), "an assignment needs its bytes"),
        (Frame(Kind.ASSIGN, table=1, stop=64), "ASSIGN of bytes 0:64 without them"),
        (Frame(Kind.PUSH, table=1, seq=1, stop=64), "PUSH of bytes 0:64 without them"),
        (Frame(Kind.PUSH, table=1, seq=1, stop=64, payload_length=32), "nothing was allocated"),
        (Frame(Kind.PUSH, table=1, seq=1, start=64, stop=32), "PUSH of bytes 64:32"),
        (Frame(Kind.PUSH, Flag.ENCODED, table=1, seq=1, stop=64, payload_length=9), "this side knows no codec"),
        (Frame(Kind.PULL, table=1, seq=1, stop=64, payload_length=8), "PULL with keys from table 1, which has none"),
        (Frame(Kind.ACK), "does not go to a server"),
        (Frame(Kind.NOTICE, body=m.pack(m.Commit(1, 1, 1, False))), "does not go to a server"),
        (Frame(Kind.REQUEST, body=m.pack(m.Create(3, spec(Bulk())))), "Create does not go to a server"),
        (Frame(Kind.REQUEST, body=m.pack(m.Open(6, 0, 0, 1))), "has opened session"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_the_state_does_not_allow_ends_the_connection(
    server: tuple[Address, NodeHost], frame: Frame, says: str
) -> None:
    address, host = server
    with Wire(address) as wire:
        wire.greet()
        wire.ask(m.Open(5, 0, 0, 1))
        before, lsn = resident(), host.node.shard.lsn
        wire.send(frame)
        assert says in str(m.read_error(wire.ends()[0].body))
        assert resident() - before < 32 << 20
    host.node.shard.validate()
    assert host.node.shard.lsn == lsn


def test_a_session_is_of_one_worker_and_on_one_connection(server: tuple[Address, NodeHost]) -> None:
    address, _ = server
    with Wire(address) as first, Wire(address) as second, Wire(address) as third:
        for wire in (first, second, third):
            wire.greet()
        first.ask(m.Open(5, 0, 0, 1))
        with pytest.raises(ProtocolError, match="of worker 0, not 1"):
            third.ask(m.Open(5, 1, 0, 1))
        second.ask(m.Open(5, 0, 0, 1))  # its client has lost the first connection before the server did
        (moved,) = first.ends()
        assert "moved to another connection" in str(m.read_error(moved.body))
        second.send(Frame(Kind.PULL, table=1, stop=64))
        assert second.read().kind == Kind.DATA
    with Wire(address) as wire:
        wire.greet()
        with pytest.raises(StaleEpoch, match="shard 3 is not on server 0"):
            wire.ask(m.Open(7, 1, 3, 1))


def test_a_worker_comes_back_over_another_connection_and_goes_on_where_it_was(
    server: tuple[Address, NodeHost],
) -> None:
    address, host = server
    for seq in (1, 2):
        with Wire(address) as wire:
            wire.greet()
            wire.ask(m.Open(5, 0, 0, 1))
            attached = wire.ask(m.Attach(2, False))
            assert isinstance(attached, m.Attached)
            assert attached.seq == seq - 1
            wire.sock.sendall(bulk_push(seq, seq, table=2))
            assert wire.read().kind == Kind.ACK
    assert host.node.shard.tables[2].store.values[: NUMEL * 4].view(torch.float32).eq(-2.0).all()


def test_a_duplicate_with_other_bytes_does_not_touch_what_is_pending(server: tuple[Address, NodeHost]) -> None:
    address, host = server
    with Wire(address) as wire:
        wire.greet()
        wire.ask(m.Open(5, 0, 0, 1))
        wire.sock.sendall(bulk_push(1, 1, Flag.NONE))
        changed = bytearray(bulk_push(1, 1, Flag.NONE))
        changed[-NUMEL * 4 :] = torch.full((NUMEL,), 9.0).numpy().tobytes()
        wire.sock.sendall(bytes(changed))
        wire.send(Frame(Kind.PUSH, Flag.END | Flag.WANT, table=1, epoch=1, seq=2, clock=1, members=1))
        while wire.read().kind != Kind.DATA:
            pass
    assert host.node.shard.tables[1].store.values[: NUMEL * 4].view(torch.float32).eq(-1.0).all()


def test_a_checksum_that_is_wrong_keeps_the_push_out(server: tuple[Address, NodeHost]) -> None:
    address, host = server
    with Wire(address) as wire:
        wire.greet()
        wire.ask(m.Open(5, 0, 0, 1))
        frame = Frame(Kind.PUSH, Flag.END | Flag.CHECKED, table=2, epoch=1, seq=1, clock=1, stop=64, members=1, check=1)
        lsn = host.node.shard.lsn
        wire.send(frame, bytes(64))
        assert "damaged on the way" in str(m.read_error(wire.ends()[0].body))
    assert host.node.shard.lsn == lsn


def test_a_client_that_pulls_and_does_not_read_is_sent_what_was_there_when_it_asked(
    server: tuple[Address, NodeHost],
) -> None:
    """Its answers wait in the server's memory; a later push must not show in them."""
    address, host = server
    pulls = 60
    with Wire(address) as lazy, Wire(address) as busy:
        for session, wire in ((5, lazy), (6, busy)):
            wire.greet()
            wire.ask(m.Open(session, 0, 0, 1))
        lsn = host.node.shard.lsn
        lazy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        for _ in range(pulls):
            lazy.send(Frame(Kind.PULL, table=2, stop=NUMEL * 4))
        lazy.send(Frame(Kind.PULL, table=2))
        busy.sock.sendall(bulk_push(1, 1, Flag.END, table=2))
        assert busy.read().kind == Kind.ACK
        seen = []
        for _ in range(pulls):
            frame = lazy.read()
            assert frame.payload is not None
            values = torch.frombuffer(frame.payload, dtype=torch.float32)
            assert values.min() == values.max(), "torn"
            assert values[0].item() == (-1.0 if frame.lsn > lsn else 0.0)
            seen.append(frame.lsn)
        assert seen == sorted(seen)
    assert host.node.shard.lsn == lsn + 1


def test_a_body_of_megabytes_is_read(control: Address) -> None:
    parameters = tuple(ParameterSpec(f"a rather long name of a parameter {i}", (3,)) for i in range(50_000))
    large = DenseSpec("large", parameters, OptimizerSpec("SGD", ({},)))
    with Wire(control) as wire:
        wire.greet()
        body = m.pack(m.Declare(large))
        assert 1 << 20 < len(body) < MAX_BODY
        with pytest.raises(ClusterError, match="join first"):
            wire.ask(m.Declare(large))
    assert status(control)


def test_the_loop_stops_when_it_is_told_and_closes_everything() -> None:
    with serve(coordinator()) as address:
        wire = Wire(address)
        wire.greet()
    with wire, pytest.raises(LinkBroken):
        wire.read()
