"""Requests and answers of /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from headwater.gateway.openai_types import Message, Model, TokenId, Tool


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize. Either ``prompt`` or ``messages``.

    ``add_special_tokens``: with those that the tokenizer puts around a text; default: of a prompt yes, of messages no,
    as their template has them. ``add_generation_prompt``: with what announces an answer to the messages.
    """

    model: Model | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False


class Tokenized(msgspec.Struct):
    """``max_model_len``: tokens that the model holds; ``token_strs``: each one's text, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: Model | None = None


class Detokenized(msgspec.Struct):
    """The text of tokens, special ones among them."""

    prompt: str
