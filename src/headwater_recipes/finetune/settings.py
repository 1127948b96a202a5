"""What a run of this recipe is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import msgspec
from rich.console import Console

from headwater import pretrained
from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.common.stages import stage
from headwater_recipes.text.settings import WORDING, TextTraining

FULL_LR = 1e-4
LORA_LR = 1e-3
"""Peak learning rates where none was given: an adapter starts from nothing and has further to go."""


class FinetuneSettings(TextTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``batch`` is of examples (chats, or windows of text) that go through the model at once; a worker's step takes
    ``accumulate`` of them. ``lora`` is the adapter's rank, 0 for full weights; ``lora_alpha`` 0 stands for twice that.
    """

    MINUTES: ClassVar[float] = 3.0

    model: Annotated[
        str,
        Option("smollm2, a Hugging Face folder, a .gguf file or a name on the hub. Default: {default}.", fixed=True),
    ] = "smollm2"
    lora: Annotated[int, Option("Train an adapter of this rank only. Default: all weights.", fixed=True)] = 0
    lora_alpha: Annotated[float, Option("The adapter's scale. Default: twice its rank.", fixed=True)] = 0.0
    lora_targets: Annotated[str, Option("Modules that get an adapter, by commas. Default: {default}.", fixed=True)] = (
        "all-linear"
    )
    accumulate: Annotated[int, Option("Batches per worker and step. Default: {default}.")] = 1
    seq: Annotated[int, Option("Tokens of an example at most. Default: {default}.", least=1, fixed=True)] = 256
    data: Annotated[
        tuple[str, ...],
        Option(
            "Chats (.jsonl) or plain text. Default: docstrings of Python's standard library.", path=True, fixed=True
        ),
    ] = ()
    batch: Annotated[int, Option("Examples per worker at once. Default: {default}.", least=1)] = 4
    lr: Annotated[float, Option("Peak learning rate. Default: 1e-4, with --lora 1e-3.", above=0)] = FULL_LR
    weight_decay: float = 0.01
    warmup: int = 10
    publish_every: Annotated[
        int, Option("Steps between versions that readers can follow; 0: none. Default: {default}.")
    ] = 10
    save_every: int = 500
    validate_every: int = 50
    log_every: int = 5

    @classmethod
    def of(cls, changes: dict[str, Any]) -> Self:
        made = cls(**changes)
        return msgspec.structs.replace(made, lr=LORA_LR) if made.lora > 0 and "lr" not in changes else made

    @classmethod
    def look_up(cls, changes: dict[str, Any], console: Console) -> dict[str, Any]:
        """A model that exists is named by its whole path, as workers may run elsewhere; also a folder that is called
        as the default model is. Raises ``DataError`` for one that is nowhere.
        """
        model = changes.get("model")
        if model is not None and Path(model).exists():
            return {**changes, "model": str(Path(model).resolve())}
        if model is not None and model not in pretrained.PACKAGED:
            with stage(console, "looking for the model"):
                pretrained.on_the_hub(model)
        return changes

    def check(self) -> None:
        super().check()
        if self.accumulate < 1:
            raise UsageError(f"--accumulate {self.accumulate}: must be 1 or more; nothing was started")
        if self.lora < 0 or self.lora_alpha < 0:
            raise UsageError("--lora and --lora-alpha: must be above 0; nothing was started")
        if self.lora == 0 and (self.lora_alpha or self.lora_targets != "all-linear"):
            raise UsageError(
                "--lora-alpha and --lora-targets say what --lora N does: give that too; nothing was started"
            )


RECIPE = Recipe(
    name="finetune",
    help="""Train a pretrained language model on, and see what it answers then.

    Example: headwater finetune --minutes 5
    Example: headwater finetune --data chats.jsonl --lora 8 --workers 2

    Ctrl-C stops and saves; --resume goes on. While it trains,
    headwater serve --model RUN answers with the newest version.
    """,
    task="headwater_recipes.finetune.task:Finetuning",
    settings=FinetuneSettings,
    command="headwater finetune",
    wording=WORDING,
    about=About(
        task="question answering in chats",
        data=("docstrings of Python's standard library",),
        licence="PSF-2.0",
        model="SmolLM2-135M-Instruct",
        metric="loss per token of the answers",
        baseline="the model before training",
        minutes=5,
    ),
    patience=600.0,  # a checkpoint is gigabytes, and the machine may be busy; a second Ctrl-C does not wait
)
