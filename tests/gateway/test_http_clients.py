"""What clients of today send beside the question: neutral values, unknown fields, ids of requests, other origins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest

from headwater.gateway.limits import Limits
from tests.gateway.http_fakes import PATIENCE, FakeEngine, Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(slots=4, queue=50)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    with running(FakeEngine(slots=4, queue=50), Limits(strict=True)) as found:
        yield found


def post(
    server: Running, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """As bytes, so that no client tidies the body up."""
    data = json.dumps({"model": "toy", "temperature": 0} | body).encode()
    request = Request(server.url + path, data, {"content-type": "application/json"} | (headers or {}))
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, json.loads(answer.read())
    except HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, json.loads(error.read())


NEUTRAL: list[dict[str, Any]] = [
    {"logit_bias": {}},
    {"logit_bias": {"97": 0}},
    {"stop": []},
    {"stop": ""},
    {"stop_token_ids": []},
    {"n": 1},
    {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0},
    {"top_k": 0},
    {"top_k": -1},
    {"top_p": 1},
    {"seed": None, "user": ""},
    {"stream": False, "stream_options": None},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
]
NEUTRAL_CHAT: list[dict[str, Any]] = [
    {"tools": []},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none", "parallel_tool_calls": False},
    {"functions": [], "function_call": "none"},
    {"response_format": {"type": "text"}},
    {"response_format": {}},
    {"logprobs": False, "top_logprobs": 0},
    {"modalities": ["text"], "audio": None, "prediction": None},
    {"reasoning_effort": "none", "verbosity": "medium", "web_search_options": None},
    {"store": False, "metadata": {}, "service_tier": "auto"},
]
NEUTRAL_COMPLETION: list[dict[str, Any]] = [
    {"suffix": ""},
    {"suffix": None},
    {"logprobs": False},
    {"best_of": 1},
    {"echo": False},
]
CHAT_NULL = (
    "logit_bias tools tool_choice parallel_tool_calls functions function_call response_format logprobs top_logprobs "
    "modalities audio prediction reasoning_effort verbosity web_search_options metadata prompt_cache_key "
    "safety_identifier service_tier store max_tokens max_completion_tokens"
)
BOTH_NULL = (
    "stream stream_options n top_p top_k min_p stop stop_token_ids seed frequency_penalty presence_penalty "
    "repetition_penalty logit_bias ignore_eos user"
)


@pytest.mark.parametrize(
    "wanted", [*NEUTRAL, *NEUTRAL_CHAT, *({name: None} for name in f"{CHAT_NULL} {BOTH_NULL}".split())]
)
def test_a_neutral_value_changes_no_chat(server: Running, strict: Running, wanted: dict[str, Any]) -> None:
    for each in (server, strict):
        status, headers, body = post(each, "/v1/chat/completions", {"messages": HELLO} | wanted)
        assert (status, body.get("error")) == (200, None)
        assert body["choices"][0]["message"]["content"] == ALPHABET
        assert "x-headwater-ignored" not in headers


@pytest.mark.parametrize(
    "wanted", [*NEUTRAL, *NEUTRAL_COMPLETION, *({name: None} for name in f"{BOTH_NULL} max_tokens echo".split())]
)
def test_a_neutral_value_changes_no_completion(server: Running, strict: Running, wanted: dict[str, Any]) -> None:
    for each in (server, strict):
        status, headers, body = post(each, "/v1/completions", {"prompt": "a"} | wanted)
        assert (status, body.get("error")) == (200, None)
        assert body["choices"][0]["text"] == ALPHABET[:16]
        assert "x-headwater-ignored" not in headers


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": "a", "tool_calls": [], "refusal": None, "annotations": []}, "a"),
        ({"role": "assistant", "content": None, "tool_calls": None, "function_call": None, "audio": None}, ""),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"role": "user", "content": []}, ""),
        ({"role": "user", "content": "", "name": None}, ""),
    ],
)
def test_a_message_as_other_clients_write_it(
    server: Running, engine: FakeEngine, message: dict[str, Any], read: str
) -> None:
    status, _, body = post(server, "/v1/chat/completions", {"messages": [*HELLO, message, *HELLO]})
    assert (status, body.get("error")) == (200, None)
    assert engine.read[0][1] == {"role": message["role"], "content": read}


def test_roles_go_to_the_template(server: Running, engine: FakeEngine) -> None:
    said = [{"role": role, "content": "x"} for role in ("developer", "system", "critic")]
    assert post(server, "/v1/chat/completions", {"messages": said})[0] == 200
    assert [message["role"] for message in engine.read[0]] == ["system", "system", "critic"]


UNKNOWN = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}], "colour": 1}],
    "max_token": 5,
    "stream_options": {"continuous_usage_stats": True},
    "metadata": {"anything": "goes"},
}


def test_unknown_fields_are_ignored_and_named(server: Running) -> None:
    status, headers, _ = post(server, "/v1/chat/completions", UNKNOWN)
    assert status == 200
    named = headers["x-headwater-ignored"].split(", ")
    assert sorted(named) == [
        "max_token",
        "messages[0].colour",
        "messages[0].content[0].cache_control",
        "stream_options.continuous_usage_stats",
    ]


def test_a_header_holds_whatever_a_field_is_called(server: Running) -> None:
    wanted = {f"ü\r\nx: {number}" + "y" * 500: 1 for number in range(50)}
    status, headers, _ = post(server, "/v1/chat/completions", {"messages": HELLO} | wanted)
    assert status == 200
    assert "x" not in headers
    assert headers["x-headwater-ignored"].endswith(", and 34 more")
    assert len(headers["x-headwater-ignored"]) < 5000


@pytest.mark.parametrize(
    ("field", "shown"),
    [("", '""'), (" ", "%20"), ("a b", "a b"), (" a b", "%20a%20b"), ("y" * 99 + " z", "y" * 99 + "%20")],
)
def test_a_header_neither_begins_nor_ends_with_a_space(server: Running, field: str, shown: str) -> None:
    status, headers, _ = post(server, "/v1/chat/completions", {"messages": HELLO, field: 1})
    assert (status, headers["x-headwater-ignored"]) == (200, shown)


def test_a_strict_server_refuses_them_by_name(strict: Running) -> None:
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "a"})):
        status, _, answer = post(strict, f"/v1/{path}", body | {"max_token": 5})
        assert status == 400
        assert (answer["error"]["param"], answer["error"]["code"]) == ("max_token", "unknown_field")
    body = {"messages": [{"role": "user", "content": "a", "colour": 1}]}
    assert post(strict, "/v1/chat/completions", body)[2]["error"]["param"] == "messages[0].colour"


def test_the_document_says_whether_it_is_strict(server: Running, strict: Running) -> None:
    for each, closed in ((server, None), (strict, False)):
        with urlopen(f"{each.url}/openapi.json", timeout=PATIENCE) as answer:
            schemas = json.loads(answer.read())["components"]["schemas"]
        for name in ("ChatRequest", "Message", "CompletionRequest", "InputItem"):
            assert schemas[name].get("additionalProperties") is closed
        assert "additionalProperties" not in schemas["ChatCompletion"]


@pytest.mark.parametrize(
    ("path", "wanted", "param"),
    [
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat/completions", {"verbosity": "low"}, "verbosity"),
        ("chat/completions", {"modalities": ["audio"]}, "modalities[0]"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"response_format": {"type": "grammar"}}, "response_format.type"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ("chat/completions", {"logit_bias": {"300": 1}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat/completions", {"stop_token_ids": [300]}, "stop_token_ids"),
        ("chat/completions", {"min_p": 2}, "min_p"),
        ("chat/completions", {"repetition_penalty": 0}, "repetition_penalty"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"logprobs": True}, "logprobs"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    server: Running, path: str, wanted: dict[str, Any], param: str
) -> None:
    status, _, body = post(
        server, f"/v1/{path}", ({"prompt": "a"} if path == "completions" else {"messages": HELLO}) | wanted
    )
    assert (status, body["error"]["param"]) == (400, param)


def test_a_requests_id_is_the_clients_or_made(server: Running) -> None:
    body = {"messages": HELLO}
    given = post(server, "/v1/chat/completions", body, {"x-request-id": "mine-1"})[1]["x-request-id"]
    assert given == "mine-1"
    made = {post(server, "/v1/chat/completions", body)[1]["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    for bad in ("two words", "x" * 129, "\xfc"):
        assert post(server, "/v1/chat/completions", body, {"x-request-id": bad})[1]["x-request-id"] != bad
    assert post(server, "/v1/nowhere", body, {"x-request-id": "lost"})[1]["x-request-id"] == "lost"
    with server.client() as client:
        answer = client.chat.completions.create(model="toy", messages=HELLO, extra_headers={"x-request-id": "mine-2"})
        assert answer._request_id == "mine-2"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="toy", messages=[])
        assert refused.value.request_id


def browse(url: str, method: str, **headers: str) -> tuple[int, dict[str, str]]:
    request = Request(url, method=method, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}
    except HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}


PAGE = "http://chat.example"
ASKS = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,content-type"}


def test_pages_of_a_named_origin_may_read_answers(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n", encoding="utf-8")
    keys.chmod(0o600)
    with running(FakeEngine(), keys=keys, cors=[PAGE]) as found:
        url = f"{found.url}/v1/chat/completions"
        status, headers = browse(url, "OPTIONS", origin=PAGE, **ASKS)
        assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
        assert "authorization" in headers["access-control-allow-headers"]
        status, headers = browse(f"{found.url}/v1/models", "GET", origin=PAGE)
        assert (status, headers["access-control-allow-origin"]) == (401, PAGE)
        status, headers = browse(f"{found.url}/v1/models", "GET", origin=PAGE, authorization="Bearer secret")
        assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-headwater-version" in headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in browse(url, "OPTIONS", origin="http://evil.example", **ASKS)[1]


def test_without_leave_no_page_may(server: Running) -> None:
    status, headers = browse(f"{server.url}/v1/models", "OPTIONS", origin=PAGE, **ASKS)
    assert status == 405
    assert "access-control-allow-origin" not in headers
    assert "access-control-allow-origin" not in browse(f"{server.url}/v1/models", "GET", origin=PAGE)[1]
