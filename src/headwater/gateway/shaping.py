"""What a request changes in the logits before a token is drawn: penalties, biases, and what a grammar allows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headwater.gateway.engine_types import GenerationRequest


_MOST = 1e30
"""Beyond all logits, and still a number: what is infinite cannot be drawn from."""


class Shaper:
    """Of one request. Order: repetition penalty, frequency and presence penalty, bias, grammar."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._counts: Counter[int] = Counter()
        self._seen = set(request.prompt) if request.repetition_penalty != 1.0 else None
        bias = dict(request.logit_bias)
        self._biased = torch.tensor(list(bias)), torch.tensor(list(bias.values()), dtype=torch.float32)

    @property
    def idle(self) -> bool:
        """Whether it never changes a logit."""
        request = self._request
        penalised = request.frequency_penalty or request.presence_penalty or self._seen is not None
        return not (penalised or request.logit_bias or request.guide)

    def __call__(self, scores: Tensor) -> Tensor:
        """The logits to draw from, (vocabulary,) float32; ``scores`` is not changed."""
        if self._seen is not None:
            scores = self._less_of_the_same(scores, self._seen)
        if self._counts and (self._request.frequency_penalty or self._request.presence_penalty):
            scores = self._less_of_the_generated(scores)
        if self._request.logit_bias:
            scores = scores.index_add(0, *self._biased)
        if self._request.guide is not None:
            scores = scores.masked_fill(~self._request.guide.allowed(), float("-inf"))
        return scores

    def push(self, token: int) -> None:
        """This token was drawn."""
        self._counts[token] += 1
        if self._request.guide is not None:
            self._request.guide.push(token)

    def _less_of_the_same(self, scores: Tensor, prompt: set[int]) -> Tensor:
        """As ``transformers``' RepetitionPenaltyLogitsProcessor, whose source is Keskar et al. 2019, CTRL."""
        ids = torch.tensor(sorted({*prompt, *self._counts}))
        seen, penalty = scores[ids], self._request.repetition_penalty
        less = torch.where(seen < 0, seen.double() * penalty, seen.double() / penalty).clamp(-_MOST, _MOST)
        return scores.index_copy(0, ids, torch.where(seen.isfinite(), less.to(scores.dtype), seen))

    def _less_of_the_generated(self, scores: Tensor) -> Tensor:
        ids = torch.tensor(list(self._counts))
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        loss = self._request.frequency_penalty * counts + self._request.presence_penalty
        return scores.index_add(0, ids, -loss.clamp(-_MOST, _MOST).to(scores.dtype))
