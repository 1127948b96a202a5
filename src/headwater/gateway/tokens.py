"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from headwater.gateway.engine_types import PromptInvalid
from headwater.gateway.limits import read_json
from headwater.gateway.problems import Refusal
from headwater.gateway.tokens_types import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from headwater.gateway.tools import Tooling, form, read_chat

if TYPE_CHECKING:
    from starlette.requests import Request

    from headwater.gateway.gateway import Gateway
    from headwater.gateway.served import Generator

_TO = msgspec.json.Decoder(TokenizeRequest)
_FROM = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(request: Request, gateway: Gateway) -> Response:
    """The token ids of a text or a conversation."""
    asked = await read_json(request, _TO, gateway.limits)
    generator = _generator(asked.model, gateway)
    if (asked.prompt is None) == (asked.messages is None):
        raise Refusal(400, "send either 'prompt' or 'messages'", param="prompt", slug="invalid_value")
    if asked.messages is not None and asked.add_special_tokens:
        said = "'add_special_tokens' is for prompts: a conversation's template has its own; leave it out"
        raise Refusal(400, said, param="add_special_tokens", slug="unsupported")
    tokens = await gateway.tokenize(lambda: _tokens(asked, generator))
    strings = None
    if asked.return_token_strs:
        strings = await gateway.tokenize(lambda: [generator.spell([token]) for token in tokens])
    return _json(Tokenized(len(tokens), generator.context, tokens, strings))


def _tokens(asked: TokenizeRequest, generator: Generator) -> list[int]:
    if asked.messages is None:
        return list(generator.encode(asked.prompt or "", special=asked.add_special_tokens is not False))
    tools = form(Tooling(asked.tools or [], "auto", several=True), None).tools
    return list(read_chat(asked.messages, tools, generator, answer=asked.add_generation_prompt is not False))


async def detokenize(request: Request, gateway: Gateway) -> Response:
    """The text of token ids."""
    asked = await read_json(request, _FROM, gateway.limits)
    generator = _generator(asked.model, gateway)
    try:
        return _json(Detokenized(await gateway.tokenize(lambda: generator.spell(asked.tokens))))
    except PromptInvalid as error:
        raise Refusal(400, str(error), param="tokens", slug="invalid_value") from None


async def tokenizer_info(request: Request, gateway: Gateway) -> Response:
    """The tokenizer's class, special tokens and chat template."""
    del request
    return _json(dict(_generator(None, gateway).tokenizer_info()))


def _generator(model: str | None, gateway: Gateway) -> Generator:
    if model is not None:
        gateway.served.must_be(model)
    return gateway.served.generator()


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
