"""The real engine behind the real server: a tiny random Llama, asked by the stock client while versions change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

pytest.importorskip("transformers")

from headwater.gateway.engine import Engine
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import folder, reference, tokenizer, values
from tests.gateway.http_fakes import PATIENCE, Running, running

HELLO: Any = [{"role": "user", "content": "hello"}]
FREE: Any = {"ignore_eos": True}


@pytest.fixture
def source() -> MemorySource:
    return MemorySource("toy")


@pytest.fixture
def engine(source: MemorySource) -> Engine:
    return Engine(folder(), source, slots=4, queue=16, chunk=16, retry=0.01)


@pytest.fixture
def server(engine: Engine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


def until(engine: Engine, holds: Any) -> None:
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if holds(engine.statistics()):
            return
        tick.wait(0.005)
    raise AssertionError(engine.statistics())


def test_completions_are_those_of_transformers(server: Running) -> None:
    prompt = list(b"a prompt")
    with server.client() as client:
        answer = client.completions.create(
            model="toy", prompt=prompt, temperature=0, max_tokens=12, logprobs=0, extra_body=FREE
        )
        streamed = client.completions.create(
            model="toy", prompt=prompt, temperature=0, max_tokens=12, stream=True, extra_body=FREE
        )
        text = "".join(chunk.choices[0].text for chunk in streamed)
    assert answer.choices[0].text == text
    # Half a character at the end is not text.
    assert text.rstrip("\ufffd") == tokenizer().decode(reference(prompt, 12)).rstrip("\ufffd")
    assert answer.choices[0].logprobs
    assert len(answer.choices[0].logprobs.token_logprobs or ()) == 12
    assert answer.usage
    assert answer.usage.completion_tokens == 12
    assert answer.system_fingerprint == "base#0"


def test_a_seed_draws_the_same_again(server: Running) -> None:
    def ask(seed: int) -> str | None:
        found = client.chat.completions.create(model="toy", messages=HELLO, seed=seed, max_tokens=20, extra_body=FREE)
        return found.choices[0].message.content

    with server.client() as client:
        assert ask(1) == ask(1) != ask(2)


def test_a_prompt_that_does_not_fit(server: Running) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="toy", prompt="x" * 256)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="0 to 259"):
            client.completions.create(model="toy", prompt=[5000])
        answer = client.completions.create(
            model="toy", prompt="x" * 250, max_tokens=100, temperature=0, extra_body=FREE
        )
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_ends_on_its_version_while_the_next_one_answers(
    server: Running, engine: Engine, source: MemorySource
) -> None:
    wanted: Any = {"model": "toy", "messages": HELLO, "temperature": 0, "max_tokens": 200, "extra_body": FREE}
    with server.client() as client:
        alone = client.chat.completions.create(**wanted).choices[0].message.content
        with client.chat.completions.with_streaming_response.create(**wanted, stream=True) as raw:
            assert raw.headers["x-headwater-version"] == "base"
            source.publish(values(1), "trained")
            chunks = list(raw.parse())
        until(engine, lambda seen: seen.version.number == 1)
        after = client.chat.completions.create(**wanted)
    assert {chunk.system_fingerprint for chunk in chunks} == {"base#0"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone
    assert after.system_fingerprint == "trained#1"
    assert after.choices[0].message.content != alone


def test_a_client_that_hangs_up_frees_its_slot(server: Running, engine: Engine) -> None:
    with server.client() as client:
        for _ in range(8):
            stream = client.completions.create(
                model="toy", prompt="a", max_tokens=250, temperature=0, stream=True, extra_body=FREE
            )
            next(iter(stream))
            stream.close()
    until(engine, lambda seen: seen.running == seen.waiting == 0)


def test_many_at_once_while_versions_change(server: Running, source: MemorySource) -> None:
    """No request fails, and each one says which version it is of."""
    answers: list[Any] = []
    failed: list[Exception] = []

    def ask(number: int) -> None:
        try:
            with server.client() as client:
                wanted: Any = {"model": "toy", "prompt": f"prompt {number}", "temperature": 0, "max_tokens": 10}
                answers.extend(client.completions.create(**wanted, extra_body=FREE) for _ in range(3))
        except openai.OpenAIError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for number in (1, 2, 3):
        source.publish(values(number), f"v{number}")
    for thread in threads:
        thread.join(PATIENCE)
    assert not failed
    assert len(answers) == 18
    texts: dict[tuple[str, int], set[str]] = {}
    for answer in answers:
        texts.setdefault((answer.system_fingerprint, answer.usage.prompt_tokens), set()).add(answer.choices[0].text)
    assert {fingerprint for fingerprint, _ in texts} <= {"base#0", "v1#1", "v2#2", "v3#3"}
