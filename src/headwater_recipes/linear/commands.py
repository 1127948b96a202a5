"""The command that the recipe adds to ``headwater``: ``train linear``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.linear.settings import RECIPE

train = command(RECIPE)
