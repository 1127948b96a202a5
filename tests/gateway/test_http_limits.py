"""What a client may not do: hang up and keep its slot, send too much, too slowly, too often. Real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from headwater.gateway import serving
from headwater.gateway.limits import Limits
from tests.gateway.http_fakes import PATIENCE, FakeEngine, Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]
ASK = {"model": "toy", "messages": HELLO, "temperature": 0}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(slots=1, queue=1)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine, Limits(body=2000, connections=4)) as found:
        yield found


@pytest.fixture
def hasty(engine: FakeEngine) -> Iterator[Running]:
    """One that does not wait long."""
    with running(engine, Limits(body_timeout=0.05, head_timeout=2.0)) as found:
        yield found


def post(body: bytes | str, path: str = "/v1/chat/completions", length: int | None = None, more: str = "") -> bytes:
    content = body.encode() if isinstance(body, str) else body
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
    return f"{head}content-length: {len(content) if length is None else length}\r\n\r\n".encode() + content


def call(server: Running) -> socket.socket:
    return socket.create_connection(server.address, PATIENCE)


def everything(sock: socket.socket) -> bytes:
    """Until the server closes."""
    found = b""
    while part := sock.recv(1 << 16):
        found += part
    return found


def one_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer with a content-length."""
    file = sock.makefile("rb")
    status = int(file.readline().split()[1])
    lines = iter(file.readline, b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.decode().partition(":") for line in lines)}
    return status, headers, file.read(int(headers["content-length"]))


def refused(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    """Status and code; every error has the same form."""
    error = json.loads(answer[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer[0], error["code"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(server: Running, engine: FakeEngine, streamed: bool) -> None:
    engine.let(1)
    with call(server) as sock:
        sock.sendall(post(json.dumps(ASK | {"stream": streamed})))
        if streamed:
            assert b"200 OK" in sock.recv(15)
        engine.wait_for(lambda engine: engine.running == 1)
    engine.wait_for(lambda engine: engine.running == 0)
    assert engine.finished == {"cancelled": 1}
    engine.go()
    with server.client() as client:
        assert client.chat.completions.create(model="toy", messages=HELLO, max_tokens=1).choices


def test_one_that_waits_in_the_queue_leaves_it(server: Running, engine: FakeEngine) -> None:
    engine.hold()
    with call(server) as sock:
        sock.sendall(post(json.dumps(ASK | {"n": 1})))
        engine.wait_for(lambda engine: engine.waiting == 1)
    engine.wait_for(lambda engine: engine.waiting == 0)


def test_a_full_queue_is_429_and_says_when_to_come_back(server: Running, engine: FakeEngine) -> None:
    engine.let(1)
    with call(server) as first, call(server) as second, server.client() as client:
        first.sendall(post(json.dumps(ASK)))
        engine.wait_for(lambda engine: engine.running == 1)
        second.sendall(post(json.dumps(ASK)))
        engine.wait_for(lambda engine: engine.waiting == 1)
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model="toy", messages=HELLO)
        assert full.value.response.headers["retry-after"] == "1"
        assert full.value.code == "queue_full"
        engine.go()
        assert [one_answer(sock)[0] for sock in (first, second)] == [200, 200]


def test_if_one_choice_finds_the_queue_full_all_are_withdrawn(server: Running, engine: FakeEngine) -> None:
    engine.slots = 0
    with server.client() as client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="toy", messages=HELLO, n=3)
    engine.wait_for(lambda engine: engine.waiting == 0)


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(server: Running) -> None:
    with call(server) as sock:
        sock.sendall(post(b"", length=10**9, more="expect: 100-continue\r\n"))
        assert refused(one_answer(sock)) == (413, "body_too_long")
        assert sock.recv(1) == b""


def test_a_client_that_sends_before_it_reads_is_told_too(server: Running) -> None:
    with server.client() as client, pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert refused.value.status_code == 413


def test_a_body_without_a_length_is_bounded_too(server: Running) -> None:
    with call(server) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + b"800\r\n" + b" " * 2048 + b"\r\n0\r\n\r\n")
        assert refused(one_answer(sock)) == (413, "body_too_long")


def test_a_body_that_trickles_is_cut_off(hasty: Running) -> None:
    with call(hasty) as sock:
        sock.sendall(post(b"{", length=100))
        assert refused(one_answer(sock)) == (408, "body_timeout")
        assert sock.recv(1) == b""


@pytest.mark.parametrize("said", [b"", b"POST /v1/completions HTTP/1.1\r\nhost:"])
def test_a_head_that_does_not_come_is_cut_off(hasty: Running, said: bytes) -> None:
    with call(hasty) as sock:
        sock.sendall(said)
        assert everything(sock) == b""


def test_a_body_that_was_refused_unread_is_not_waited_for(hasty: Running) -> None:
    with call(hasty) as sock:
        sock.sendall(post(b"{", "/nowhere", length=100))
        assert refused(one_answer(sock)) == (404, "not_found")
        sock.sendall(b"and")
        assert sock.recv(1) == b""


def test_a_client_that_stops_reading_is_cut_off(
    hasty: Running, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, original = threading.Event(), serving._Connection.connection_lost

    def connection_lost(connection: Any, error: Exception | None) -> None:
        assert not connection.cycle.response_complete
        original(connection, error)
        lost.set()

    monkeypatch.setattr(serving._Connection, "connection_lost", connection_lost)
    engine.context, engine.slots = 100_000, 4
    wanted = ASK | {"n": 4, "max_tokens": 2000, "temperature": 1, "stream": True, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(hasty.address)
        sock.sendall(post(json.dumps(wanted)))
        assert lost.wait(PATIENCE)
    engine.wait_for(lambda engine: engine.running == 0)


def test_only_so_many_connections(server: Running) -> None:
    with call(server) as first, call(server) as second, call(server) as third, call(server) as fourth:
        for sock in (first, second, third, fourth):
            sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert one_answer(sock)[0] == 200
        with call(server) as fifth:
            assert refused(one_answer(fifth)) == (503, "too_many")


@pytest.mark.parametrize(
    ("request_bytes", "answer"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", (400, "invalid_http")),
        (post("{"), (400, "invalid_json")),
        (post(b'{"model": "\xff"}'), (400, "invalid_json")),
        (post("[" * 1500), (400, "invalid_value")),
        (post('{"inputs": [{"data": ' + "[" * 1400, "/v1/predict"), (404, "not_offered")),
        (post('{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}'), (400, "invalid_json")),
        (post("{}").replace(b"application/json", b"text/plain"), (415, "unsupported_media_type")),
        (b"PUT /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", (405, "method_not_allowed")),
        (b"GET /v1/models/ HTTP/1.1\r\nhost: x\r\n\r\n", (404, "model_not_found")),
        (b"GET /%00%ff HTTP/1.1\r\nhost: x\r\n\r\n", (404, "not_found")),
        (b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", (400, "invalid_http")),
    ],
)
def test_nonsense_is_refused_in_the_same_form(server: Running, request_bytes: bytes, answer: tuple[int, str]) -> None:
    with call(server) as sock:
        sock.sendall(request_bytes)
        assert refused(one_answer(sock)) == answer


@contextlib.contextmanager
def _late(tokens: int, path: str, **wanted: Any) -> Iterator[Any]:
    """An answer of an engine that stops after so many steps, until the deadline."""
    engine = FakeEngine()
    engine.let(tokens)
    with running(engine, Limits(deadline=0.3)) as server, server.client() as client:
        create: Any = client.chat.completions.create if path == "chat" else client.completions.create
        asked = {"messages": HELLO} if path == "chat" else {"prompt": "ab", "max_tokens": 20}
        yield create(model="toy", temperature=0, **asked, **wanted)


def test_a_deadline_gives_what_there_is() -> None:
    with _late(3, "chat") as answer:
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("abc", "length")
        assert answer.usage.completion_tokens == 3
    with _late(3, "chat", stream=True, stream_options={"include_usage": True}) as chunks:
        *said, last = chunks
        assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == "abc"
        assert said[-1].choices[0].finish_reason == "length"
        assert last.usage.completion_tokens == 3
    with _late(4, "completions", n=3) as answer:  # two run, one waits
        assert [choice.text for choice in answer.choices] == ["abcd", "abcd", ""]
        assert {choice.finish_reason for choice in answer.choices} == {"length"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_there_is_anything(stream: bool) -> None:
    with (
        pytest.raises(openai.InternalServerError, match="no token was generated") as late,
        _late(0, "chat", stream=stream),
    ):
        pass
    assert late.value.status_code == 504
    assert late.value.response.headers["x-should-retry"] == "false"


def test_a_server_that_ends_lets_streams_end(engine: FakeEngine) -> None:
    engine.let(1)
    with running(engine, Limits(grace=30.0)) as server, server.client() as client:
        stream = client.chat.completions.create(model="toy", messages=HELLO, temperature=0, max_tokens=9, stream=True)
        server.end()
        engine.go()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "abcdefghi"


def test_a_server_that_ends_does_not_wait_for_ever(engine: FakeEngine) -> None:
    engine.let(2)
    with running(engine, Limits(grace=0.1)) as server, server.client() as client:
        stream = client.chat.completions.create(model="toy", messages=HELLO, temperature=0, stream=True)
        said = ""
        while said != "ab":
            said += next(stream).choices[0].delta.content or ""
        server.end()
        with pytest.raises(openai.APIError, match=r"the server is ending; 2 tokens were generated and sent"):
            list(stream)
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        call(server)


def _in_threads(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=each) for each in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_many_clients_at_once_each_get_their_own_answer() -> None:
    texts: dict[int, str | None] = {}
    with running(FakeEngine(slots=3, queue=100)) as server, server.client() as client:

        def ask(seed: int) -> None:
            found = client.chat.completions.create(model="toy", messages=HELLO, seed=seed, max_tokens=20)
            texts[seed] = found.choices[0].message.content

        _in_threads([lambda seed=seed: ask(seed) for seed in range(12)])  # type: ignore[misc]
        assert len(set(texts.values())) == 12
        for seed in (0, 7):
            again = client.chat.completions.create(model="toy", messages=HELLO, seed=seed, max_tokens=20)
            assert again.choices[0].message.content == texts[seed]
