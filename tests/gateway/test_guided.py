"""Answers of a model that says anything, held to JSON, to schemas and to calls of tools; asked by the stock client."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
import tokenizers
import transformers

from tests.patience import PATIENCE

pytest.importorskip("llguidance")

from headwater.gateway import grammar
from headwater.gateway.engine import Engine
from headwater.gateway.engine_types import GrammarInvalid, GuideMissing
from headwater.gateway.grammar import Callee, Schema
from headwater.gateway.guided import Guides
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import EOS, VOCABULARY, folder, tokenizer
from tests.gateway.http_fakes import Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]


class Paint(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    layers: Literal[1, 2, 3]
    on: bool


SCHEMA: Any = {**Paint.model_json_schema(), "additionalProperties": False}
PAINT: Any = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA, "strict": True}}
REST: Any = {"type": "function", "function": {"name": "rest"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Engine(folder(positions=4096), MemorySource("toy"), slots=4, queue=64, chunk=64)) as found:
        yield found


def ask(server: Running, **wanted: Any) -> Any:
    with server.client(timeout=PATIENCE) as client:
        answer = client.chat.completions.create(**{"model": "toy", "messages": HELLO, "max_tokens": 300} | wanted)
        return list(answer) if wanted.get("stream") else answer


def test_an_answer_is_of_its_schema(server: Running) -> None:
    with server.client(timeout=PATIENCE) as client:
        answer = client.chat.completions.parse(model="toy", messages=HELLO, response_format=Paint, n=4, seed=1)
        found = [choice.message.parsed for choice in answer.choices]
        assert all(isinstance(each, Paint) for each in found)
        assert len({str(each) for each in found}) > 1, "each choice draws for itself"
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        assert isinstance(client.responses.parse(model="toy", input="hi", text_format=Paint).output_parsed, Paint)


@pytest.mark.parametrize(
    "wanted", [{"temperature": 0}, {"seed": 3, "extra_body": {"ignore_eos": True}}, {"top_p": 0.5}]
)
def test_however_it_is_drawn(server: Running, wanted: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
    (choice,) = ask(server, response_format=form, **wanted).choices
    assert Paint.model_validate_json(choice.message.content)
    assert choice.finish_reason == "stop"


def test_any_object(server: Running) -> None:
    for seed in range(4):
        (choice,) = ask(server, response_format={"type": "json_object"}, seed=seed, max_tokens=200).choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("several", [True, False])
def test_a_tool_that_must_be_called_is(server: Running, several: bool) -> None:
    wanted: Any = {"tools": [PAINT, REST], "tool_choice": "required", "parallel_tool_calls": several, "seed": 5}
    (choice,) = ask(server, **wanted).choices
    calls = choice.message.tool_calls
    assert len(calls) == 1 or several
    assert choice.finish_reason == "tool_calls" or several
    whole = calls if choice.finish_reason == "tool_calls" else calls[:-1]
    for call in whole:
        arguments = json.loads(call.function.arguments)
        assert Paint.model_validate(arguments) if call.function.name == "paint" else arguments == {}


def test_the_named_tool_is_called_and_no_other(server: Running) -> None:
    choice = {"type": "function", "function": {"name": "paint"}}
    names = []
    for seed in range(3):
        (found,) = ask(server, tools=[PAINT, REST], tool_choice=choice, seed=seed).choices
        (call,) = found.message.tool_calls
        names.append(call.function.name)
        Paint.model_validate_json(call.function.arguments)
    assert names == ["paint"] * 3


def test_a_streamed_call_is_that_of_one_piece(server: Running) -> None:
    wanted: Any = {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    (call,) = ask(server, **wanted).choices[0].message.tool_calls
    chunks = ask(server, **wanted, stream=True)
    deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(each.function.arguments for each in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_that_may_be_called_leave_the_text_free(server: Running) -> None:
    (choice,) = ask(server, tools=[PAINT], max_tokens=30, seed=1).choices
    assert choice.message.content
    assert choice.message.tool_calls is None


def test_an_answer_in_json_or_a_call(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA, "strict": True}}
    found = [ask(server, tools=[REST], response_format=form, seed=seed).choices[0].message for seed in range(6)]
    assert all(each.tool_calls or Paint.model_validate_json(each.content) for each in found)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strange"}, "Invalid type"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused(server: Running, schema: dict[str, Any], said: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        ask(server, response_format=form)
    assert (refused.value.param, refused.value.code) == ("response_format", "invalid_schema")
    assert "%llguidance" not in refused.value.message


def test_what_is_not_strict_is_held_as_far_as_can_be(server: Running) -> None:
    form: Any = {"name": "x", "schema": {"type": "array", "maxItems": 1, "uniqueItems": True, "items": {"enum": [1]}}}
    with server.client(timeout=PATIENCE) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="toy", messages=HELLO, response_format={"type": "json_schema", "json_schema": form}
        )
    assert json.loads(raw.parse().choices[0].message.content or "") in ([], [1])
    assert "uniqueItems" in raw.headers["x-headwater-ignored"]


def guides() -> Guides:
    return Guides(tokenizer(), VOCABULARY, [EOS])


def may(guide: Any, text: str) -> bool:
    """Whether a guide lets a text through, and an end behind it."""
    for token in (*tokenizer()(text)["input_ids"], EOS):
        if guide.complete:
            return bool(token == EOS)
        if not guide.allowed()[token]:
            return False
        guide.push(token)
    return True


OPEN = "<tool_call>"
CALL = '<tool_call>\n{"name": "paint", "arguments": {"n": 1}}\n</tool_call>'
TOOLS = [Callee("paint", Schema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, True))]


@pytest.mark.parametrize(
    ("made", "taken", "refused"),
    [
        (grammar.lark(None, TOOLS), ["", "hi", CALL, f"hi{CALL} bye", f"{CALL}\n{CALL}"], [OPEN, CALL + OPEN]),
        (grammar.lark(None, TOOLS, several=False), ["hi", CALL, f"hi{CALL}"], [f"{CALL}\n{CALL}"]),
        (grammar.lark(None, TOOLS, "must"), [CALL, f"{CALL}\n{CALL}"], ["", "hi", f"hi{CALL}", f"{CALL}{CALL}"]),
        (grammar.lark(None, TOOLS, "must", several=False), [CALL], ["", "hi", f"{CALL}\n{CALL}"]),
        (grammar.lark(grammar.ANY_OBJECT, TOOLS), [CALL, "{}", '{"a": [1, null]}'], ["", "hi", "[]", '{"a":1}']),
        (grammar.lark(grammar.ANY_OBJECT), ["{}", '{"a": {"b": "ü"}}'], ["", "[]", "{", "{} ", " {}"]),
        (grammar.lark(Schema(True, True)), ["{}", "[1, 2]", "null"], ["", "x"]),
    ],
)  # fmt: skip
def test_what_a_grammar_lets_through(made: str, taken: list[str], refused: list[str]) -> None:
    first = guides().make(made)
    assert [text for text in taken if not may(first.copy(), text)] == []
    assert [text for text in refused if may(first.copy(), text)] == []


def test_special_tokens_are_no_text() -> None:
    allowed = guides().make(grammar.lark(None, TOOLS)).allowed()
    assert allowed[EOS]
    assert not allowed[256]
    assert not allowed[258:].any()


@pytest.mark.parametrize("special", [True, False])
def test_a_tag_that_is_a_token(special: bool) -> None:
    """Qwen's tokenizers have tokens for the tags; a grammar's own texts are cut as the model would cut them."""
    made = tokenizer()
    made.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=special)
    tag = VOCABULARY
    for calls in ("may", "must"):
        guide = Guides(made, VOCABULARY + 2, [EOS]).make(grammar.lark(None, TOOLS, calls))
        first = made("<")["input_ids"] if special else [tag]
        assert guide.allowed()[first].all()
        assert bool(guide.allowed()[tag]) is not special
        plain = tokenizer() if special else made
        for token in plain(CALL)["input_ids"]:
            assert guide.allowed()[token]
            guide.push(token)
    assert made("<tool_call>")["input_ids"] == [tag], "the tokenizer itself is as it was"


def test_texts_of_a_schema_may_look_like_special_tokens() -> None:
    guide = guides().make(grammar.lark(Schema({"enum": ["<eos>"]}, True)))
    for token in tokenizer()('"<')["input_ids"] + tokenizer()("eos>")["input_ids"] + tokenizer()('"')["input_ids"]:
        assert guide.allowed()[token]
        guide.push(token)
    assert guide.complete


def test_a_tokenizer_that_puts_a_blank_before_every_text() -> None:
    """As those of Llama 2, Mistral and Gemma do."""
    words = ["<unk>", "<eos>", "\u2581", *map(chr, range(33, 127)), "\u2581name", "name", "\u2581{", "paint"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -float(len(word) < 3)) for word in words], 0, False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<eos>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")
    guide = Guides(fast, len(words), [1]).make(grammar.lark(Schema({"enum": ["paint name"]}, True)))
    said = b""
    while not guide.complete:
        (token, *_) = guide.allowed().nonzero().flatten().tolist()
        guide.push(token)
        said += words[token].replace("\u2581", " ").encode() if token != 1 else b""
    assert said == b'"paint name"'


def test_a_dead_end_is_an_error() -> None:
    guide = guides().make(grammar.lark(grammar.ANY_OBJECT))
    with pytest.raises(GrammarInvalid, match="given up") as raised:
        guide.push(5)
    assert "<state>" not in str(raised.value)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GuideMissing, match=r"headwater\[serve\]"):
        guides().make(grammar.lark(grammar.ANY_OBJECT))


def test_a_tokenizer_that_it_does_not_know_is_said() -> None:
    with pytest.raises(GuideMissing, match="tokenizer"):
        Guides(object(), VOCABULARY, [EOS]).make(grammar.lark(grammar.ANY_OBJECT))
