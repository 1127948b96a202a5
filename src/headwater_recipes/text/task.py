"""A task whose loss is the negative log likelihood of tokens."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

import torch

from headwater import pretrained
from headwater_recipes.common.task import Batch, Sums, Task
from headwater_recipes.text.score import Score
from headwater_recipes.text.settings import TextTraining

AnyText = TypeVar("AnyText", bound=TextTraining)


class TextTask(Task[AnyText]):
    """Held-out data are measured in nats per token and, to compare tokenizers, in bits per byte."""

    def __init__(self, settings: AnyText, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        pretrained.quiet()

    @abstractmethod
    def nbytes(self, batch: Batch) -> int:
        """UTF-8 bytes of the text that a batch learns from."""

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        return Score(self.loss(model, batch).item(), batch.learnt, self.nbytes(batch))._asdict()

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        found = score_of(sums)
        return {"loss": found.loss, "bits_per_byte": found.bits_per_byte}


def score_of(sums: Sums) -> Score:
    """What ``TextTask.measure`` added up."""
    return Score(float(sums["nats"]), int(sums["tokens"]), int(sums["nbytes"]))
