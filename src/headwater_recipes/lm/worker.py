"""What every worker process of the run does: ``python -m headwater_recipes.lm.worker RUN``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F

import headwater
from headwater_recipes.common import checkpoint, trainer
from headwater_recipes.common.score import Score
from headwater_recipes.common.settings import parse_sync
from headwater_recipes.common.trainer import Step, Trainer
from headwater_recipes.lm import evaluate, model, tokenizer
from headwater_recipes.lm.settings import RECIPE, Settings
from headwater_recipes.lm.windows import Windows

PERIODIC = 64
"""Windows of a periodic validation, over all workers; the final one takes the whole held-out text."""


class Worker(Trainer[Settings]):
    """One rank's training of a small model from its first values."""

    def __init__(self, folder: Path, ps: headwater.Client) -> None:
        self.arrays = tokenizer.load_arrays(folder)
        super().__init__(RECIPE, folder, ps)
        s = self.settings
        self.windows = Windows(self.arrays.training, s.seq, s.batch, ps.rank, ps.world, s.seed)

    def build(self, found: Path | None) -> tuple[torch.nn.Module, headwater.Optimizer]:
        s = self.settings
        made: torch.nn.Module
        if found is None:
            made = model.empty(model.config(s.preset, len(self.arrays.lengths), s.seq))
        else:
            made = model.load(found)
        return made, headwater.Optimizer(
            made,
            torch.optim.AdamW,
            params=trainer.groups(made, s.weight_decay),
            lr=s.lr,
            betas=s.betas,
            sync=parse_sync(s.sync),
            max_grad_norm=s.max_grad_norm,
            init=model.initialisers() if found is None else None,
            seed=s.seed,
            client=self.ps,
            name=checkpoint.TABLE,
        )

    def train_step(self) -> Step:
        inputs_bt, targets_bt = self.windows.batch(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            logits_btv = self.model(input_ids=inputs_bt, use_cache=False).logits
        loss = F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return Step(loss.item(), inputs_bt.numel())

    def score(self, whole: bool) -> Score:
        length = evaluate.fits(self.arrays, self.settings.seq)
        places = evaluate.starts(self.arrays, length, None if whole else PERIODIC)[self.ps.rank :: self.ps.world]
        return evaluate.score(self.model, self.arrays, places, length, self.bfloat16)

    def verify(self) -> float:
        saved = cast(Any, model.load(self.folder))
        length = evaluate.fits(self.arrays, self.settings.seq)
        inputs_bt = torch.from_numpy(self.arrays.validation[:length].astype("int64"))[None]
        cast(Any, self.model).eval()
        with torch.no_grad():
            ours = self.model(input_ids=inputs_bt, use_cache=False).logits
            theirs = saved.eval()(input_ids=inputs_bt, use_cache=False).logits
        return float((ours - theirs).abs().max())


if __name__ == "__main__":
    trainer.main(Worker, Path(sys.argv[1]))
