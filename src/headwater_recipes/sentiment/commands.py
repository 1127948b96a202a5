"""The command that the recipe adds to ``headwater``: ``train sentiment``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.sentiment.settings import RECIPE

train = command(RECIPE)
