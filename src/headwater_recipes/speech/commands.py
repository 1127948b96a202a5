"""``headwater train speech``."""

from headwater_recipes.common.command import command
from headwater_recipes.speech.settings import RECIPE

train = command(RECIPE)
