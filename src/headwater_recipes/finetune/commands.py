"""The command that the recipe adds to ``headwater``: ``finetune``."""

from __future__ import annotations

from headwater_recipes.common.command import command
from headwater_recipes.finetune.settings import RECIPE

finetune = command(RECIPE)
