"""The command that the recipe adds to ``headwater``: ``train detection``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.detection.settings import RECIPE

train = command(RECIPE)
