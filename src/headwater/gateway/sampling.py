"""The next token out of a row of logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.gateway.engine_types import Alternative, GenerationRequest
from headwater.gateway.shaping import Shaper

Warper = Callable[[Tensor, Tensor], Tensor]
"""A logits processor of ``transformers``: (ids, scores of shape (1, vocabulary)) to scores."""


LEAST = -9999.0
"""The logprob of what cannot come, as OpenAI writes it: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and, if asked for, how likely it was and what else was."""

    id: int
    own: Alternative | None = None
    top: tuple[Alternative, ...] = ()


class Sampler:
    """Draws the tokens of one request, from a generator of its own: what runs beside it cannot change the draws.

    ``warpers`` are those for temperature, top-k, top-p and min-p.
    """

    def __init__(
        self, request: GenerationRequest, warpers: Sequence[Warper], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._request = request
        self._warpers = warpers
        self._decode = decode
        self._shape = Shaper(request)
        seed = request.seed if request.seed is not None else int.from_bytes(os.urandom(8))
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    @property
    def plain(self) -> bool:
        """Whether the token is the likeliest one and nothing else is asked for."""
        return self._request.temperature == 0.0 and self._shape.idle and self._request.logprobs is None

    def pick(self, logits: Tensor) -> Choice:
        """The next token. ``logits``: (vocabulary,), of any float dtype; it is not changed."""
        scores = logits.float()
        token = self._draw(self._shape(scores))
        self._shape.push(token)
        if self._request.logprobs is None:
            return Choice(token)
        return Choice(token, *self._likely(scores, token, self._request.logprobs))

    def _draw(self, scores: Tensor) -> int:
        if self._request.temperature == 0.0:
            return int(scores.argmax())
        row = scores[None]
        for warper in self._warpers:
            row = warper(row, row)
        return int(torch.multinomial(row.softmax(-1)[0], 1, generator=self._generator))

    def _likely(self, scores: Tensor, token: int, count: int) -> tuple[Alternative, tuple[Alternative, ...]]:
        logprobs = scores.log_softmax(-1).clamp(min=LEAST)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = (Alternative(i, self._decode([i]), p) for i, p in zip(ids.tolist(), values.tolist(), strict=True))
        return Alternative(token, self._decode([token]), float(logprobs[token])), tuple(top)


def likeliest(logits: Tensor) -> list[int | None]:
    """The likeliest token of each row of ``logits``, (rows, vocabulary); None for a row that is not finite."""
    # Not argmax, which is eight times as slow in bfloat16. NaN counts as the largest, and the largest is infinite if
    # any is: one value tells of the whole row.
    values, ids = logits.max(-1)
    return [token if good else None for token, good in zip(ids.tolist(), values.isfinite().tolist(), strict=True)]
