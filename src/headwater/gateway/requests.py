"""What a request for text becomes: the engine's requests, one for each choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from headwater.gateway.engine_types import Finished, GenerationRequest, Token
from headwater.gateway.openai_types import Common, FinishReason, Prompt
from headwater.gateway.problems import Refusal

if TYPE_CHECKING:
    from headwater.gateway.gateway import Gateway
    from headwater.gateway.limits import Limits

_SEEDS = 1 << 63


def generations(
    asked: Common, prompts: Sequence[tuple[int, ...]], most: int | None, logprobs: int | None, limits: Limits
) -> list[GenerationRequest]:
    """``n`` choices of each prompt, numbered as OpenAI does. ``most``: tokens of a choice, if it was said.

    Raises ``Refusal``: more choices or tokens than the server allows.
    """
    count = asked.n or 1
    if len(prompts) * count > limits.choices:
        said = f"{len(prompts)} prompts with {count} choices each: this server takes {limits.choices} in one request"
        raise Refusal(400, said, param="n" if count > 1 else "prompt", slug="too_many_choices")
    if most is not None and most > limits.max_tokens:
        said = f"{most} tokens are wanted; this server generates {limits.max_tokens} for a choice at most"
        raise Refusal(400, said, param="max_tokens", slug="too_many_tokens")
    deadline = time.monotonic() + limits.deadline
    return [_generation(asked, prompt, number, most or limits.max_tokens, logprobs, deadline)
            for prompt in prompts for number in range(count)]  # fmt: skip


def _generation(
    asked: Common, prompt: tuple[int, ...], number: int, most: int, logprobs: int | None, deadline: float
) -> GenerationRequest:
    """A field that is null means its default."""
    return GenerationRequest(
        prompt=prompt,
        max_tokens=most,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        seed=None if asked.seed is None else (asked.seed + number) % _SEEDS,
        deadline=deadline,
        logprobs=logprobs,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        ignore_eos=bool(asked.ignore_eos),
    )


def including_usage(asked: Common) -> bool:
    """Whether a stream ends with its usage. Raises ``Refusal``: stream options without a stream."""
    if asked.stream_options is None:
        return False
    if not asked.stream:
        raise Refusal(400, "'stream_options' needs 'stream': true", param="stream_options", slug="invalid_value")
    return asked.stream_options.include_usage


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


def text_of(events: Sequence[Token | Finished]) -> str:
    """The answer that a choice's events make."""
    return "".join(event.text for event in events if isinstance(event, Token))


def finish_reason(event: Token | Finished) -> FinishReason:
    """Of a choice that has ended; the other reasons are errors and do not come here."""
    return "length" if isinstance(event, Finished) and event.reason == "length" else "stop"
