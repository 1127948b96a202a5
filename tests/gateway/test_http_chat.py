"""Chat completions as the stock client asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.http_fakes import FakeEngine, Running, running

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


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
