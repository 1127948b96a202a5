"""``headwater train commands``."""

from headwater_recipes.commands.settings import RECIPE
from headwater_recipes.common.command import command

train = command(RECIPE)
