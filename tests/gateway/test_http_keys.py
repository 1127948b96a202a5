"""Who may ask, and what the paths beside the model's say."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import openai
import pytest

from headwater.errors import AddressInUse, UsageError
from headwater.gateway.auth import Keys
from headwater.gateway.serving import bind
from tests.gateway.http_fakes import PATIENCE, FakeEngine, Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]
SECRET = "sk-first-of-two"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(f"# whose\n{SECRET}\n\nsk-second\n", encoding="utf-8")
    return path


@pytest.fixture
def guarded(keys: Path) -> Iterator[Running]:
    with running(FakeEngine(), keys=keys) as found:
        yield found


def get(server: Running, path: str, key: str | None = None) -> tuple[int, dict[str, str], bytes]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with urlopen(Request(server.url + path, headers=headers), timeout=PATIENCE) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def test_a_key_of_the_file_opens(guarded: Running) -> None:
    for key in (SECRET, "sk-second"):
        with guarded.client(key) as client:
            assert client.chat.completions.create(model="toy", messages=HELLO, max_tokens=1).choices
            assert [model.id for model in client.models.list()] == ["toy"]


@pytest.mark.parametrize("key", ["sk-wrong", "# whose", SECRET[:-1], SECRET + "x", "schlüssel"])
def test_another_key_does_not(guarded: Running, key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        status, headers, body = get(guarded, "/v1/models", key)
    error = msgspec.json.decode(body)["error"]
    assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
    assert headers["www-authenticate"] == "Bearer"
    assert "x-headwater-version" not in headers
    assert key not in caplog.text
    assert key.encode() not in body


def test_the_client_raises_its_own_error(guarded: Running) -> None:
    with guarded.client("sk-wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_everything_but_the_probes_needs_one(guarded: Running, path: str) -> None:
    status, _, body = get(guarded, path)
    assert (status, msgspec.json.decode(body)["error"]["code"]) == (401, "missing_api_key")
    for probe in ("/healthz", "/readyz"):
        status, headers, _ = get(guarded, probe)
        assert (status, "x-headwater-version" in headers) == (200, False)


def test_the_document_says_that_a_key_is_needed(guarded: Running) -> None:
    document = msgspec.json.decode(get(guarded, "/openapi.json", SECRET)[2])
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert document["paths"]["/healthz"]["get"]["security"] == []


def _rewrite(path: Path, text: str) -> None:
    """As an editor does: another file under the same name."""
    beside = path.with_suffix(".new")
    beside.touch(mode=0o600)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def test_a_changed_file_is_read_again(guarded: Running, keys: Path) -> None:
    _rewrite(keys, "sk-third\n")
    assert [get(guarded, "/v1/models", key)[0] for key in (SECRET, "sk-third")] == [401, 200]


@pytest.mark.parametrize("harm", ["open", "gone", "empty"])
def test_a_file_that_goes_bad_lets_nobody_in(guarded: Running, keys: Path, harm: str) -> None:
    if harm == "open":
        keys.chmod(0o644)
    elif harm == "gone":
        keys.unlink()
    else:
        _rewrite(keys, "# nobody\n")
    assert get(guarded, "/v1/models", SECRET)[0] == 401


def test_a_file_that_others_can_read_is_refused(keys: Path) -> None:
    keys.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        Keys(keys)
    with pytest.raises(UsageError, match="cannot be read"):
        Keys(keys.with_name("none"))


def test_without_keys_nobody_else_can_reach_it() -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(UsageError, match="--api-keys"):
            bind(host, 0, proven=False)
    with bind("0.0.0.0", 0, proven=True) as sock, pytest.raises(AddressInUse):
        bind("0.0.0.0", sock.getsockname()[1], proven=True)
    with pytest.raises(UsageError, match="nothing was started"):
        bind("192.0.2.1", 0, proven=True)
    with bind("localhost", 0, proven=False):
        pass


def test_an_engine_that_has_failed_is_said() -> None:
    """So that whoever watches the server restarts it."""
    engine = FakeEngine()
    with running(engine) as server:
        engine.failed = "ZeroDivisionError()"
        for probe in ("/healthz", "/readyz"):
            status, _, body = get(server, probe)
            assert (status, body) == (503, b'{"status":"failed"}')


def test_not_ready_before_the_first_version() -> None:
    with running(None) as server, server.client() as client:
        assert get(server, "/healthz")[0] == 200
        status, headers, body = get(server, "/readyz")
        assert (status, body) == (503, b'{"status":"loading"}')
        assert "x-headwater-version" not in headers
        assert client.models.list().data[0].to_dict()["headwater_version"] is None
        with pytest.raises(openai.InternalServerError, match="no version yet") as refused:
            client.chat.completions.create(model="toy", messages=HELLO)
        assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")
        server.served.attach(FakeEngine())
        assert get(server, "/readyz")[0] == 200
        assert client.models.retrieve("toy").to_dict()["headwater_version"]["name"] == "step-100"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("another/one")


def test_a_version_that_may_be_old_says_so() -> None:
    engine = FakeEngine(stale_since=time.time() - 90)
    with running(engine) as server:
        headers = get(server, "/v1/models")[1]
        assert 90 <= int(headers["x-headwater-stale"]) < 90 + PATIENCE
        shown = get(server, "/metrics")[2].decode()
        assert "headwater_cluster_reachable 0.0" in shown


def test_a_version_of_a_name_that_no_header_can_hold() -> None:
    engine = FakeEngine()
    engine.version = msgspec.structs.replace(engine.version, name="grün\r\nx: y")
    with running(engine) as server:
        assert get(server, "/v1/models")[1]["x-headwater-version"] == "gr%C3%BCn%0D%0Ax: y"


def test_metrics(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with caplog.at_level(logging.INFO), running(engine) as server, server.client() as client:
        client.chat.completions.create(model="toy", messages=HELLO, max_tokens=7)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=HELLO)
        get(server, "/wp-admin")
        status, headers, body = get(server, "/metrics")
    shown = body.decode()
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    for line in (
        'headwater_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'headwater_requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'headwater_requests_total{route="other",status="404"} 1.0',
        'headwater_tokens_total{kind="prompt"} 8.0',
        'headwater_tokens_total{kind="completion"} 7.0',
        "headwater_time_to_first_token_seconds_count 1.0",
        'headwater_version_info{model="toy",name="step-100"} 1.0',
        "headwater_version_number 1.0",
        "headwater_version_step 100.0",
        "headwater_versions_live 1.0",
        "headwater_cluster_reachable 1.0",
        "headwater_generations_running 0.0",
        "headwater_generations_waiting 0.0",
        'headwater_generations_finished_total{reason="length"} 1.0',
        "headwater_ready 1.0",
    ):
        assert line in shown.splitlines()
    (line, *_) = [record.getMessage() for record in caplog.records if record.name == "headwater.gateway"]
    assert line.startswith("127.0.0.1 POST /v1/chat/completions 200 ")
    assert "step-100#1 8+7 tokens first after " in line
    assert not [record for record in caplog.records if "/metrics" in record.getMessage()]


def test_a_bug_of_ours_is_a_500_without_its_story(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.encode = lambda text: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with running(engine) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(model="toy", prompt="a")
        assert failed.value.code == "internal"
        assert "ZeroDivisionError" not in failed.value.response.text
        assert client.completions.create(model="toy", prompt=[97]).choices
    assert "ZeroDivisionError" in caplog.text


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_nothing_is_left_open() -> None:
    before = _descriptors()
    with running(FakeEngine()) as server, server.client() as client:
        client.models.list()
    assert _descriptors() <= before
