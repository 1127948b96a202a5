"""What is trained: an encoder with a head, on texts with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from headwater_recipes.common.task import Ended
from headwater_recipes.sentiment import data, report
from headwater_recipes.sentiment.settings import RECIPE, SentimentSettings
from headwater_recipes.text.classifying import Classifying, of_loss


class Sentiment(Classifying[SentimentSettings]):
    """One class of each text."""

    recipe = RECIPE

    @classmethod
    def prepare(cls, settings: SentimentSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self, ended)

    def baseline(self, figures: Mapping[str, Any]) -> tuple[str, float]:
        return of_loss(figures)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, figures, console)
