"""How likely a prompt's own tokens are, gathered while it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from headwater.gateway.detokenize import Detokenizer
from headwater.gateway.engine_types import Alternative, GenerationRequest, PromptRead, PromptToken
from headwater.gateway.sampling import LEAST

Decode = Callable[[Sequence[int]], str]


class PromptScores:
    """Of one request's prompt. ``decode``: tokens to text; ``spell``: one token to its own, special ones too."""

    def __init__(self, request: GenerationRequest, decode: Decode, spell: Decode) -> None:
        self._prompt = request.prompt
        self._count = request.prompt_logprobs or 0
        self._decode = decode
        self._spell = spell
        self._text = Detokenizer(decode)
        self._tokens = [self._token(self._prompt[0], None, ())]

    def take(self, start: int, logits: Tensor) -> None:
        """Logits (positions, vocabulary) behind the positions from ``start`` on, each of the token after it."""
        targets = self._prompt[start + 1 : start + 1 + len(logits)]
        if not targets:
            return
        logprobs = logits[: len(targets)].float().log_softmax(-1).clamp(min=LEAST)
        values, ids = logprobs.topk(min(self._count, logprobs.shape[-1]))
        for row, target in enumerate(targets):
            top = tuple(
                Alternative(i, self._spell([i]), p)
                for i, p in zip(ids[row].tolist(), values[row].tolist(), strict=True)
            )
            self._tokens.append(self._token(target, float(logprobs[row, target]), top))

    def read(self) -> PromptRead:
        """The whole prompt's, when all of it has been taken."""
        assert len(self._tokens) == len(self._prompt)
        shown = sum(len(token.text) for token in self._tokens)
        rest = self._decode(self._prompt)[shown:]  # half a character at the end
        last = dataclasses.replace(self._tokens[-1], text=self._tokens[-1].text + rest)
        return PromptRead((*self._tokens[:-1], last))

    def _token(self, token: int, logprob: float | None, top: tuple[Alternative, ...]) -> PromptToken:
        return PromptToken(self._text.push(token), token, self._spell([token]), logprob, top)
