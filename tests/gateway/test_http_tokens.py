"""/tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from headwater.gateway.engine import Engine
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.predict import ModulePredictor
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import folder, tokenizer
from tests.gateway.http_fakes import PATIENCE, Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Engine(folder(), MemorySource("toy"), slots=1)) as found:
        yield found


def ask(server: Running, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = json.dumps(body).encode() if body is not None else None
    request = Request(server.url + path, data, {"content-type": "application/json"})
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def test_a_text_there_and_back(server: Running) -> None:
    status, found = ask(server, "/tokenize", {"model": "toy", "prompt": "hi <eos>", "return_token_strs": True})
    assert status == 200
    assert found["tokens"] == tokenizer()("hi <eos>")["input_ids"]
    assert (found["count"], found["max_model_len"]) == (4, 256)
    assert found["token_strs"] == ["h", "i", " ", "<eos>"]
    assert ask(server, "/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": "hi <eos>"})
    assert ask(server, "/tokenize", {"prompt": "hi", "add_special_tokens": False})[1]["token_strs"] is None


def test_a_conversation(server: Running) -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]}
    whole = ask(server, "/tokenize", said)[1]["tokens"]
    assert ask(server, "/detokenize", {"tokens": whole})[1]["prompt"] == "<user>hi<bot>"
    bare = ask(server, "/tokenize", said | {"add_generation_prompt": False})[1]["tokens"]
    assert whole[: len(bare)] == bare
    assert len(whole) == len(bare) + 1


def test_what_the_tokenizer_is(server: Running) -> None:
    status, found = ask(server, "/tokenizer_info")
    assert (status, found["eos_token"], found["bos_token"]) == (200, "<eos>", None)
    assert "add_generation_prompt" in found["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    server: Running, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    found, error = ask(server, path, body)
    assert (found, error["param"]) == (status, param)


def test_another_module_has_no_tokens() -> None:
    with running(ModulePredictor(Live(torch.nn.Linear(1, 1).eval(), Still("toy")))) as server:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []}), ("/tokenizer_info", None)):
            assert ask(server, path, body)[0] == 404
