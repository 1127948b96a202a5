"""How good a model is on some text."""

from __future__ import annotations

import math
from typing import NamedTuple


class Score(NamedTuple):
    """The sum of the negative log likelihoods in nats, over ``tokens`` tokens that stand for ``nbytes`` bytes."""

    nats: float
    tokens: int
    nbytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Unlike losses per token, these do not depend on the tokenizer."""
        return self.nats / math.log(2) / max(1, self.nbytes)
