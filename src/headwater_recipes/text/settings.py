"""Options that recipes about text have beside those of all recipes, and how their figures are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from rich.console import Console

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

CLASSES = Wording(
    unit="texts",
    loss="nats",
    headline="{accuracy:.1%} right",
    data="texts",
    prepared="the data as tokens",
)

HEAD_LR, SCRATCH_LR = 2e-4, 1e-3
"""Peak learning rates where none was given: of a pretrained encoder with a new head, and of one from its first values.
"""


class TextTraining(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``seq`` is in tokens."""

    seq: Annotated[int, Option("Tokens per sequence.", least=1, fixed=True)] = 128

    def check(self) -> None:
        super().check()
        if self.seq < 2:
            raise UsageError(f"seq={self.seq}: a window needs 2 tokens or more; nothing was started")


class ClassifyingTraining(TextTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of recipes that put an encoder's head on texts; ``batch`` is of texts."""

    model: Annotated[
        str, Option("minilm, a Hugging Face folder or a name on the hub. Default: {default}.", fixed=True)
    ] = "minilm"
    scratch: Annotated[
        bool, Option("A small encoder from its first values, with its own tokens, instead of --model.", fixed=True)
    ] = False
    seq: Annotated[int, Option("Tokens of a text at most. Default: {default}.", least=1, fixed=True)] = 64
    batch: Annotated[int, Option("Texts per worker and step. Default: {default}.", least=1)] = 32
    lr: Annotated[float, Option("Peak learning rate. Default: 2e-4, with --scratch 1e-3.", above=0)] = HEAD_LR
    weight_decay: float = 0.01
    warmup: int = 20
    validate_every: int = 50
    save_every: int = 500
    log_every: int = 5

    @classmethod
    def of(cls, changes: dict[str, Any]) -> Self:
        made = cls(**changes)
        return msgspec.structs.replace(made, lr=SCRATCH_LR) if made.scratch and "lr" not in changes else made

    @classmethod
    def look_up(cls, changes: dict[str, Any], console: Console) -> dict[str, Any]:
        """What exists here is named by its whole path, as workers may run elsewhere."""
        found = dict(changes)
        if "data" in changes:
            found["data"] = tuple(map(_whole, changes["data"]))
        if "model" in changes:
            found["model"] = _whole(changes["model"])
        return found

    def check(self) -> None:
        super().check()
        if self.scratch and self.model != "minilm":
            raise UsageError("--scratch and --model: give one of them; nothing was started")


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name
