"""The engine on tiny random models: what comes out of a batch is what comes out alone."""

from __future__ import annotations

import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from headwater.errors import UsageError
from headwater.gateway.engine import Engine, EngineHandle
from headwater.gateway.engine_types import (
    EngineClosed,
    GenerationFailed,
    GenerationRequest,
    PromptInvalid,
    PromptTooLong,
    QueueFull,
)
from headwater.gateway.hf import ModelFolder
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import CONFIGS, EOS, Client, ask, folder, greedy, prompts, reference


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return folder()


@pytest.fixture
def engine(model: ModelFolder) -> Iterator[Engine]:
    made = Engine(model, MemorySource("tiny"), slots=4, queue=32, chunk=16)
    yield made
    made.close()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_gives_the_tokens_that_generate_gives(kind: str) -> None:
    model = folder(kind)
    asked = [(p, 5 + 7 * (i % 5)) for i, p in enumerate(prompts(12))]
    engine = Engine(model, MemorySource(kind), slots=4, chunk=16)
    clients = [ask(engine, greedy(prompt, count))[0] for prompt, count in asked]
    for client in clients:
        client.wait()
    engine.close()
    for client, (prompt, count) in zip(clients, asked, strict=True):
        assert client.ids == reference(prompt, count, kind=kind)
        end = client.finished()
        assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("length", len(prompt), count)


def test_requests_join_a_batch_that_runs(model: ModelFolder, engine: Engine) -> None:
    late = Client()
    early, _ = ask(
        engine, greedy(b"early", 30), Client(lambda n: engine.submit(greedy(b"late", 5), late) if n == 10 else None)
    )
    assert late.finished().completion_tokens == 5
    assert early.finished().completion_tokens == 30
    assert early.ids == reference(b"early", 30)
    assert late.ids == reference(b"late", 5)


def test_a_long_prompt_is_read_between_the_tokens_of_others(model: ModelFolder, engine: Engine) -> None:
    order: list[str] = []
    long = tuple(i % 251 for i in range(160))
    late = Client(lambda _: order.append("long"))

    def short(n: int) -> None:
        order.append("short")
        if n == 1:
            engine.submit(greedy(long, 3), late)

    early = Client(short)
    engine.submit(greedy(b"short", 40), early)
    late.wait()
    early.wait()
    # 160 tokens in chunks of 16: the running answer got a token after each.
    assert order.index("long") >= 10
    assert late.ids == reference(long, 3)


def test_an_end_token_ends_and_is_not_text(model: ModelFolder) -> None:
    ids = reference(b"q", 40)
    at = next(i for i, token in enumerate(ids) if i > 2 and ids.index(token) == i and model.decode([token]).isalpha())
    ending = folder()
    assert ending.eos == {EOS}
    ending.eos = frozenset({ids[at]})
    engine = Engine(ending, MemorySource("tiny"))
    client, _ = ask(engine, greedy(b"q", 60, ignore_eos=False))
    on, _ = ask(engine, greedy(b"q", at + 1))
    end = client.finished()
    assert on.finished().reason == "length"
    engine.close()
    assert (end.reason, client.ids) == ("stop", ids[: at + 1])
    # The answer that went on shows a character that never became whole, once it was known that it would not.
    whole = on.text.replace("\N{REPLACEMENT CHARACTER}", "")
    assert whole == client.text.replace("\N{REPLACEMENT CHARACTER}", "") + model.decode([ids[at]])


def test_a_stop_text_ends_and_is_not_shown(model: ModelFolder, engine: Engine) -> None:
    whole, _ = ask(engine, greedy(b"tell me", 60))
    whole.wait()
    stop = whole.text[9:12]
    client, _ = ask(engine, greedy(b"tell me", 60, stop=("never to be seen", stop)))
    assert client.finished().reason == "stop"
    assert client.text == whole.text[: whole.text.index(stop)]
    assert not any(stop[0] == token.text for token in client.tokens[-3:])


def rigged(answer: list[int]) -> ModelFolder:
    """A model that says these tokens."""
    model = folder()

    class Said(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, model.vocabulary)
            for row, places in enumerate(position_ids.tolist()):
                for column, place in enumerate(places):
                    logits[row, column, answer[min(max(place, 0), len(answer) - 1)]] = 9.0
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    said: Any = Said()
    said.weight = torch.nn.Parameter(torch.zeros(1))
    model.module = said
    return model


def told(answer: str | list[int], **options: Any) -> Client:
    ids = folder().encode(answer) if isinstance(answer, str) else answer
    engine = Engine(rigged(list(ids)), MemorySource("rigged"), slots=2)
    client, _ = ask(engine, greedy([0], **{"count": len(ids), **options}))
    client.wait()
    engine.close()
    return client


@pytest.mark.parametrize("stop", ["<user>", "<user>a", "b<user>", "b<user>ac", "<eos>"])
def test_a_special_token_is_a_stop_text(stop: str) -> None:
    answer = [*folder().encode("ab"), *folder().encode(stop.lstrip("b") + "more")]
    client = told(answer, stop=(stop,))
    assert client.finished().reason == "stop"
    assert client.text == ("a" if stop.startswith("b") else "ab")
    assert told(answer, stop=("nothing",)).text == folder().decode(answer)


@pytest.mark.parametrize("left", ["ü", "🎈"])
def test_what_is_half_a_character_at_the_end_is_not_lost(left: str) -> None:
    model = folder()
    whole = model.encode(f"aé{left}")
    for cut in range(1, len(whole) + 1):
        # By the limit of tokens, by an end token, with a stop text that never comes.
        for client in (
            told(list(whole[:cut])),
            told([*whole[:cut], EOS], ignore_eos=False),
            told(list(whole[:cut]), stop=("never",)),
        ):
            assert client.text == model.decode(whole[:cut])
    assert told(list(whole), stop=(left,)).text == "aé"


def test_a_deadline_gives_what_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = folder().encode("ab###\n" * 9)
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter, time=time.time)
    monkeypatch.setattr("headwater.gateway.engine.time", clock)
    engine = Engine(rigged(list(answer)), MemorySource("rigged"))
    client = Client(lambda n: now.__setitem__(0, 2.0 if n == 4 else 0.0))
    engine.submit(greedy([0], len(answer), stop=("####",), deadline=1.0), client)
    end = client.finished()
    engine.close()
    assert (end.reason, end.completion_tokens) == ("deadline", 4)
    assert (client.text, end.text) == ("ab", "##")


def test_the_context_ends_an_answer(model: ModelFolder, engine: Engine) -> None:
    prompt = tuple(range(200))
    client, _ = ask(engine, greedy(prompt, 1000))
    end = client.finished()
    assert (end.reason, end.completion_tokens) == ("length", model.context - 200)
    assert client.ids == reference(prompt, model.context - 200)


def test_a_seed_draws_the_same_tokens_in_any_company(engine: Engine) -> None:
    def request(seed: int) -> GenerationRequest:
        return GenerationRequest(tuple(b"dice"), 20, temperature=0.9, top_p=0.9, top_k=50, seed=seed, ignore_eos=True)

    alone, _ = ask(engine, request(7))
    alone.wait()
    crowd = [ask(engine, request(seed))[0] for seed in (1, 7, 2, 7)]
    drawn = [(client.wait(), client.ids)[1] for client in crowd]
    assert drawn[1] == drawn[3] == alone.ids
    assert drawn[0] != drawn[2] != alone.ids


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "top_p": 0.95}])
def test_in_half_precision_company_changes_no_bit(kind: str, options: dict[str, Any]) -> None:
    def request(prompt: tuple[int, ...]) -> GenerationRequest:
        return GenerationRequest(prompt, 24, ignore_eos=True, logprobs=3, **options)

    made = folder(kind)
    made.module.bfloat16()
    asked = [request(prompt) for prompt in [*prompts(7), (5,), tuple(range(40))]]
    engine = Engine(made, MemorySource(kind), slots=8, chunk=16)
    alone = []
    for each in asked:
        alone.append(ask(engine, each)[0])
        alone[-1].wait()
    company = [ask(engine, each)[0] for each in asked]
    for client in company:
        client.wait()
    engine.close()
    assert [client.tokens for client in company] == [client.tokens for client in alone]


def test_logprobs_and_alternatives(model: ModelFolder, engine: Engine) -> None:
    client, _ = ask(engine, greedy(b"odds", 4, logprobs=3))
    client.wait()
    with torch.inference_mode():
        logits = model.module(torch.tensor([[*b"odds", *client.ids[:-1]]])).logits[0, 3:]
    expected = logits.log_softmax(-1)
    for token, row in zip(client.tokens, expected, strict=True):
        assert token.own is not None
        assert (token.own.id, token.own.text) == (token.id, model.decode([token.id]))
        assert token.own.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [a.id for a in token.top] == row.topk(3).indices.tolist()
        assert token.top[0].id == token.id


def test_a_client_that_hangs_up_frees_its_slot(model: ModelFolder) -> None:
    engine = Engine(model, MemorySource("tiny"), slots=1)
    handles: list[EngineHandle] = []
    first = Client(lambda n: handles[0].cancel() if n == 3 else None)
    second = Client()

    def both(_: int) -> None:
        if not handles:
            handles.append(engine.submit(greedy(b"endless", 200), first))
            engine.submit(greedy(b"next", 4), second)

    ask(engine, greedy(b"start", 1), Client(both))
    assert (first.finished().reason, first.finished().completion_tokens) == ("cancelled", 3)
    assert second.finished().reason == "length"
    assert second.ids == reference(b"next", 4)
    engine.close()


def test_a_deadline_ends_those_that_run_and_those_that_wait(model: ModelFolder) -> None:
    engine = Engine(model, MemorySource("tiny"), slots=1)
    past = time.monotonic() - 1
    late, _ = ask(engine, greedy(b"late", 5, deadline=past))
    end = late.finished()
    assert (end.reason, end.completion_tokens, end.version) == ("deadline", 0, engine.version)
    assert engine.statistics().finished == {"deadline": 1}
    engine.close()


def test_a_full_queue_refuses(model: ModelFolder) -> None:
    engine = Engine(model, MemorySource("tiny"), slots=1, queue=2)
    refused: list[QueueFull] = []
    waiting = [Client() for _ in range(3)]

    def fill(n: int) -> None:
        if n == 1:
            for client in waiting:
                try:
                    engine.submit(greedy(b"wait", 2), client)
                except QueueFull as error:
                    refused.append(error)

    running, _ = ask(engine, greedy(b"run", 4), Client(fill))
    running.wait()
    assert len(refused) == 1
    assert "nothing was queued" in str(refused[0])
    assert [client.finished().reason for client in waiting[:2]] == ["length", "length"]
    engine.close()


def test_prompts_that_cannot_be_run(model: ModelFolder, engine: Engine) -> None:
    with pytest.raises(PromptTooLong, match="300 tokens"):
        engine.submit(greedy([1] * 300, 1), Client())
    with pytest.raises(PromptInvalid, match="no tokens"):
        engine.submit(greedy([], 1), Client())
    with pytest.raises(PromptInvalid, match="0 to 259"):
        engine.submit(greedy([260], 1), Client())
    with pytest.raises(UsageError, match="temperature"):
        GenerationRequest((1,), 1, temperature=float("nan"))


def test_a_forward_that_raises_fails_its_requests_and_no_other(model: ModelFolder, engine: Engine) -> None:
    class Angry(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if (ids == 66).any():
                raise RuntimeError("not this one")
            return self.inner(ids)  # type: ignore[no-any-return]

    body: Any = model.module.model
    embedding = body.embed_tokens
    body.embed_tokens = Angry(embedding)
    try:
        bad = Client()
        good, _ = ask(
            engine, greedy(b"aaa", 20), Client(lambda n: engine.submit(greedy([1, 66], 5), bad) if n == 4 else None)
        )
        assert isinstance(bad.error(), GenerationFailed)
        assert "not this one" in str(bad.error())
        assert good.finished().reason == "length"
    finally:
        body.embed_tokens = embedding
    assert good.ids == reference(b"aaa", 20)
    assert engine.statistics().finished == {"failed": 1, "length": 1}


def test_a_listener_that_raises_harms_only_itself(model: ModelFolder, engine: Engine) -> None:
    def broken(event: object) -> None:
        raise ValueError("gone")

    engine.submit(greedy(b"x", 50), broken)
    client, _ = ask(engine, greedy(b"fine", 10))
    client.wait()
    assert client.ids == reference(b"fine", 10)
    assert engine.statistics().tokens_generated < 50


def test_closing_tells_those_that_run_and_those_that_wait(model: ModelFolder) -> None:
    source = MemorySource("tiny")
    engine = Engine(model, source, slots=1)
    clients = [ask(engine, greedy(b"x", 200))[0] for _ in range(3)]
    engine.close()
    ends = [client.wait() for client in clients]
    assert any(not hasattr(end, "reason") for end in ends)
    assert isinstance(clients[-1].error(), EngineClosed)
    with pytest.raises(EngineClosed):
        engine.submit(greedy(b"x", 1), Client())
    assert source.leases == {}
    engine.close()


def test_statistics(model: ModelFolder, engine: Engine) -> None:
    seen = []
    client, handle = ask(engine, greedy(b"abc", 5), Client(lambda n: seen.append(engine.statistics())))
    client.wait()
    assert (seen[2].running, seen[2].waiting, seen[2].slots) == (1, 0, 4)
    assert (seen[4].prompt_tokens, seen[4].tokens_generated, seen[4].versions) == (3, 5, (0,))
    assert 0 < seen[2].cache_bytes <= seen[2].cache_bound
    assert seen[2].cache_bound == 2 * 4 * 256 * (2 * 2 * 2 * 8 * 4)  # layers, keys and values, heads, width, bytes
    assert handle.version == engine.version


def test_a_conversation_becomes_a_prompt(engine: Engine) -> None:
    prompt = engine.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == (258, *engine.encode("hi"), 259)
    with pytest.raises(PromptInvalid, match="refuses"):
        engine.apply_chat_template([3])  # type: ignore[list-item]
