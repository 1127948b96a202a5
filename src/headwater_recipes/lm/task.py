"""What is trained: a small model, on windows of a stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from headwater_recipes.common.task import Batch, Ended
from headwater_recipes.lm import data, model, report
from headwater_recipes.lm.settings import RECIPE, LmSettings
from headwater_recipes.text import perplexity, tokenizer
from headwater_recipes.text.task import TextTask
from headwater_recipes.text.windows import Windows

PERIODIC = 64
"""Windows of a periodic validation, over all workers; the final one takes the whole held-out text."""


class LanguageModel(TextTask[LmSettings]):
    """A causal model from its first values, which the servers draw."""

    recipe = RECIPE

    def __init__(self, settings: LmSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        self.arrays = tokenizer.load_arrays(folder)
        self.length = perplexity.fits(self.arrays, settings.seq)
        self.windows = Windows(self.arrays.training, settings.seq, settings.batch, rank, world, settings.seed)

    @classmethod
    def prepare(cls, settings: LmSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def batches(self, step: int) -> Sequence[Batch]:
        return [perplexity.batch(*self.windows.batch(step))]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        places = perplexity.starts(self.arrays, self.length, None if whole else PERIODIC)
        return perplexity.batches(self.arrays, places[self.rank :: self.world], self.length)

    def build(self) -> torch.nn.Module:
        return model.empty(model.config(self.settings.preset, len(self.arrays.lengths), self.settings.seq))

    def first_values(self) -> Mapping[str, Any]:
        return model.initialisers()

    def read(self, folder: Path) -> torch.nn.Module:
        return model.load(folder)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return perplexity.nats(model, batch)

    def nbytes(self, batch: Batch) -> int:
        return perplexity.nbytes(self.arrays, batch)

    def verify(self, model: torch.nn.Module) -> float:
        inputs_bt = torch.from_numpy(self.arrays.validation[: self.length].astype("int64"))[None]
        model.eval()
        with torch.no_grad():
            ours, theirs = (
                each(input_ids=inputs_bt, use_cache=False).logits for each in (model, self.read(self.folder).eval())
            )
        return float((ours - theirs).abs().max())

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self.arrays, self.length, ended)

    def baseline(self, figures: Mapping[str, Any]) -> tuple[str, float]:
        return "unigram baseline", figures["unigram_loss"]

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, self.settings, figures, console)
