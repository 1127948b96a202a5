"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from headwater.errors import UsageError
from headwater_recipes.common import settings as common
from headwater_recipes.common.recipe import Recipe

FULL_LR = 1e-4
LORA_LR = 1e-3
"""Peak learning rates where none was given: an adapter starts from nothing and has further to go."""


class Settings(common.Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``batch`` is of examples (chats, or windows of text) that go through the model at once; a worker's step takes
    ``accumulate`` of them. ``lora`` is the adapter's rank, 0 for full weights; ``lora_alpha`` 0 stands for twice that.
    """

    MINUTES: ClassVar[float] = 5.0

    model: str = "smollm2"
    accumulate: int = 1
    lora: int = 0
    lora_alpha: float = 0.0
    lora_targets: str = "all-linear"
    workers: int = 1
    batch: int = 8
    seq: int = 256
    lr: float = FULL_LR
    weight_decay: float = 0.01
    warmup: int = 10
    log_every: int = 5
    save_every: int = 500
    validate_every: int = 50
    publish_every: int = 10


State = common.State[Settings]


def complete(changes: dict[str, object]) -> Settings:
    """The settings of a new run, from what was given."""
    made = Settings(**changes)  # type: ignore[arg-type]
    if made.lora > 0 and "lr" not in changes:
        made = msgspec.structs.replace(made, lr=LORA_LR)
    return made


def check(settings: Settings) -> None:
    """Raises ``UsageError`` for a setting that cannot work."""
    common.check(settings)
    if settings.accumulate < 1:
        raise UsageError(f"--accumulate {settings.accumulate}: must be 1 or more; nothing was started")
    if settings.lora < 0 or settings.lora_alpha < 0:
        raise UsageError("--lora and --lora-alpha: must be above 0; nothing was started")
    if settings.lora == 0 and (settings.lora_alpha or settings.lora_targets != "all-linear"):
        raise UsageError("--lora-alpha and --lora-targets say what --lora N does: give that too; nothing was started")


RECIPE = Recipe(
    name="finetune",
    command="headwater finetune",
    worker="headwater_recipes.finetune.worker",
    settings=Settings,
    check=check,
    # The tokens, the shapes and the order of the batches hang on these.
    fixed=("model", "data", "seq", "seed", "lora", "lora_alpha", "lora_targets"),
    patience=600.0,  # a checkpoint is gigabytes, and the machine may be busy; a second Ctrl-C does not wait
)
