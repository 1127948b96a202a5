"""Chat completions as the stock client asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headwater.gateway.engine_types import GenerationFailed
from tests.gateway.http_fakes import FakeEngine, Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(slots=4, queue=8)) as found:
        yield found


@pytest.fixture
def engine() -> FakeEngine:
    """For tests that stop or change it."""
    return FakeEngine()


@pytest.fixture
def held(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


def ask(server: Running, **wanted: Any) -> Any:
    with server.client() as client:
        return client.chat.completions.create(**{"model": "toy", "messages": HELLO} | wanted)


def test_an_answer_names_its_version(server: Running) -> None:
    with server.client() as client:
        raw = client.chat.completions.with_raw_response.create(model="toy", messages=HELLO, temperature=0, max_tokens=5)
    answer = raw.parse()
    assert answer.choices[0].message.content == "abcde"
    assert answer.choices[0].finish_reason == "length"
    assert answer.system_fingerprint == "step-100#1"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 5, 13)
    assert raw.headers["x-headwater-version"] == "step-100"
    assert raw.headers["x-headwater-version-number"] == "1"
    assert raw.headers["x-headwater-version-step"] == "100"
    assert "x-headwater-stale" not in raw.headers


def test_a_stream_says_the_same_as_one_piece(server: Running) -> None:
    whole = ask(server, seed=7, max_completion_tokens=20)
    with server.client() as client:
        chunks = list(client.chat.completions.create(
            model="toy", messages=HELLO, seed=7, max_tokens=20, stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.system_fingerprint for chunk in chunks} == {"step-100#1"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streams_header_is_the_version_that_it_began_on(held: Running, engine: FakeEngine) -> None:
    engine.let(2)
    with (
        held.client() as client,
        client.chat.completions.with_streaming_response.create(
            model="toy", messages=HELLO, temperature=0, max_tokens=4, stream=True
        ) as raw,
    ):
        engine.publish(2)
        engine.go()
        assert raw.headers["x-headwater-version"] == "step-100"
        assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in raw.iter_lines() if line]
    assert all('"step-100#1"' in line for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"
    assert ask(held).system_fingerprint == "step-200#2"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_version_that_comes_before_the_head_is_out_is_not_named(
    held: Running, engine: FakeEngine, streamed: bool
) -> None:
    engine.begun = lambda: engine.publish(2)
    with (
        held.client() as client,
        client.chat.completions.with_streaming_response.create(
            model="toy", messages=HELLO, stream=streamed, max_tokens=1
        ) as raw,
    ):
        assert raw.headers["x-headwater-version"] == "step-100"
        assert "step-100#1" in raw.text()


def test_several_choices_of_one_seed_differ_and_can_be_had_again(server: Running) -> None:
    first, again = (ask(server, n=2, seed=3, max_tokens=12) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 2
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[1] == ask(server, seed=4, max_tokens=12).choices[0].message.content
    assert first.usage.prompt_tokens == 8
    assert first.usage.completion_tokens == 24


def test_choices_that_a_new_version_comes_between_name_both(held: Running, engine: FakeEngine) -> None:
    engine.slots = 1
    engine.let(3)
    with held.client() as client:
        stream = client.chat.completions.create(
            model="toy", messages=HELLO, temperature=0, max_tokens=3, n=2, stream=True
        )
        named = {}
        for chunk in stream:
            engine.publish(2)
            engine.go()
            named.setdefault(chunk.choices[0].index, chunk.system_fingerprint)
    assert named == {0: "step-100#1", 1: "step-200#2"}


def test_stop(server: Running) -> None:
    answer = ask(server, temperature=0, max_tokens=20, stop=["zz", "e"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abcd", "stop")


def test_logprobs(server: Running) -> None:
    answer = ask(server, temperature=0, max_tokens=2, logprobs=True, top_logprobs=2)
    (first, second) = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [likely.token for likely in second.top_logprobs] == ["b", "c"]


def test_what_a_client_sends_back_of_an_answer_is_taken(server: Running) -> None:
    answer = ask(server, temperature=0, max_tokens=2)
    said = answer.choices[0].message.model_dump()
    parts = {"role": "user", "content": [{"type": "text", "text": "go"}, {"type": "text", "text": " on"}]}
    again = ask(server, messages=[{"role": "developer", "content": "be brief"}, said, parts], temperature=0)
    assert again.choices[0].message.content == "abcdefghijklmnopqrstuvwxyz"


def test_harmless_fields_are_taken(server: Running) -> None:
    ask(server, max_tokens=1, user="me", metadata={"a": "b"}, store=False, service_tier="auto")


@pytest.mark.parametrize(
    ("wanted", "param", "said"),
    [
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name", "matching"),
        ({"response_format": {"type": "regex"}}, "response_format.type", "regex"),
        ({"temperature": -1}, "temperature", ">= 0"),
        ({"temperature": "hot"}, "temperature", "float"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 65}, "n", "64"),
        ({"max_tokens": 5000}, "max_tokens", "4096"),
        ({"stop": [""]}, "stop[0]", "length >= 1"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": HELLO * 600}, "messages", "512"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role", "length >= 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "image"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "prompt", "context is 64"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server: Running, wanted: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **wanted)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert said in refused.value.message


def test_another_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(server, model="gpt-5")
    assert refused.value.code == "model_not_found"
    assert "'toy'" in refused.value.message


def test_a_failed_forward_is_a_server_error_and_spoils_nothing_else(held: Running, engine: FakeEngine) -> None:
    engine.failure = GenerationFailed("the model raised RuntimeError; this request was given up")
    with pytest.raises(openai.InternalServerError, match="given up"):
        ask(held)
    engine.failure = None
    ask(held, max_tokens=1)


def test_a_failure_amid_a_stream_is_raised_by_the_client(held: Running, engine: FakeEngine) -> None:
    engine.let(1)
    with held.client() as client:
        stream = client.chat.completions.create(model="toy", messages=HELLO, stream=True)
        engine.failure = GenerationFailed("the model raised RuntimeError; this request was given up")
        engine.go()
        with pytest.raises(openai.APIError, match="given up"):
            list(stream)
