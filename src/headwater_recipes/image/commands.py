"""``headwater train image``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.image.settings import RECIPE

train = command(RECIPE)
