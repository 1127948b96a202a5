"""Options that recipes about text have beside those of all recipes, and how their figures are called."""

from __future__ import annotations

from typing import Annotated

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import Wording
from headwater_recipes.common.settings import Training

WORDING = Wording(
    unit="tokens",
    loss="nats per token",
    headline="{bits_per_byte:.3f} bits/byte",
    data="text",
    prepared="the data as tokens",
)


class TextTraining(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``seq`` is in tokens."""

    seq: Annotated[int, Option("Tokens per sequence.", least=1, fixed=True)] = 128

    def check(self) -> None:
        super().check()
        if self.seq < 2:
            raise UsageError(f"seq={self.seq}: a window needs 2 tokens or more; nothing was started")
