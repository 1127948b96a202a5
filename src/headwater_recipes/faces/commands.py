"""``headwater train faces``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.faces.settings import RECIPE

train = command(RECIPE)
