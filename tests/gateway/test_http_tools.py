"""Tools and formats as the stock client asks for them: what is told to the model, and what is read from its answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headwater.gateway.engine_types import GrammarInvalid
from headwater.gateway.limits import Limits
from tests.gateway.http_fakes import FakeEngine, Running, Unguided, running

HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paint it.", "parameters": SCHEMA}}
REST = {"type": "function", "function": {"name": "rest"}}
CALLS = (
    'Now:\n<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "rest", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(context=4096)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


def ask(server: Running, **wanted: Any) -> Any:
    with server.client() as client:
        answer = client.chat.completions.create(**{"model": "toy", "messages": HELLO} | wanted)
        return list(answer) if wanted.get("stream") else answer


def test_calls_are_read_from_the_answer(server: Running, engine: FakeEngine) -> None:
    engine.says = CALLS
    answer = ask(server, tools=[PAINT, REST])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Now:\n"
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("paint", '{"colour": "red"}'),
        ("rest", "{}"),
    ]
    engine.says = CALLS.removeprefix("Now:\n")
    assert ask(server, tools=[PAINT, REST]).choices[0].message.content is None


def test_a_stream_says_the_same(server: Running, engine: FakeEngine) -> None:
    engine.says = CALLS
    calls: dict[int, dict[str, str]] = {}
    text, reasons = "", []
    for chunk in ask(server, tools=[PAINT, REST], stream=True, logprobs=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or ():
            if call.id:
                calls[call.index] = {"id": call.id, "name": call.function.name, "type": call.type, "arguments": ""}
            calls[call.index]["arguments"] += call.function.arguments
    assert (text, reasons) == ("Now:\n", ["tool_calls"])
    assert [(calls[i]["name"], calls[i]["arguments"], calls[i]["type"]) for i in (0, 1)] == [
        ("paint", '{"colour": "red"}', "function"),
        ("rest", "{}", "function"),
    ]
    assert calls[0]["id"] != calls[1]["id"]


def test_every_token_of_a_stream_has_its_logprob(server: Running, engine: FakeEngine) -> None:
    engine.says = CALLS
    chunks = ask(server, tools=[PAINT], stream=True, logprobs=True)
    tokens = [each.token for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert "".join(tokens) == CALLS


def test_the_template_is_told_of_tools_calls_and_results(server: Running, engine: FakeEngine) -> None:
    engine.says = CALLS
    said = ask(server, tools=[PAINT, REST]).choices[0].message
    told = [*HELLO, said.model_dump(), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "done"}]
    ask(server, messages=told, tools=[PAINT, REST], max_tokens=3)
    messages, tools = engine.read
    assert [tool["function"]["name"] for tool in tools or ()] == ["paint", "rest"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "paint", "arguments": {"colour": "red"}}
    assert messages[2] == {"role": "tool", "content": "done", "tool_call_id": said.tool_calls[0].id}
    ask(server, tools=[PAINT], tool_choice="none", max_tokens=3)
    assert engine.read[1] is None


@pytest.mark.parametrize(
    ("choice", "starts", "names"),
    [
        ("auto", "start: spoken* said", ["paint", "rest"]),
        ("required", "start: asks", ["paint", "rest"]),
        ({"type": "function", "function": {"name": "rest"}}, "start: asks", ["rest"]),
    ],
)
def test_the_grammar_is_that_of_the_choice(
    server: Running, engine: FakeEngine, choice: Any, starts: str, names: list[str]
) -> None:
    ask(server, tools=[PAINT, REST], tool_choice=choice, max_tokens=1)
    assert starts in engine.grammar
    assert [name for name in ("paint", "rest") if f'\\"{name}\\"' in engine.grammar] == names


def test_one_call_alone(server: Running, engine: FakeEngine) -> None:
    ask(server, tools=[PAINT], tool_choice="required", parallel_tool_calls=False, max_tokens=1)
    assert "asks: asked\n" in engine.grammar
    ask(server, tools=[PAINT], tool_choice="required", max_tokens=1)
    assert "asks: asked (" in engine.grammar


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "sing"}}}, "tool_choice"),
        ({"tools": [PAINT, PAINT]}, "tools"),
        ({"tools": [PAINT], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(server: Running, wanted: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **wanted)
    assert refused.value.param == param


def test_a_schema_that_cannot_be_held_is_refused(server: Running, engine: FakeEngine) -> None:
    def refuse(grammar: str) -> Unguided:
        raise GrammarInvalid(f"no answer can be held to {len(grammar)} characters")

    engine.guide = refuse  # type: ignore[method-assign]
    for wanted, param in (
        ({"tools": [PAINT]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ):
        with pytest.raises(openai.BadRequestError, match="no answer") as refused:
            ask(server, **wanted)
        assert (refused.value.param, refused.value.code) == (param, "invalid_schema")


def test_what_of_a_schema_is_not_enforced_is_named(engine: FakeEngine) -> None:
    def warn(grammar: str) -> Unguided:
        engine.grammar = grammar
        guide = Unguided()
        guide.warnings = ['Unimplemented keys: ["uniqueItems"]']
        return guide

    engine.guide = warn  # type: ignore[method-assign]
    with running(engine) as server, server.client() as client:
        raw = client.chat.completions.with_raw_response.create(model="toy", messages=HELLO, tools=[PAINT], max_tokens=1)  # type: ignore[list-item]
        assert "tools (Unimplemented keys" in raw.headers["x-headwater-ignored"]
        assert '"lenient": true' in engine.grammar
    with running(engine, Limits(strict=True)) as server, pytest.raises(openai.BadRequestError) as refused:
        ask(server, tools=[PAINT])
    assert refused.value.code == "invalid_schema"
