"""What is trained: the language of a sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from headwater_recipes.common.task import Ended
from headwater_recipes.sound.report import tell
from headwater_recipes.sound.task import SoundTask
from headwater_recipes.speech import data, report
from headwater_recipes.speech.settings import RECIPE, SpeechSettings


class Speech(SoundTask[SpeechSettings]):
    """Judged by people who were never heard: a network that knows the voices knows nothing of these."""

    recipe = RECIPE

    @classmethod
    def prepare(cls, settings: SpeechSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self.folder, self.examples, ended)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        tell(self.folder, ended, figures, [], console)
