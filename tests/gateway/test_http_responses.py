"""The Responses API as the stock client uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest

from headwater.gateway.engine_types import GenerationFailed
from tests.gateway.http_fakes import PATIENCE, FakeEngine, Running, running

SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]}
PAINT: Any = {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}
CALL = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(context=4096)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


def ask(server: Running, **wanted: Any) -> Any:
    with server.client() as client:
        return client.responses.create(**{"model": "toy", "input": "hello", "temperature": 0} | wanted)


def test_a_text(server: Running, engine: FakeEngine) -> None:
    answer = ask(server, instructions="Be brief.", metadata={"a": "b"}, store=False)
    assert answer.output_text == "abcdefghijklmnopqrstuvwxyz"
    assert (answer.status, answer.incomplete_details, answer.store) == ("completed", None, False)
    assert answer.usage.input_tokens == answer.usage.total_tokens - answer.usage.output_tokens > 0
    assert answer.metadata == {"a": "b"}
    assert engine.read[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_an_answer_that_is_cut_off_is_incomplete(server: Running) -> None:
    answer = ask(server, max_output_tokens=3)
    assert (answer.output_text, answer.status) == ("abc", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_a_conversation_with_calls_goes_back_and_forth(server: Running, engine: FakeEngine) -> None:
    engine.says = CALL
    answer = ask(server, tools=[PAINT], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.output
    assert (call.type, call.name, call.arguments, call.status) == (
        "function_call",
        "paint",
        '{"colour": "red"}',
        "completed",
    )
    engine.says = ""
    said = [
        {"role": "user", "content": [{"type": "input_text", "text": "pa"}, {"type": "input_text", "text": "int"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I do.", "annotations": []}],
        },
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    assert ask(server, input=said, tools=[PAINT]).output_text
    assert engine.read[0] == [
        {"role": "user", "content": "paint"},
        {
            "role": "assistant",
            "content": "I do.",
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": "paint", "arguments": {"colour": "red"}},
                }
            ],
        },
        {"role": "tool", "content": "done", "tool_call_id": call.call_id},
    ]
    assert ask(server, input=[*said, *ask(server, input=said).output]).output_text


def test_a_stream_has_the_events_of_its_items(server: Running, engine: FakeEngine) -> None:
    engine.says = "Now:" + CALL
    with server.client() as client, client.responses.stream(model="toy", input="hello", tools=[PAINT]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    deltas = {"response.output_text.delta", "response.function_call_arguments.delta"}
    assert [kind for kind in kinds if kind not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.output_text == "Now:"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert (text, arguments) == ("Now:", '{"colour": "red"}')


def test_events_have_names_and_no_end_mark(server: Running) -> None:
    body = json.dumps({"model": "toy", "input": "a", "temperature": 0, "max_output_tokens": 2, "stream": True}).encode()
    request = Request(f"{server.url}/v1/responses", body, {"content-type": "application/json"})
    with urlopen(request, timeout=PATIENCE) as answer:
        parts = answer.read().decode().strip().split("\n\n")
    for part in parts:
        name, data = part.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert parts[-1].startswith("event: response.incomplete")


def test_logprobs_on_request(server: Running) -> None:
    answer = ask(server, max_output_tokens=2, include=["message.output_text.logprobs"], top_logprobs=2)
    found = answer.output[0].content[0].logprobs
    assert [each.token for each in found] == ["a", "b"]
    assert [each.token for each in found[1].top_logprobs] == ["b", "c"]
    assert not ask(server, max_output_tokens=2).output[0].content[0].logprobs


def test_a_format(server: Running, engine: FakeEngine) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "paint", "schema": SCHEMA, "strict": True}}
    answer = ask(server, text=form, max_output_tokens=3)
    assert "colour" in engine.grammar
    assert answer.text.format.type == "json_schema"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, text={"format": {"type": "json_schema", "name": "paint"}})
    assert refused.value.param == "text.format.schema"


@pytest.mark.parametrize(
    "wanted",
    [
        {"tools": [], "tool_choice": "auto", "include": [], "truncation": "disabled", "background": False},
        {"reasoning": {"effort": None}, "text": {"format": {"type": "text"}}, "previous_response_id": None},
        {
            "instructions": None,
            "metadata": None,
            "top_logprobs": 0,
            "max_tool_calls": 3,
            "text": {"verbosity": "medium"},
        },
    ],
)
def test_neutral_values_are_honoured(server: Running, wanted: dict[str, Any]) -> None:
    assert ask(server, **wanted).output_text == "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
        ({"input": []}, "input"),
        ({"extra_body": {"n": 2}}, "n"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server: Running, wanted: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **wanted)
    assert refused.value.param == param


def test_a_failure_amid_a_stream_is_raised_by_the_client(server: Running, engine: FakeEngine) -> None:
    engine.let(1)
    with server.client() as client:
        stream = client.responses.create(model="toy", input="hello", stream=True)
        engine.failure = GenerationFailed("the model raised RuntimeError; this request was given up")
        engine.go()
        with pytest.raises(openai.APIError, match="given up"):
            list(stream)
