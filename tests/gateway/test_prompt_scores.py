"""How likely a prompt's own tokens are: as the plain forward says, in whatever pieces it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwater.gateway.engine import Engine
from headwater.gateway.engine_types import Event, PromptRead, PromptTooLong
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import Client, folder, greedy, prompts


class Scored(Client):
    """Keeps the prompt's scores too."""

    read: PromptRead | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, PromptRead):
            assert not self.tokens
            self.read = event
        else:
            super().__call__(event)


def scored(engine: Engine, prompt: tuple[int, ...], most: int, count: int = 2) -> Scored:
    client = Scored()
    engine.submit(greedy(prompt, most, prompt_logprobs=count, logprobs=count), client)
    return client


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_they_are_those_of_one_plain_forward(kind: str, chunk: int) -> None:
    engine = Engine(folder(kind), MemorySource("toy"), slots=3, chunk=chunk)
    module: Any = folder(kind).module
    asked = [(7,), *prompts(5)]
    try:
        clients = [scored(engine, prompt, most) for prompt in asked for most in (0, 4)]
        for number, client in enumerate(clients):
            prompt, most = asked[number // 2], (0, 4)[number % 2]
            assert client.finished().reason == "length"
            assert len(client.tokens) == most
            assert client.read is not None
            with torch.inference_mode():
                logprobs = module(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            first, *rest = client.read.tokens
            assert (first.id, first.logprob, first.top) == (prompt[0], None, ())
            assert [token.id for token in rest] == list(prompt[1:])
            expected = [float(logprobs[place, token]) for place, token in enumerate(prompt[1:])]
            assert [token.logprob for token in rest] == pytest.approx(expected, abs=1e-3)
            for place, token in enumerate(rest):
                assert [each.logprob for each in token.top] == pytest.approx(
                    logprobs[place].topk(2).values.tolist(), abs=1e-3
                )
    finally:
        engine.close()


def test_their_texts_make_the_prompt() -> None:
    model = folder()
    engine = Engine(model, MemorySource("toy"), slots=1, chunk=4)
    try:
        prompt = model.encode("a ü €")
        client = scored(engine, prompt, 0)
        client.wait()
        assert client.read is not None
        assert "".join(token.text for token in client.read.tokens) == "a ü €"
        cut = scored(engine, prompt[:-1], 0)
        cut.wait()
        assert cut.read is not None
        assert "".join(token.text for token in cut.read.tokens) == model.decode(prompt[:-1])
    finally:
        engine.close()


def test_special_tokens_have_names_and_no_text() -> None:
    model = folder()
    engine = Engine(model, MemorySource("toy"), slots=1)
    try:
        client = scored(engine, model.encode("<user>a<eos>"), 0)
        client.wait()
        assert client.read is not None
        assert [(token.text, token.alone) for token in client.read.tokens] == [
            ("", "<user>"),
            ("a", "a"),
            ("", "<eos>"),
        ]
    finally:
        engine.close()


def test_a_prompt_alone_may_fill_the_context() -> None:
    engine = Engine(folder(context=16), MemorySource("toy"), slots=1, chunk=64)
    try:
        client = scored(engine, tuple(range(16)), 0)
        assert client.finished().completion_tokens == 0
        with pytest.raises(PromptTooLong):
            scored(engine, tuple(range(16)), 1)
        with pytest.raises(PromptTooLong):
            scored(engine, tuple(range(17)), 0)
    finally:
        engine.close()
