"""What is trained: the label of a spoken word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from headwater_recipes.commands import data, report
from headwater_recipes.commands.settings import RECIPE, CommandsSettings
from headwater_recipes.common.task import Ended
from headwater_recipes.sound.report import tell
from headwater_recipes.sound.task import SoundTask


class Commands(SoundTask[CommandsSettings]):
    """Learnt from a synthesizer, so that it may be judged on people of whom it heard nothing."""

    recipe = RECIPE

    @classmethod
    def prepare(cls, settings: CommandsSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self.folder, self.examples, ended)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        tell(self.folder, ended, figures, [report.PEOPLE] if report.PEOPLE in figures else [], console)
