"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from headwater.gateway.engine_types import Alternative, Finished, Token
from headwater.gateway.gate import record_of
from headwater.gateway.generation import Run, answer
from headwater.gateway.limits import read_json
from headwater.gateway.openai_types import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    Likely,
    Reply,
    TokenLogprob,
)
from headwater.gateway.problems import Refusal
from headwater.gateway.requests import finish_reason, generations, including_usage, text_of
from headwater.gateway.served import fingerprint

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from headwater.gateway.gateway import Gateway

_DECODER = msgspec.json.Decoder(ChatRequest)


async def chat_completions(request: Request, gateway: Gateway) -> Response:
    """Answer a chat."""
    asked = await read_json(request, _DECODER, gateway.limits)
    gateway.served.must_be(asked.model)
    generator = gateway.served.generator()
    _check(asked, gateway.limits.messages)
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in asked.messages
    ]
    prompt = await gateway.tokenize(lambda: generator.apply_chat_template(messages))
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    most = asked.max_completion_tokens or asked.max_tokens
    wanted = generations(asked, [tuple(prompt)], most, top, gateway.limits)
    usage = including_usage(asked)
    record = record_of(request)
    run = Run(generator, wanted, request.receive, record, gateway.runs, gateway.limits.deadline)
    return await answer(run, _Writer(asked.model, usage), record, stream=bool(asked.stream), usage=usage)


def _check(asked: ChatRequest, most: int) -> None:
    """Raises ``Refusal`` for what no single field's type can say."""
    if len(asked.messages) > most:
        raise Refusal(400, f"{len(asked.messages)} messages; this server takes {most}", param="messages")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal(400, "'top_logprobs' needs 'logprobs': true", param="top_logprobs", slug="invalid_value")


class _Writer:
    """A run as chat completions write it."""

    def __init__(self, model: str, usage: bool) -> None:
        self._model = model
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._no_usage = None if usage else msgspec.UNSET
        self._begun: set[int] = set()

    def event(self, run: Run, number: int, event: Token | Finished) -> Iterator[ChatChunk]:
        if number not in self._begun:
            self._begun.add(number)
            yield self._chunk(run, number, Delta(role="assistant", content=""))
        if isinstance(event, Finished):
            chunk = self._chunk(run, number, Delta())
            chunk.choices[0].finish_reason = finish_reason(event)
            yield chunk
        elif event.text or event.own is not None:
            yield self._chunk(run, number, Delta(content=event.text), _logprobs([event]))

    def usage(self, run: Run) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint(run.versions()),
            choices=[],
            usage=run.usage(),
        )

    def whole(self, run: Run, events: Sequence[Sequence[Token | Finished]]) -> ChatCompletion:
        choices = []
        for number, of_choice in enumerate(events):
            (*_, end) = of_choice
            reply = Reply(text_of(of_choice))
            choices.append(ChatChoice(number, reply, _logprobs(of_choice), finish_reason(end)))
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint(run.versions()),
            choices=choices,
            usage=run.usage(),
        )

    def _chunk(self, run: Run, number: int, delta: Delta, logprobs: ChatLogprobs | None = None) -> ChatChunk:
        version = run.choices[number].version
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint([version] if version else []),
            choices=[ChunkChoice(number, delta, logprobs, None)],
            usage=self._no_usage,
        )


def _logprobs(events: Sequence[Token | Finished]) -> ChatLogprobs | None:
    """Of the tokens among the events; None if they were not asked for."""
    found = [_logprob(e.own, e.top) for e in events if isinstance(e, Token) and e.own is not None]
    return ChatLogprobs(found) if found else None


def _logprob(own: Alternative, likeliest: Sequence[Alternative]) -> TokenLogprob:
    top = [Likely(likely.text, likely.logprob, _bytes(likely.text)) for likely in likeliest]
    return TokenLogprob(own.text, own.logprob, _bytes(own.text), top)


def _bytes(text: str) -> list[int] | None:
    """Of a whole text; a token that is half a character has bytes that its text does not show."""
    return None if "\ufffd" in text else list(text.encode())
