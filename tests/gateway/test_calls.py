"""An answer's text taken apart into text and calls, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.gateway.calls import Answer, Argued, Called, Calls, Said
from headwater.gateway.engine_types import GenerationEnded, Token
from tests.gateway.http_fakes import version

END = GenerationEnded("stop", 1, 1, version(1))


def call(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def read(pieces: list[str]) -> Answer:
    answer = Answer(calls=True)
    for piece in pieces:
        answer.push(Token(piece, 0))
    answer.push(END)
    return answer


TRICKY = {"a": "}\n</tool_call>", "b": {"c": [{}, "<tool_call>"]}, "d": "ü"}


@given(st.lists(st.integers(0, 200), max_size=12))
def test_any_cut_gives_the_same(cuts: list[int]) -> None:
    text = f"I paint.<tool{call('paint', TRICKY)}\n{call('g', {})} \n"
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    answer = read([text[a:b] for a, b in itertools.pairwise(places)])
    assert answer.text == "I paint.<tool"
    assert [(each.name, json.loads(each.arguments)) for each in answer.calls] == [("paint", TRICKY), ("g", {})]
    assert len({each.id for each in answer.calls}) == 2
    assert answer.finish_reason(END) == "tool_calls"


def test_arguments_are_passed_on_as_they_come() -> None:
    calls = Calls()
    assert calls.push("yes <tool_call") == [Said("yes ")]
    (begun,) = calls.push('>\n{"name": "f", "arguments": ')
    assert isinstance(begun, Called)
    assert (begun.number, begun.name) == (0, "f")
    assert calls.push('{"x": 1}') == [Argued(0, '{"x": 1')]
    assert calls.push("}\n</tool_call>") == [Argued(0, "}")]
    assert calls.flush() == []


@pytest.mark.parametrize("text", ["a < b", "<tool_cal", "<tool_call>\n{", '<tool_call>\n{"name": "f", "argu'])
def test_what_is_no_call_is_text(text: str) -> None:
    answer = read(list(text))
    assert (answer.text, answer.calls) == (text, [])
    assert answer.finish_reason(END) == "stop"


def test_arguments_that_are_cut_off_are_shown_as_they_are() -> None:
    cut = GenerationEnded("length", 1, 1, version(1))
    answer = Answer(calls=True)
    answer.push(Token('<tool_call>\n{"name": "f", "arguments": {"x": {}', 0))
    answer.push(cut)
    assert [(each.name, each.arguments) for each in answer.calls] == [("f", '{"x": {}')]
    assert answer.finish_reason(cut) == "length"


def test_without_tools_a_tag_is_text() -> None:
    answer = Answer(calls=False)
    answer.push(Token(call("f", {}), 0))
    assert (answer.text, answer.calls) == (call("f", {}), [])
