"""Completions as the stock client asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headwater.gateway.completions import _by_text, _logprobs
from headwater.gateway.engine_types import Alternative, Token
from tests.gateway.http_fakes import FakeEngine, Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(slots=4, queue=8)) as found:
        yield found


def ask(server: Running, **wanted: Any) -> Any:
    with server.client() as client:
        answer = client.completions.create(**{"model": "toy", "prompt": "ab"} | wanted)
        return list(answer) if wanted.get("stream") else answer


def test_sixteen_tokens_unless_told_otherwise(server: Running) -> None:
    answer = ask(server, temperature=0)
    assert answer.choices[0].text == "abcdefghijklmnop"
    assert answer.system_fingerprint == "step-100#1"
    assert answer.usage.completion_tokens == 16


def test_many_prompts_and_choices_are_numbered_as_openai_does(server: Running) -> None:
    answer = ask(server, prompt=["one", "two"], n=2, seed=5, echo=True, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["one", "one", "two", "two"]
    assert answer.usage.prompt_tokens == 6


def test_token_ids_are_prompts(server: Running) -> None:
    same = [ask(server, prompt=prompt, seed=1).choices[0].text for prompt in ("ab", [97, 98], [[97, 98]], ["ab"])]
    assert len(set(same)) == 1


def test_a_stream_says_the_same_as_one_piece(server: Running) -> None:
    wanted: Any = {"seed": 2, "max_tokens": 9, "echo": True}
    whole = ask(server, **wanted)
    chunks = ask(server, **wanted, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert whole.choices[0].text.startswith("ab")
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_logprobs(server: Running) -> None:
    (choice,) = ask(server, temperature=0, max_tokens=3, logprobs=2).choices
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert choice.logprobs.token_logprobs == [-0.5] * 3
    assert choice.logprobs.top_logprobs[1] == {"b": -0.5, "c": -1.5}
    chunks = ask(server, temperature=0, max_tokens=3, logprobs=0, stream=True)
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks[:-1]] == [[0], [1], [2]]
    assert chunks[0].choices[0].logprobs.top_logprobs is None


def test_token_ids_are_echoed_as_text(server: Running) -> None:
    answer = ask(server, prompt=[[97, 98], [99]], echo=True, temperature=0, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["abab", "cab"]


@pytest.mark.parametrize("prompt", ["xy", [120, 121], ["xy"], [[120, 121]]])
def test_an_echo_with_logprobs_scores_the_prompt(server: Running, prompt: Any) -> None:
    wanted: Any = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    (choice,) = ask(server, **wanted).choices
    assert choice.text == "xya"
    found = choice.logprobs
    assert found.tokens == ["x", "y", "a"]
    assert found.token_logprobs == [None, -2.0, -0.5]
    assert found.text_offset == [0, 1, 2]
    assert found.top_logprobs == [None, {"a": -1.0, "b": -2.0}, {"a": -0.5, "b": -1.5}]
    first, *rest = ask(server, **wanted, stream=True)
    assert (first.choices[0].text, first.choices[0].logprobs.text_offset) == ("xya", [0, 1, 2])
    assert all(chunk.choices[0].logprobs is None for chunk in rest)


def test_an_echo_without_alternatives(server: Running) -> None:
    for logprobs in (0, None, False):
        (choice,) = ask(server, echo=True, logprobs=logprobs, max_tokens=1, temperature=0).choices
        assert choice.text == "aba"
        if logprobs == 0 and logprobs is not False:
            assert (choice.logprobs.tokens, choice.logprobs.top_logprobs) == (["a", "b", "a"], None)
        else:
            assert choice.logprobs is None


def test_a_prompt_alone_can_be_scored(server: Running) -> None:
    wanted: Any = {"prompt": ["xy", "z"], "echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}
    answer = ask(server, **wanted)
    assert [choice.text for choice in answer.choices] == ["xy", "xy", "z", "z"]
    assert [choice.logprobs.token_logprobs for choice in answer.choices] == [[None, -2.0]] * 2 + [[None]] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 0
    chunks = ask(server, **wanted | {"prompt": "xy", "n": 1}, stream=True)
    assert [chunk.choices[0].text for chunk in chunks] == ["xy"]
    assert ask(server, prompt="xy", max_tokens=0).choices[0].text == ""


def test_of_likely_tokens_with_one_text_the_likeliest_keeps_it() -> None:
    found = _by_text([Alternative(1, "?", -0.5), Alternative(2, "?", -1.0), Alternative(3, "a", -2.0)])
    assert found == {"?": -0.5, "token_id:2": -1.0, "a": -2.0}


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a", 97]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server: Running, wanted: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, **wanted)
    assert refused.value.param == param


def test_a_prompt_that_is_too_long_has_openais_code(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, prompt="x" * 64)
    assert refused.value.code == "context_length_exceeded"


def test_equal_prompts_count_each(server: Running) -> None:
    answer = ask(server, prompt=["one", "one", "three"], n=2, max_tokens=2)
    assert answer.usage.prompt_tokens == 3 + 3 + 5
    *_, last = ask(
        server, prompt=["one", "one"], max_tokens=2, n=3, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage.prompt_tokens == 6


def test_a_token_of_a_text_that_a_likelier_one_has_is_called_by_its_id() -> None:
    half = "\N{REPLACEMENT CHARACTER}"
    likeliest = (Alternative(7, half, -0.1), Alternative(8, "x", -0.5), Alternative(9, half, -2.0))
    token = Token("", 9, Alternative(9, half, -2.0), likeliest)
    found = _logprobs((), [token], 0)
    assert found is not None
    assert found.tokens == ["token_id:9"]
    assert found.top_logprobs == [{half: -0.1, "x": -0.5, "token_id:9": -2.0}]
    first = _logprobs((), [Token("", 7, likeliest[0], likeliest)], 0)
    assert first is not None
    assert first.tokens == [half]
