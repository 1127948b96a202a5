"""What is trained: a classifier of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from headwater_recipes.common.task import Batch, Ended, Sums
from headwater_recipes.image import data, model, report
from headwater_recipes.image.settings import RECIPE, ImageSettings
from headwater_recipes.images.batches import Order, vary
from headwater_recipes.images.task import ImageTask

PERIODIC = 1000
"""Images of a periodic validation, over all workers; the final one takes all that are held out."""

TOGETHER = 250
"""Images that are looked at at once when nothing is learnt."""


class ImageClassification(ImageTask[ImageSettings]):
    """Cross-entropy over the classes; the figure is the accuracy."""

    recipe = RECIPE

    def __init__(self, settings: ImageSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        self.order = Order(len(self.images.training.labels), settings.batch, rank, world, settings.seed)

    @classmethod
    def prepare(cls, settings: ImageSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def batches(self, step: int) -> Sequence[Batch]:
        places = self.order.places(step)
        random = np.random.default_rng([self.settings.seed, step, self.rank])
        pixels = vary(self.images.training.pixels[places], self.settings.augment, random)
        return [self.batch(pixels, self.images.training.labels[places])]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        pixels, labels = self.images.held_out
        places = np.arange(len(labels)) if whole else np.linspace(0, len(labels) - 1, min(PERIODIC, len(labels)))
        mine = places.astype(np.int64)[self.rank :: self.world]
        for start in range(0, len(mine), TOGETHER):
            some = mine[start : start + TOGETHER]
            yield self.batch(pixels[some], labels[some])

    def build(self) -> torch.nn.Module:
        s = self.settings
        return (
            model.begin(s.model, self.images.classes, s.seed) if s.model else model.build(self.images.classes, s.seed)
        )

    def read(self, folder: Path) -> torch.nn.Module:
        found: torch.nn.Module = model.read(folder)
        return found

    def outputs(self, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(B, classes) logits."""
        logits: torch.Tensor = model(pixel_values=pixels).logits
        return logits

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        pixels, labels = batch.inputs
        return F.cross_entropy(self.outputs(model, pixels), labels, reduction="sum")

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        pixels, labels = batch.inputs
        logits = self.outputs(model, pixels)
        loss = F.cross_entropy(logits, labels, reduction="sum").item()
        return {"loss": loss, "right": int((logits.argmax(1) == labels).sum()), "count": len(labels)}

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        count = max(1, sums["count"])
        return {"loss": sums["loss"] / count, "accuracy": sums["right"] / count}

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self.folder, self.images, self.scale, self.read(self.folder), ended)

    def baseline(self, figures: Mapping[str, Any]) -> tuple[str, float]:
        return "linear model", figures["baseline"]["linear_loss"]

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, figures, console)
