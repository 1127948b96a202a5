"""The served OpenAPI document, and a fuzzer that takes it at its word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import msgspec
import pytest
import schemathesis
import schemathesis.checks
import torch
from hypothesis import HealthCheck, settings
from schemathesis import Case

from headwater.gateway import openai_types
from headwater.gateway.app import ROUTES, make_app
from headwater.gateway.limits import Limits
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.openapi import OPERATIONS
from headwater.gateway.predict import ModulePredictor
from headwater.gateway.problems import ErrorAnswer, Refusal
from headwater.gateway.served import Served
from headwater.gateway.tensors import SAFETENSORS
from tests.gateway.http_fakes import PATIENCE, FakeEngine, Running, running

FEW = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def _document() -> dict[str, Any]:
    """The served one, but for the model's name: a random one is a 404 and nothing more."""
    found: dict[str, Any] = make_app(Served("toy")).state.gateway.document
    schemas = found["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "ResponseRequest", "TokenizeRequest"):
        schemas[name]["properties"]["model"] = {"enum": ["toy"]}
    return found


@schemathesis.serializer(SAFETENSORS)
def _as_it_is(context: Any, value: Any) -> bytes:
    del context
    return value if isinstance(value, bytes) else str(value).encode()


# A document cannot say that "top_logprobs" needs "logprobs", or what shape a module takes: such requests are right by
# the document and refused. All other checks hold.
EXCEPT: list[Any] = [schemathesis.checks.positive_data_acceptance]

schema = schemathesis.openapi.from_dict(_document())


@pytest.fixture(scope="module")
def generator() -> Iterator[Running]:
    with running(FakeEngine(slots=4, queue=200, context=4096), Limits(max_tokens=30)) as found:
        yield found


@pytest.fixture(scope="module")
def predictor() -> Iterator[Running]:
    with running(ModulePredictor(Live(torch.nn.Linear(3, 2).eval(), Still("toy")))) as found:
        yield found


def test_every_route_is_described() -> None:
    assert set(ROUTES) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("path", "kind", "wanted"),
    [
        ("completions", openai_types.Completion, {"prompt": "a", "logprobs": 2}),
        ("completions", openai_types.Completion, {"prompt": "a", "logprobs": 1, "stream": True}),
        ("chat/completions", openai_types.ChatCompletion, {"logprobs": True, "top_logprobs": 2}),
        ("chat/completions", openai_types.ChatChunk, {"logprobs": True, "top_logprobs": 2, "stream": True}),
    ],
)
def test_answers_are_of_the_types_in_the_document(
    generator: Running, path: str, kind: type[msgspec.Struct], wanted: dict[str, Any]
) -> None:
    """Struct by struct, for what the fuzzer seldom asks for: an answer is written unchecked."""
    messages = {"messages": [{"role": "user", "content": "a"}]} if path.startswith("chat") else {}
    body = msgspec.json.encode({"model": "toy", "max_tokens": 3, **messages, **wanted})
    request = Request(f"{generator.url}/v1/{path}", body, {"content-type": "application/json"})
    with urlopen(request, timeout=PATIENCE) as answer:
        sent = answer.read().decode()
    parts = [part.removeprefix("data: ") for part in sent.strip().split("\n\n") if part != "data: [DONE]"]
    found = [msgspec.json.decode(part, type=kind) for part in parts]
    assert [msgspec.json.encode(each).decode() for each in found] == parts


def test_an_error_holds_whatever_somebody_said() -> None:
    answer = Refusal(400, "half of a pair \ud800" + "x" * 10_000, param="\udfff").response()
    said = msgspec.json.decode(answer.body, type=ErrorAnswer)
    assert said.error.message.startswith("half of a pair ?xx")
    assert len(answer.body) < 1000


@schema.parametrize()
@FEW
def test_a_language_model_keeps_to_the_document(case: Case, generator: Running) -> None:
    case.call_and_validate(base_url=generator.url, excluded_checks=EXCEPT)


@schema.include(path_regex="predict|embeddings").parametrize()
@FEW
def test_another_module_keeps_to_the_document(case: Case, predictor: Running) -> None:
    case.call_and_validate(base_url=predictor.url, excluded_checks=EXCEPT)
