"""What a run of this recipe is asked to do."""

from __future__ import annotations

from headwater.errors import UsageError
from headwater_recipes.common import settings as common
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.lm import model


class Settings(common.Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are what ``make demo`` runs."""

    preset: str = "9m"
    vocabulary: int = 4096
    lr: float = 2e-3


State = common.State[Settings]


def check(settings: Settings) -> None:
    """Raises ``UsageError`` for a setting that cannot work."""
    common.check(settings)
    model.size(settings.preset)
    if not 257 <= settings.vocabulary <= 65_535:
        raise UsageError(f"vocabulary={settings.vocabulary}: must be from 257 to 65535; nothing was started")


RECIPE = Recipe(
    name="lm",
    command="headwater train lm",
    worker="headwater_recipes.lm.worker",
    settings=Settings,
    check=check,
    # The tokens, the shapes and the order of the batches hang on these.
    fixed=("data", "preset", "vocabulary", "seq", "seed"),
)
