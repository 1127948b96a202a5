"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from headwater.gateway.engine_types import Alternative, GenerationEnded, PromptToken, Token
from headwater.gateway.gate import record_of
from headwater.gateway.generation import Run, answer
from headwater.gateway.limits import read_json
from headwater.gateway.openai_types import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from headwater.gateway.problems import Refusal
from headwater.gateway.requests import Wanted, finish_reason, generations, including_usage, read_prompts, text_of
from headwater.gateway.served import fingerprint

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from headwater.gateway.gateway import Gateway
    from headwater.gateway.served import Generator

_DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(request: Request, gateway: Gateway) -> Response:
    """Continue one prompt or several."""
    asked = await read_json(request, _DECODER, gateway.limits)
    gateway.served.must_be(asked.model)
    generator = gateway.served.generator()
    logprobs = _logprobs_wanted(asked)
    usage = including_usage(asked)
    prompts = await read_prompts(asked.prompt, "prompt", generator.encode, gateway)
    most = 16 if asked.max_tokens is None else asked.max_tokens
    wanted = Wanted(most, logprobs, prompt_logprobs=logprobs if asked.echo else None)
    requests = generations(asked, prompts, wanted, generator, gateway.limits)
    plain = asked.echo and logprobs is None  # else the echo comes token by token
    echoed = await _texts(asked, prompts, generator, gateway) if plain else []
    record = record_of(request)
    run = Run(generator, requests, request.receive, record, gateway.runs, gateway.limits.deadline, asked.n or 1)
    writer = _TextWriter(asked, usage, [text for text in echoed for _ in range(asked.n or 1)])
    return await answer(run, writer, record, stream=bool(asked.stream), usage=usage)


def _logprobs_wanted(asked: CompletionRequest) -> int | None:
    """How many alternatives. Raises ``Refusal`` for what no single field's type can say."""
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        said = "'best_of' is not supported by this server beyond 'n'; leave it out"
        raise Refusal(400, said, param="best_of", slug="unsupported")
    if asked.logprobs is True:
        said = "'logprobs' is a number here: of the likeliest tokens to name, 0 to 5"
        raise Refusal(400, said, param="logprobs", slug="invalid_value")
    return None if asked.logprobs is False else asked.logprobs


async def _texts(
    asked: CompletionRequest, prompts: Sequence[Sequence[int]], generator: Generator, gateway: Gateway
) -> list[str]:
    """The prompts as texts."""
    if isinstance(asked.prompt, str):
        return [asked.prompt]
    texts = [item for item in asked.prompt if isinstance(item, str)]
    return texts or await gateway.tokenize(lambda: [generator.decode(prompt) for prompt in prompts])


class _TextWriter:
    """A run as completions write it. ``echoed``: what each choice begins with; empty for nothing."""

    def __init__(self, asked: CompletionRequest, usage: bool, echoed: Sequence[str]) -> None:
        self._model = asked.model
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._no_usage = None if usage else msgspec.UNSET
        self._echoed = dict(enumerate(echoed))
        self._written: dict[int, int] = {}

    def event(self, run: Run, number: int, event: Token | GenerationEnded) -> Iterator[Completion]:
        begun = number in self._written
        written = self._written.setdefault(number, 0)
        choice = self._choice(run, number, [event], written, begun=begun)
        if not (choice.text or choice.finish_reason or choice.logprobs):
            return
        self._written[number] += len(choice.text)
        version = run.choices[number].version
        yield Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint([version] if version else []),
            choices=[choice],
            usage=self._no_usage,
        )

    def usage(self, run: Run) -> Completion:
        return self._completion(run, [])

    def whole(self, run: Run, events: Sequence[Sequence[Token | GenerationEnded]]) -> Completion:
        return self._completion(
            run, [self._choice(run, number, of_choice, 0, begun=False) for number, of_choice in enumerate(events)]
        )

    def _choice(
        self, run: Run, number: int, events: Sequence[Token | GenerationEnded], written: int, *, begun: bool
    ) -> CompletionChoice:
        """What the events add to a choice of which ``written`` characters are out; its first if it is not ``begun``."""
        read = None if begun else run.choices[number].prompt
        before = read.tokens if read else ()
        echoed = "" if begun else self._echoed.get(number, "") + "".join(token.text for token in before)
        end = finish_reason(events[-1]) if isinstance(events[-1], GenerationEnded) else None
        return CompletionChoice(number, echoed + text_of(events), _logprobs(before, events, written), end)

    def _completion(self, run: Run, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint(run.versions()),
            choices=choices,
            usage=run.usage(),
        )


def _logprobs(
    prompt: Sequence[PromptToken], events: Sequence[Token | GenerationEnded], offset: int
) -> CompletionLogprobs | None:
    """Of a prompt's tokens and those among the events; None if not asked for.

    ``offset``: characters of the text before them.
    """
    tokens = [event for event in events if isinstance(event, Token) and event.own is not None]
    if not (prompt or tokens):
        return None
    found = CompletionLogprobs([], [], [], [])
    top: list[dict[str, float] | None] = []
    for read in prompt:
        found.tokens.append(_name(Alternative(read.id, read.alone, 0.0), read.top))
        found.token_logprobs.append(read.logprob)
        found.text_offset.append(offset)
        top.append(_by_text(read.top) or None)
        offset += len(read.text)
    for token in tokens:
        assert token.own is not None
        found.tokens.append(_name(token.own, token.top))
        found.token_logprobs.append(token.own.logprob)
        found.text_offset.append(offset)
        top.append(_by_text(token.top))
        offset += len(token.text)
    found.top_logprobs = top if any(top) else None
    return found


def _name(own: Alternative, likeliest: Sequence[Alternative]) -> str:
    """A token's text, or what it is called beside a likelier one of the same text: see ``_by_text``."""
    holder = next((each.id for each in likeliest if each.text == own.text), own.id)
    return own.text if holder == own.id else f"token_id:{own.id}"


def _by_text(likeliest: Sequence[Alternative]) -> dict[str, float]:
    """Log-probabilities by text. Where several have one (halves of characters, say), the likeliest keeps it, and the
    others are called by their ids."""
    found: dict[str, float] = {}
    for each in likeliest:
        found[each.text if each.text not in found else f"token_id:{each.id}"] = each.logprob
    return found
