"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.text.settings import WORDING, TextTraining


class Size(NamedTuple):
    """``width`` of the residual stream, ``layers``, ``heads`` of 64 each, ``inner`` width of the MLP."""

    width: int
    layers: int
    heads: int
    inner: int


PRESETS = {
    "tiny": Size(64, 2, 1, 128),
    "6m": Size(256, 4, 4, 1024),
    "9m": Size(384, 3, 6, 1280),
    "12m": Size(384, 5, 6, 1024),
}
"""By their millions of parameters with the default vocabulary; ``tiny`` is for trying things out."""


def size(preset: str) -> Size:
    """Raises ``UsageError`` for an unknown preset."""
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r} is none of {', '.join(PRESETS)}; nothing was started")
    return PRESETS[preset]


class LmSettings(TextTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are what ``make demo`` runs."""

    preset: Annotated[str, Option("Model: tiny, 6m, 9m or 12m. Default: {default}.", fixed=True)] = "9m"
    vocabulary: Annotated[int, Option("Tokens that the tokenizer learns.", least=257, most=65_535, fixed=True)] = 4096
    data: Annotated[
        tuple[str, ...],
        Option("Text files or folders. Default: Python's standard library.", path=True, fixed=True),
    ] = ()
    batch: Annotated[int, Option("Sequences per worker and step.", least=1)] = 4
    lr: float = 2e-3

    def check(self) -> None:
        super().check()
        size(self.preset)


RECIPE = Recipe(
    name="lm",
    help="""Train a small language model through servers of its own.

    Example: headwater train lm --workers 2 --servers 3 --replicas 2 --minutes 5

    Ctrl-C stops and saves; --resume goes on. The run's folder holds a
    model that transformers loads, its metrics and its loss curve.
    """,
    task="headwater_recipes.lm.task:LanguageModel",
    settings=LmSettings,
    wording=WORDING,
    about=About(
        task="language modelling",
        data=("Python's standard library",),
        licence="PSF-2.0",
        model="Llama from scratch, 9 M parameters",
        metric="bits per byte",
        baseline="unigram",
        minutes=3,
    ),
)
