"""The command that the recipe adds to ``headwater``: ``train qa``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.qa.settings import RECIPE

train = command(RECIPE)
