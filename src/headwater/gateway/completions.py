"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from headwater.gateway.engine_types import Finished, Token
from headwater.gateway.gate import record_of
from headwater.gateway.generation import Run, answer
from headwater.gateway.limits import read_json
from headwater.gateway.openai_types import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from headwater.gateway.problems import Refusal
from headwater.gateway.requests import finish_reason, generations, including_usage, read_prompts, text_of
from headwater.gateway.served import fingerprint

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from headwater.gateway.gateway import Gateway

_DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(request: Request, gateway: Gateway) -> Response:
    """Continue one prompt or several."""
    asked = await read_json(request, _DECODER, gateway.limits)
    gateway.served.must_be(asked.model)
    generator = gateway.served.generator()
    echoed = _echoed(asked)
    usage = including_usage(asked)
    prompts = await read_prompts(asked.prompt, "prompt", generator.encode, gateway)
    wanted = generations(asked, prompts, asked.max_tokens or 16, asked.logprobs, gateway.limits)
    record = record_of(request)
    run = Run(generator, wanted, request.receive, record, gateway.runs, gateway.limits.deadline)
    writer = _Writer(asked, usage, [text for text in echoed for _ in range(asked.n or 1)])
    return await answer(run, writer, record, stream=bool(asked.stream), usage=usage)


def _echoed(asked: CompletionRequest) -> list[str]:
    """The prompts that the answers begin with. Raises ``Refusal`` for what no single field's type can say."""
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise Refusal(
            400,
            "'best_of' is not supported by this server beyond 'n'; leave it out",
            param="best_of",
            slug="unsupported",
        )
    if not asked.echo:
        return []
    texts = (
        [asked.prompt] if isinstance(asked.prompt, str) else [item for item in asked.prompt if isinstance(item, str)]
    )
    if asked.logprobs is not None or not texts:
        said = "'echo' is supported for prompts that are texts, and without 'logprobs'; leave it out"
        raise Refusal(400, said, param="echo", slug="unsupported")
    return texts


class _Writer:
    """A run as completions write it. ``echoed``: what each choice begins with; empty for nothing."""

    def __init__(self, asked: CompletionRequest, usage: bool, echoed: Sequence[str]) -> None:
        self._model = asked.model
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._no_usage = None if usage else msgspec.UNSET
        self._echoed = dict(enumerate(echoed))
        self._written: dict[int, int] = {}

    def event(self, run: Run, number: int, event: Token | Finished) -> Iterator[Completion]:
        begun = number in self._written
        written = self._written.setdefault(number, 0)
        text = ("" if begun else self._echoed.get(number, "")) + text_of([event])
        end = finish_reason(event) if isinstance(event, Finished) else None
        logprobs = _logprobs([event], written)
        if not (text or end or logprobs):
            return
        self._written[number] += len(text)
        version = run.choices[number].version
        yield Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint([version] if version else []),
            choices=[CompletionChoice(number, text, logprobs, end)],
            usage=self._no_usage,
        )

    def usage(self, run: Run) -> Completion:
        return self._completion(run, [])

    def whole(self, run: Run, events: Sequence[Sequence[Token | Finished]]) -> Completion:
        choices = [
            CompletionChoice(
                number,
                self._echoed.get(number, "") + text_of(of_choice),
                _logprobs(of_choice, 0),
                finish_reason(of_choice[-1]),
            )
            for number, of_choice in enumerate(events)
        ]
        return self._completion(run, choices)

    def _completion(self, run: Run, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=fingerprint(run.versions()),
            choices=choices,
            usage=run.usage(),
        )


def _logprobs(events: Sequence[Token | Finished], offset: int) -> CompletionLogprobs | None:
    """Of the tokens among the events; None if not asked for. ``offset``: characters of the text before them."""
    tokens = [event for event in events if isinstance(event, Token)]
    own = [token.own for token in tokens if token.own is not None]
    if not own:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    top = [{likely.text: likely.logprob for likely in token.top} for token in tokens]
    return CompletionLogprobs(
        tokens=[each.text for each in own],
        token_logprobs=[each.logprob for each in own],
        top_logprobs=top if any(top) else None,
        text_offset=offsets,
    )
