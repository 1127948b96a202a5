"""What a request for text becomes: the engine's requests, one for each choice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from headwater.gateway.engine_types import GenerationEnded, GenerationRequest, GrammarInvalid, GuideMissing, Token
from headwater.gateway.openai_types import Common, FinishReason, Prompt
from headwater.gateway.problems import Refusal

if TYPE_CHECKING:
    from headwater.gateway.engine_types import Guide
    from headwater.gateway.gate import RequestRecord
    from headwater.gateway.gateway import Gateway
    from headwater.gateway.limits import Limits
    from headwater.gateway.served import Generator
    from headwater.gateway.tools import Form

_SEEDS = 1 << 63


class Wanted(NamedTuple):
    """What each route says in its own way.

    ``most``: tokens of a choice, None: as many as the server allows. ``logprobs`` and ``prompt_logprobs``: as in
    ``GenerationRequest``. ``guide``: at the beginning of what an answer keeps to; each choice gets a copy.
    """

    most: int | None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None


def generations(
    asked: Common, prompts: Sequence[tuple[int, ...]], wanted: Wanted, generator: Generator, limits: Limits
) -> list[GenerationRequest]:
    """``n`` choices of each prompt, numbered as OpenAI does.

    Raises ``Refusal``: more choices or tokens than the server allows, or a token id that the model has not.
    """
    count = asked.n or 1
    if len(prompts) * count > limits.choices:
        said = f"{len(prompts)} prompts with {count} choices each: this server takes {limits.choices} in one request"
        raise Refusal(400, said, param="n" if count > 1 else "prompt", slug="too_many_choices")
    if wanted.most is not None and wanted.most > limits.max_tokens:
        said = f"{wanted.most} tokens are wanted; this server generates {limits.max_tokens} for a choice at most"
        raise Refusal(400, said, param="max_tokens", slug="too_many_tokens")
    for field, ids in (("logit_bias", asked.logit_bias), ("stop_token_ids", asked.stop_token_ids)):
        if ids and max(ids) >= generator.vocabulary:
            said = f"{field!r} names token {max(ids)}; token ids go from 0 to {generator.vocabulary - 1} here"
            raise Refusal(400, said, param=field, slug="invalid_value")
    like = _generation(asked, wanted, limits)
    return [
        dataclasses.replace(
            like,
            prompt=prompt,
            seed=None if asked.seed is None else (asked.seed + number) % _SEEDS,
            guide=wanted.guide.copy() if wanted.guide else None,
        )
        for prompt in prompts
        for number in range(count)
    ]


def _generation(asked: Common, wanted: Wanted, limits: Limits) -> GenerationRequest:
    """What all choices have in common. A field that is null means its default."""
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or ()
    return GenerationRequest(
        prompt=(),
        max_tokens=limits.max_tokens if wanted.most is None else wanted.most,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        stop=tuple(filter(None, stop)),
        stop_token_ids=frozenset(asked.stop_token_ids or ()),
        deadline=time.monotonic() + limits.deadline,
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=tuple((asked.logit_bias or {}).items()),
        ignore_eos=bool(asked.ignore_eos),
    )


async def guide_of(form: Form, generator: Generator, gateway: Gateway, record: RequestRecord) -> Guide | None:
    """What holds an answer to its form, if it has one. What cannot be enforced is noted as ignored.

    Raises ``Refusal``: no answer can be held to it; or, on a strict server, something of it cannot be enforced.
    """
    if not form.grammar:
        return None
    field = "tools" if form.calls else "response_format"
    try:
        guide = await gateway.tokenize(lambda: generator.guide(form.grammar))
    except (GrammarInvalid, GuideMissing) as error:
        slug = "invalid_schema" if isinstance(error, GrammarInvalid) else "unsupported"
        raise Refusal(400, str(error), param=field, slug=slug) from None
    if guide.warnings and gateway.limits.strict:
        said = f"{field!r} cannot be enforced whole ({guide.warnings[0]}); nothing was queued"
        raise Refusal(400, said, param=field, slug="invalid_schema")
    record.ignored += [f"{field} ({warning})" for warning in guide.warnings]
    return guide


def including_usage(asked: Common) -> bool:
    """Whether a stream ends with its usage. Raises ``Refusal``: stream options without a stream."""
    if asked.stream_options is None or not asked.stream_options.include_usage:
        return False
    if not asked.stream:
        raise Refusal(400, "'stream_options' needs 'stream': true", param="stream_options", slug="invalid_value")
    return True


async def read_prompts(
    prompt: Prompt, field: str, encode: Callable[[str], Sequence[int]], gateway: Gateway
) -> list[tuple[int, ...]]:
    """The token ids of one prompt or several: texts, token ids, or a list of either.

    Raises ``Refusal``: a mixture; ``PromptInvalid`` of ``encode``.
    """
    if isinstance(prompt, str):
        return [tuple(await gateway.tokenize(lambda: encode(prompt)))]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        said = f"{field!r} mixes texts and token ids: send texts, token ids, or lists of token ids"
        raise Refusal(400, said, param=field, slug="invalid_value")
    if kinds == {int}:
        return [tuple(item for item in prompt if isinstance(item, int))]
    if kinds == {list}:
        return [tuple(item) for item in prompt if isinstance(item, list)]
    texts = [item for item in prompt if isinstance(item, str)]
    return await gateway.tokenize(lambda: [tuple(encode(text)) for text in texts])


def text_of(events: Sequence[Token | GenerationEnded]) -> str:
    """The answer that a choice's events make."""
    return "".join(event.text for event in events)


def finish_reason(event: Token | GenerationEnded) -> FinishReason:
    """Of a choice that has ended; the other reasons are errors and do not come here.

    Where the deadline passed, what there is is an answer that was cut, as by a limit of tokens.
    """
    return "length" if isinstance(event, GenerationEnded) and event.reason in ("length", "deadline") else "stop"
