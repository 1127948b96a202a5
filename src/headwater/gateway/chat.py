"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from headwater.gateway.calls import Answer, Argued, Called, Piece, Said
from headwater.gateway.engine_types import Alternative, GenerationEnded, Token
from headwater.gateway.gate import record_of
from headwater.gateway.generation import Run, answer
from headwater.gateway.limits import read_json
from headwater.gateway.openai_types import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    FunctionDelta,
    Likely,
    Reply,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)
from headwater.gateway.problems import Refusal
from headwater.gateway.requests import Wanted, generations, guide_of, including_usage
from headwater.gateway.served import fingerprint
from headwater.gateway.tools import Tooling, form, read_chat

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
    record = record_of(request)
    _check(asked, gateway.limits.messages)
    usage = including_usage(asked)
    tooling = Tooling(asked.tools or [], asked.tool_choice, asked.parallel_tool_calls is not False)
    wanted_form = form(tooling, asked.response_format)
    prompt = await gateway.tokenize(lambda: read_chat(asked.messages, wanted_form.tools, generator))
    guide = await guide_of(wanted_form, generator, gateway, record)
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    wanted = Wanted(asked.max_completion_tokens or asked.max_tokens, logprobs=top, guide=guide)
    requests = generations(asked, [prompt], wanted, generator, gateway.limits)
    run = Run(generator, requests, request.receive, record, gateway.runs, gateway.limits.deadline, asked.n or 1)
    writer = _Writer(asked.model, usage=usage, calls=wanted_form.calls)
    return await answer(run, writer, record, stream=bool(asked.stream), usage=usage)


def _check(asked: ChatRequest, most: int) -> None:
    """Raises ``Refusal`` for what no single field's type can say."""
    if len(asked.messages) > most:
        raise Refusal(400, f"{len(asked.messages)} messages; this server takes {most}", param="messages")
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal(400, "'top_logprobs' needs 'logprobs': true", param="top_logprobs", slug="invalid_value")


class _Writer:
    """A run as chat completions write it. ``calls``: its answers may call tools."""

    def __init__(self, model: str, *, usage: bool, calls: bool) -> None:
        self._model = model
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._no_usage = None if usage else msgspec.UNSET
        self._calls = calls
        self._begun: dict[int, Answer] = {}

    def event(self, run: Run, number: int, event: Token | GenerationEnded) -> Iterator[ChatChunk]:
        if number not in self._begun:
            self._begun[number] = Answer(calls=self._calls)
            yield self._chunk(run, number, Delta(role="assistant", content=""))
        said = self._begun[number]
        pieces = said.push(event)
        logprobs = _logprobs([event])
        if logprobs and not pieces:
            pieces = [Said("")]
        for piece in pieces:
            yield self._chunk(run, number, _delta(piece), logprobs)
            logprobs = None
        if isinstance(event, GenerationEnded):
            chunk = self._chunk(run, number, Delta())
            chunk.choices[0].finish_reason = said.finish_reason(event)
            yield chunk

    def usage(self, run: Run) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint(run.versions()),
            choices=[],
            usage=run.usage(),
        )

    def whole(self, run: Run, events: Sequence[Sequence[Token | GenerationEnded]]) -> ChatCompletion:
        choices = []
        for number, of_choice in enumerate(events):
            said = Answer(calls=self._calls)
            for event in of_choice:
                said.push(event)
            (*_, end) = of_choice
            calls = [ToolCall(call.id, CalledFunction(call.name, call.arguments)) for call in said.calls]
            reply = Reply(said.text or (None if calls else ""), tool_calls=calls or msgspec.UNSET)
            choices.append(ChatChoice(number, reply, _logprobs(of_choice), said.finish_reason(end)))
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


def _delta(piece: Piece) -> Delta:
    match piece:
        case Said(text):
            return Delta(content=text)
        case Called(number, id_, name):
            began = FunctionDelta(name=name, arguments="")
            return Delta(tool_calls=[ToolCallDelta(number, began, id=id_, type="function")])
        case Argued(number, text):
            return Delta(tool_calls=[ToolCallDelta(number, FunctionDelta(arguments=text))])


def _logprobs(events: Sequence[Token | GenerationEnded]) -> ChatLogprobs | None:
    """Of the tokens among the events; None if they were not asked for."""
    found = logprobs_of(events)
    return ChatLogprobs(found) if found else None


def logprobs_of(events: Sequence[Token | GenerationEnded]) -> list[TokenLogprob]:
    """Of the tokens among the events; empty if they were not asked for."""
    return [_logprob(e.own, e.top) for e in events if isinstance(e, Token) and e.own is not None]


def _logprob(own: Alternative, likeliest: Sequence[Alternative]) -> TokenLogprob:
    top = [Likely(likely.text, likely.logprob, _bytes(likely.text)) for likely in likeliest]
    return TokenLogprob(own.text, own.logprob, _bytes(own.text), top)


def _bytes(text: str) -> list[int] | None:
    """Of a whole text; a token that is half a character has bytes that its text does not show."""
    return None if "\ufffd" in text else list(text.encode())
