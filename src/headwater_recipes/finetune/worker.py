"""What every worker process of the run does: ``python -m headwater_recipes.finetune.worker RUN``."""

from __future__ import annotations

import contextlib
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headwater
from headwater_recipes.common import checkpoint, trainer
from headwater_recipes.common.score import Score, total
from headwater_recipes.common.settings import parse_sync
from headwater_recipes.common.trainer import Step, Trainer
from headwater_recipes.finetune import adapter, examples, source
from headwater_recipes.finetune.batches import Batches, collate, nats
from headwater_recipes.finetune.settings import RECIPE, Settings

WHOLE, PERIODIC = 128, 32
"""Held-out examples of the validations before and after, and of those between."""
_ROWS = 8


class Worker(Trainer[Settings]):
    """One rank's training of a pretrained model, or of an adapter for it."""

    def __init__(self, folder: Path, ps: headwater.Client) -> None:
        super().__init__(RECIPE, folder, ps)
        s = self.settings
        tokenizer = source.read_tokenizer(folder)
        self.padding: int = tokenizer.pad_token_id
        self.held_out = examples.load(folder, "held_out")
        training = examples.load(folder, "training")
        self.batches = Batches(training, s.batch, s.accumulate, ps.rank, ps.world, s.seed, self.padding)
        inner: Any = self.model
        inner = inner.get_base_model() if s.lora else inner
        self.skips = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def build(self, found: Path | None) -> tuple[torch.nn.Module, headwater.Optimizer]:
        s = self.settings
        model = read_model(self.folder, found, s)
        return model, headwater.Optimizer(
            model,
            torch.optim.AdamW,
            params=trainer.groups(model, s.weight_decay),
            lr=s.lr,
            betas=s.betas,
            sync=parse_sync(s.sync),
            max_grad_norm=s.max_grad_norm,
            seed=s.seed,
            client=self.ps,
            name=checkpoint.TABLE,
        )

    def write(self, model: Any, folder: Path) -> None:
        if self.settings.lora:
            adapter.write(model, folder, self.folder)
        else:
            super().write(model, folder)

    def before(self) -> None:
        if self.start.step == 0:
            self._doing("validating before the first step")
            self.validate(whole=True)

    def train_step(self) -> Step:
        """The mean over all tokens that the step learns from, however they lie in its batches."""
        batches = self.batches.step(self.step)
        learnt, summed = sum(batch.learnt for batch in batches), 0.0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.optimizer.no_sync():
                loss = nats(self.model, batch, self.bfloat16, self.skips) / learnt
                loss.backward()  # type: ignore[no-untyped-call]
            summed += loss.item()
        return Step(summed, sum(batch.tokens for batch in batches))

    def score(self, whole: bool) -> Score:
        count = min(len(self.held_out), WHOLE if whole else PERIODIC)
        by_length = np.argsort(self.held_out.lengths[:count], kind="stable")[self.ps.rank :: self.ps.world].tolist()
        parts = []
        for first in range(0, len(by_length), _ROWS):
            chosen = [self.held_out[i] for i in by_length[first : first + _ROWS]]
            batch = collate(chosen, self.padding)
            found = nats(self.model, batch, self.bfloat16, self.skips).item()
            parts.append(Score(found, batch.learnt, sum(example.nbytes for example in chosen)))
        return total(parts)


def read_model(folder: Path, found: Path | None, settings: Settings) -> Any:
    """The model of the checkpoint ``found``; without one, that which the run began with."""
    if not settings.lora:
        return source.read(found or folder, settings.seq)
    model = adapter.wrap(source.read(folder / adapter.BASE, settings.seq), settings)
    if found is not None:
        adapter.read(model, found)
    return model


if __name__ == "__main__":
    trainer.main(Worker, Path(sys.argv[1]))
