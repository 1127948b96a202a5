"""What is trained: a pretrained model, or an adapter for it, on the answers of chats and on documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from headwater_recipes.common import checkpoint
from headwater_recipes.common.task import Batch, Ended
from headwater_recipes.finetune import adapter, data, model, report
from headwater_recipes.finetune.settings import RECIPE, FinetuneSettings
from headwater_recipes.text import examples
from headwater_recipes.text.padded import Batches, Padded, collate, nats
from headwater_recipes.text.task import TextTask

WHOLE, PERIODIC = 128, 32
"""Held-out examples of the validations before and after, and of those between."""
_ROWS = 8


class Finetuning(TextTask[FinetuneSettings]):
    """Validated before the first step: it knows something already."""

    recipe = RECIPE
    validates_first = True

    def __init__(self, settings: FinetuneSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        s = settings
        self.padding: int = model.read_tokenizer(folder).pad_token_id
        self.examples = examples.load(folder, "held_out")
        training = examples.load(folder, "training")
        self.training = Batches(training, s.batch, s.accumulate, rank, world, s.seed, self.padding)
        self.skips = False

    @classmethod
    def prepare(cls, settings: FinetuneSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def batches(self, step: int) -> Sequence[Batch]:
        return [_batch(padded) for padded in self.training.step(step)]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        count = min(len(self.examples), WHOLE if whole else PERIODIC)
        by_length = np.argsort(self.examples.lengths[:count], kind="stable")[self.rank :: self.world].tolist()
        for first in range(0, len(by_length), _ROWS):
            yield _batch(collate([self.examples[i] for i in by_length[first : first + _ROWS]], self.padding))

    def build(self) -> torch.nn.Module:
        return self._built(None)

    def read(self, folder: Path) -> torch.nn.Module:
        return self._built(folder)

    def _built(self, found: Path | None) -> torch.nn.Module:
        made = model.read_model(self.folder, found, self.settings)
        inner = made.get_base_model() if self.settings.lora else made
        self.skips = "logits_to_keep" in inspect.signature(inner.forward).parameters
        return made  # type: ignore[no-any-return]

    def write(self, model: torch.nn.Module, folder: Path) -> None:
        if self.settings.lora:
            adapter.write(model, folder, self.folder)
        else:
            checkpoint.write_model(model, folder)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return nats(model, batch.inputs, self.skips)

    def nbytes(self, batch: Batch) -> int:
        return int(batch.inputs.nbytes)

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(ended)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, self.settings, ended, console)


def _batch(padded: Padded) -> Batch:
    return Batch(padded, padded.learnt, padded.tokens)
