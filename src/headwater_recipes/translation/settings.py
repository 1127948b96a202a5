"""What a run of this recipe is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from rich.console import Console

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe, Wording
from headwater_recipes.text.settings import TextTraining

PRETRAINED_LR = 1e-4
"""Peak learning rate of a model that goes on, where none was given."""


class TranslationSettings(TextTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``batch`` is of pairs; ``seq`` counts tokens of either side."""

    MINUTES: ClassVar[float] = 3.75

    data: Annotated[
        tuple[str, ...],
        Option(
            "verses (of two Bibles; the default), a .tsv file whose first line names the languages, a folder with "
            "train.en and train.es (and test.en and test.es, valid.*), line by line, or a name that the library "
            "datasets finds, in the form of WMT (owner/name:configuration).",
            fixed=True,
        ),
    ] = ("verses",)
    source: Annotated[str, Option("The language to translate from. Default: {default}.", fixed=True)] = "en"
    target: Annotated[str, Option("The language to translate into. Default: {default}.", fixed=True)] = "es"
    model: Annotated[
        str,
        Option(
            "An encoder-decoder to go on from (Marian, T5): a Hugging Face folder or a name on the hub. Default: "
            "a small one from its first values.",
            fixed=True,
        ),
    ] = ""
    whole: Annotated[
        bool, Option("Learn and translate whole texts, as with --model, and not clause by clause.", fixed=True)
    ] = False
    vocabulary: Annotated[
        int, Option("Tokens that both languages share, of a new model. Default: {default}.", least=300, fixed=True)
    ] = 4000
    seq: Annotated[
        int, Option("Tokens of a text at most; longer pairs are not learnt. Default: {default}.", least=4, fixed=True)
    ] = 48
    batch: Annotated[int, Option("Pairs per worker and step. Default: {default}.", least=1)] = 64
    lr: Annotated[float, Option("Peak learning rate. Default: 2e-3, with --model 1e-4.", above=0)] = 2e-3
    smoothing: Annotated[
        float, Option("Share of the target spread over all tokens (label smoothing). Default: {default}.")
    ] = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: int = 60
    validate_every: int = 100
    save_every: int = 500

    @classmethod
    def of(cls, changes: dict[str, Any]) -> Self:
        given = {"lr": PRETRAINED_LR, "whole": True} if changes.get("model") else {}
        return cls(**given | changes)

    @classmethod
    def look_up(cls, changes: dict[str, Any], console: Console) -> dict[str, Any]:
        """What exists here is named by its whole path, as workers may run elsewhere."""
        found = dict(changes)
        if "data" in changes:
            found["data"] = tuple(map(_whole, changes["data"]))
        if changes.get("model"):
            found["model"] = _whole(changes["model"])
        return found

    def check(self) -> None:
        super().check()
        if len(self.data) != 1:
            raise UsageError(f"--data was given {len(self.data)} times: give one; nothing was started")
        if self.source == self.target:
            raise UsageError(f"--source and --target are both {self.source!r}; nothing was started")
        if self.data == ("verses",) and {self.source, self.target} != {"en", "es"}:
            raise UsageError(
                f"--source {self.source} --target {self.target}: the verses are in en (English) and es (Spanish); "
                f"nothing was started. Give --data for other languages"
            )
        if not 0 <= self.smoothing < 1:
            raise UsageError(f"--smoothing {self.smoothing:g}: must be 0 or more and less than 1; nothing was started")


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


RECIPE = Recipe(
    name="translation",
    help="""Translate from one language into another: English into Spanish, or what one's own pairs of texts show.

    Example: headwater train translation --workers 2
    Example: headwater train translation --data pairs.tsv --source en --target de

    Ctrl-C stops and saves; --resume goes on. The run's folder holds a
    model that AutoModelForSeq2SeqLM loads, its tokenizer, its metrics,
    ten translations, and a picture of what it looks at.
    """,
    task="headwater_recipes.translation.task:Translation",
    settings=TranslationSettings,
    wording=Wording(
        unit="tokens",
        loss="nats per token",
        headline="{token_accuracy:.1%} of tokens",
        data="pairs",
        prepared="the pairs as tokens",
    ),
    about=About(
        task="translation: English into Spanish, Bible verses",
        data=("bible-english", "bible-spanish"),
        model="encoder-decoder from scratch, 4.4 M parameters",
        metric="sacreBLEU, chrF",
        baseline="copying, word-by-word dictionary",
        minutes=4.5,
    ),
    served="headwater_recipes.translation.serving:ServedTranslator",
)
