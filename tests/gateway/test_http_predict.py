"""/v1/predict: tensors in and out, on versions that change meanwhile."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from headwater.errors import ShapeMismatch, Unreachable
from headwater.gateway.engine_types import EngineClosed, Weights
from headwater.gateway.limits import Limits
from headwater.gateway.live import Live
from headwater.gateway.predict import ModulePredictor
from headwater.gateway.sources import MemorySource
from headwater.gateway.tensors import SAFETENSORS
from headwater.types import VersionInfo
from tests.gateway.http_fakes import PATIENCE, Running, running

JSON = "application/json"


class Toy(nn.Module):
    """``weight`` times ``x``, and what else a forward may return."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, mode: Tensor | None = None) -> Any:
        match int(mode) if mode is not None else 0:
            case 1:
                return {"sum": x.sum(), "none": None, "both": (self.weight, [x])}
            case 2:
                return "a text"
            case 3:
                return torch.tensor([math.nan, math.inf])
        return x * self.weight


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def said(self) -> Any:
        return msgspec.json.decode(self.body)


def post(server: Running, body: bytes | dict[str, Any], kind: str = JSON, accept: str = "*/*") -> Answer:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    request = Request(f"{server.url}/v1/predict", content, {"content-type": kind, "accept": accept})
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except HTTPError as error:
        with error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())


@pytest.fixture
def source() -> MemorySource:
    return MemorySource("toy")


@pytest.fixture
def live(source: MemorySource) -> Live:
    return Live(Toy().eval(), source, retry=0.01)


@pytest.fixture
def server(live: Live) -> Iterator[Running]:
    with running(ModulePredictor(live)) as found:
        yield found


def until(live: Live, holds: Callable[[Live], bool]) -> None:
    """The follower tells nobody when it is done: ask again and again."""
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if holds(live):
            return
        tick.wait(0.005)
    raise AssertionError(live.statistics())


def test_json_in_and_out(server: Running) -> None:
    answer = post(server, {"model": "toy", "inputs": {"x": {"data": [[1, 1, 1], [0.5, 0, 2]]}}})
    assert answer.status == 200
    assert answer.said["outputs"] == {
        "output": {"dtype": "float32", "shape": [2, 3], "data": [[1.0, 2.0, 3.0], [0.5, 0.0, 6.0]]}
    }
    assert answer.said["system_fingerprint"] == "base#0"
    assert answer.said["version"]["number"] == 0
    assert answer.headers["x-headwater-version"] == "base"
    by_place = post(server, {"inputs": [{"data": [[1, 1, 1], [0.5, 0, 2]]}]})
    assert by_place.said["outputs"] == answer.said["outputs"]


def test_safetensors_in_and_out(server: Running) -> None:
    x = torch.tensor([1.5, 2.5, 3.5], dtype=torch.float64)
    for named in ({"x": x}, {"0": x}):
        answer = post(server, safetensors.torch.save(named), SAFETENSORS)
        assert answer.headers["content-type"] == SAFETENSORS
        assert torch.equal(safetensors.torch.load(answer.body)["output"], x * torch.tensor([1.0, 2.0, 3.0]))
        header = msgspec.json.decode(answer.body[8 : 8 + int.from_bytes(answer.body[:8], "little")])
        assert header["__metadata__"] == {"version": "base", "number": "0", "step": "0"}


@pytest.mark.parametrize(
    ("kind", "accept", "answer"),
    [
        (JSON, "*/*", JSON),
        (SAFETENSORS, "*/*", SAFETENSORS),
        (JSON, SAFETENSORS, SAFETENSORS),
        (SAFETENSORS, f"{JSON}; q=0.5", JSON),
        (SAFETENSORS, f"{JSON}, {SAFETENSORS}", SAFETENSORS),
        (JSON, f"{SAFETENSORS}, {JSON}", JSON),
    ],
)
def test_the_answers_kind_can_be_chosen(server: Running, kind: str, accept: str, answer: str) -> None:
    x = torch.ones(3)
    body = safetensors.torch.save({"x": x}) if kind == SAFETENSORS else b'{"inputs": {"x": {"data": [1, 1, 1]}}}'
    assert post(server, body, kind, accept).headers["content-type"] == answer


def test_outputs_have_the_names_that_the_module_gives_them(server: Running) -> None:
    wanted = {"x": {"data": [1, 2, 3], "dtype": "int64"}, "mode": {"data": 1, "dtype": "int8"}}
    outputs = post(server, {"inputs": wanted}).said["outputs"]
    assert {name: (found["dtype"], found["data"]) for name, found in outputs.items()} == {
        "sum": ("int64", 6),
        "both.0": ("float32", [1.0, 2.0, 3.0]),
        "both.1.0": ("int64", [1, 2, 3]),
    }


def test_json_has_no_nan_and_says_null(server: Running) -> None:
    wanted = {"x": {"data": 1}, "mode": {"data": 3, "dtype": "int64"}}
    assert post(server, {"inputs": wanted}).said["outputs"]["output"]["data"] == [None, None]


def test_a_module_that_answers_something_else_is_at_fault(server: Running) -> None:
    answer = post(server, {"inputs": {"x": {"data": 1}, "mode": {"data": 2, "dtype": "int64"}}})
    assert (answer.status, answer.said["error"]["type"]) == (500, "server_error")
    assert "returned a str" in answer.said["error"]["message"]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": {"data": [1, 2]}}, "The size of tensor a (2) must match the size of tensor b (3)"),
        ({"y": {"data": [1, 2, 3]}}, "unexpected keyword argument 'y'"),
        ([], "missing 1 required positional argument: 'x'"),
        ({"x": {"data": [[1, 2], [3]]}}, "inputs.x"),
        ({"x": {"data": "text"}}, "inputs.x"),
        ({"x": {"data": None}}, "inputs.x"),
        ({"x": {"data": [1.5], "dtype": "int64"}}, "numbers of int64"),
        ({"x": {"data": [300], "dtype": "uint8"}}, "numbers of uint8"),
        ({"x": {"data": [2**70]}}, "inputs.x"),
        ({"x": {"data": [1], "dtype": "object"}}, "object"),
        ({"x": {"data": [1], "shape": [1]}}, "shape"),
        ("x", "inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_reason(server: Running, inputs: Any, said: str) -> None:
    answer = post(server, {"inputs": inputs})
    assert answer.status == 400
    assert said in answer.said["error"]["message"]
    assert len(answer.said["error"]["message"]) < 700


def test_nesting_is_bounded(server: Running) -> None:
    for depth in (200, 900, 100_000):
        body = b'{"inputs": [{"data": ' + b"[" * depth + b"1" + b"]" * depth + b"}]}"
        assert post(server, body).status == 400


@pytest.mark.parametrize(
    "body", [b"", b"\x80\x04\x95.", b"\xff" * 100, (1 << 40).to_bytes(8, "little"), safetensors.torch.save({})[:-1]]
)
def test_what_is_not_safetensors_is_refused(server: Running, body: bytes) -> None:
    answer = post(server, body, SAFETENSORS)
    assert (answer.status, answer.said["error"]["code"]) == (400, "invalid_safetensors")


def test_no_other_content_type_is_read(server: Running) -> None:
    for kind in ("application/octet-stream", "application/x-pickle", "text/plain"):
        assert post(server, b"x", kind).status == 415


def test_places_without_a_gap(server: Running) -> None:
    assert post(server, safetensors.torch.save({"1": torch.ones(1)}), SAFETENSORS).status == 400


def test_a_new_version_answers_the_next_request(server: Running, source: MemorySource, live: Live) -> None:
    wanted = {"inputs": [{"data": [1, 1, 1]}]}
    assert post(server, wanted).said["outputs"]["output"]["data"] == [1.0, 2.0, 3.0]
    source.publish({"weight": torch.tensor([4.0, 5.0, 6.0])}, "better")
    until(live, lambda live: live.statistics().version.number == 1)
    answer = post(server, wanted)
    assert answer.said["outputs"]["output"]["data"] == [4.0, 5.0, 6.0]
    assert answer.headers["x-headwater-version"] == "better"
    until(live, lambda live: source.leases == {1: 1})


def test_a_version_that_does_not_fit_is_passed_over(server: Running, source: MemorySource, live: Live) -> None:
    source.publish({"weight": torch.ones(4)})
    until(live, lambda live: live.statistics().refused_versions == 1)
    assert post(server, {"inputs": [{"data": [1, 1, 1]}]}).said["version"]["number"] == 0
    assert "shape (4,)" in live.statistics().error
    source.publish({"weight": torch.ones(3)})
    until(live, lambda live: live.statistics().version.number == 2)


class _Asked(nn.Module):
    """Waits amid its forward, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        before = self.weight.clone()
        self.inside.set()
        assert self.go_on.wait(PATIENCE)
        return torch.cat([before, self.weight, x])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Asked:
        twin = _Asked()
        twin.weight, twin.inside, twin.go_on = self.weight, self.inside, self.go_on
        return twin


def test_a_forward_ends_on_the_version_that_it_began_on(source: MemorySource) -> None:
    module = _Asked()
    live = Live(module, source, threads=2)
    answers: list[Answer] = []
    with running(ModulePredictor(live), Limits(threads=2)) as server:

        def ask() -> None:
            answers.append(post(server, {"inputs": [{"data": [0]}]}))

        first = threading.Thread(target=ask)
        first.start()
        assert module.inside.wait(PATIENCE)
        source.publish({"weight": torch.tensor([2.0])})
        until(live, lambda live: live.statistics().version.number == 1)
        assert live.statistics().versions == (0, 1)
        second = threading.Thread(target=ask)
        second.start()
        module.go_on.set()
        for thread in (first, second):
            thread.join(PATIENCE)
        found = sorted(
            (answer.said["version"]["number"], answer.said["outputs"]["output"]["data"]) for answer in answers
        )
        assert found == [(0, [1.0, 1.0, 0.0]), (1, [2.0, 2.0, 0.0])]
        until(live, lambda live: source.leases == {1: 1})
    assert source.leases == {}


def test_a_forward_that_waits_for_the_module_keeps_its_version(source: MemorySource) -> None:
    live = Live(Toy(), source)
    inside, go_on = threading.Event(), threading.Event()
    found: list[tuple[int, Any]] = []

    def forward(wait: bool) -> None:
        with live.hold() as (module, version):
            inside.set()
            assert not wait or go_on.wait(PATIENCE)
            found.append((version.number, module.weight.tolist()))  # type: ignore[union-attr,operator]

    first, second = (threading.Thread(target=forward, args=(wait,)) for wait in (True, False))
    first.start()
    assert inside.wait(PATIENCE)
    second.start()
    until(live, lambda live: live._current.users == 2)
    source.publish({"weight": torch.tensor([4.0, 5.0, 6.0])})
    until(live, lambda live: live.statistics().version.number == 1)
    go_on.set()
    for thread in (first, second):
        thread.join(PATIENCE)
    assert found == [(0, [1.0, 2.0, 3.0])] * 2
    until(live, lambda _: source.leases == {1: 1})
    live.close()
    assert source.leases == {}


def test_after_close_no_forward_waits(source: MemorySource) -> None:
    live = Live(Toy(), source)
    refused: list[type[Exception]] = []

    def ask() -> None:
        try:
            with live.hold():
                pass
        except EngineClosed as error:
            refused.append(type(error))

    with live.hold():
        closing = threading.Thread(target=live.close)
        closing.start()
    closing.join(PATIENCE)
    waiting = [threading.Thread(target=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(PATIENCE)
    ask()
    live.close()
    assert refused == [EngineClosed] * 3
    assert source.leases == {}


def test_a_full_pool_is_429_and_a_late_forward_504(source: MemorySource) -> None:
    module = _Asked()
    live = Live(module, source)
    with running(ModulePredictor(live), Limits(threads=1, queue=0, deadline=0.2)) as server:
        late: list[Answer] = []
        first = threading.Thread(target=lambda: late.append(post(server, {"inputs": [{"data": [0]}]})))
        first.start()
        assert module.inside.wait(PATIENCE)
        full = post(server, {"inputs": [{"data": [0]}]})
        assert (full.status, full.headers["retry-after"]) == (429, "1")
        first.join(PATIENCE)
        assert (late[0].status, late[0].said["error"]["code"]) == (504, "deadline_exceeded")
        module.go_on.set()


def test_a_client_that_hangs_up_leaves_the_queue(source: MemorySource) -> None:
    module = _Asked()
    live = Live(module, source)
    body = b'{"inputs": [{"data": [0]}]}'
    head = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: {JSON}\r\ncontent-length: {len(body)}\r\n\r\n"
    with running(ModulePredictor(live)) as server:
        threads = server.server._gateway._forwards
        first = threading.Thread(target=post, args=(server, body))
        first.start()
        assert module.inside.wait(PATIENCE)
        with socket.create_connection(server.address, PATIENCE) as sock:
            sock.sendall(head.encode() + body)
            until(live, lambda _: threads._pending == 2)
        until(live, lambda _: threads._pending == 1)
        module.go_on.set()
        first.join(PATIENCE)


class _Broken:
    """A source that answers once."""

    def __init__(self) -> None:
        self.inner = MemorySource("toy")

    def lease(self, name: str = "latest") -> Weights:
        return self.inner.lease(name)

    def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo:
        raise Unreachable("nobody answers")


def test_a_source_that_is_gone_leaves_the_last_version_in_service() -> None:
    live = Live(Toy(), _Broken(), retry=0.01)
    with running(ModulePredictor(live)) as server:
        until(live, lambda live: live.statistics().stale_since is not None)
        answer = post(server, {"inputs": [{"data": [1, 1, 1]}]})
        assert answer.status == 200
        assert int(answer.headers["x-headwater-stale"]) < PATIENCE


def test_a_first_version_of_another_model_is_refused(source: MemorySource) -> None:
    source.publish({"bias": torch.ones(1)})
    with pytest.raises(ShapeMismatch, match="bias"):
        Live(Toy(), source)
    assert source.leases == {}
