"""What is trained: where faces lie, those of one person close together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from headwater_recipes.common.task import Batch, Ended, Sums
from headwater_recipes.faces import data, model, report
from headwater_recipes.faces.settings import RECIPE, FacesSettings
from headwater_recipes.images.batches import vary
from headwater_recipes.images.task import ImageTask

MOST = 400
"""Held-out images that are compared with each other while it trains; the figures at the end take all."""


class Faces(ImageTask[FacesSettings]):
    """A batch holds ``each`` images of each of some people."""

    recipe = RECIPE

    def __init__(self, settings: FacesSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        labels = self.images.training.labels
        self.places = [np.flatnonzero(labels == person) for person in np.unique(labels)]

    @classmethod
    def prepare(cls, settings: FacesSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def batches(self, step: int) -> Sequence[Batch]:
        s = self.settings
        random = np.random.default_rng([s.seed, step, self.rank])
        people = random.permutation(len(self.places))[: s.batch // s.each]
        chosen = [random.permutation(self.places[person])[: s.each] for person in people]
        places = np.concatenate(chosen)
        pixels = vary(self.images.training.pixels[places], s.augment, random)
        return [self.batch(pixels, self.images.training.labels[places])]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        """All are compared with all: not in parts. Rank 0 does it, the others have nothing to add."""
        del whole
        if self.rank == 0:
            yield self.batch(self.images.held_out.pixels[:MOST], self.images.held_out.labels[:MOST])

    def build(self) -> torch.nn.Module:
        made: torch.nn.Module = model.build(self.settings.seed)
        return made

    def read(self, folder: Path) -> torch.nn.Module:
        found: torch.nn.Module = model.read(folder)
        return found

    def outputs(self, network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(B, D) vectors of length one."""
        return model.embed(network, pixels)

    def loss(self, network: torch.nn.Module, batch: Batch) -> torch.Tensor:
        pixels, labels = batch.inputs
        return model.contrast(self.outputs(network, pixels), labels, self.settings.margin, self.settings.temperature)

    def measure(self, network: torch.nn.Module, batch: Batch) -> Sums:
        pixels, labels = batch.inputs
        vectors = self.outputs(network, pixels)
        loss = model.contrast(vectors, labels, self.settings.margin, self.settings.temperature)
        nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)
        return {"loss": loss.item(), "right": int((labels[nearest] == labels).sum()), "count": len(labels)}

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        count = max(1, sums["count"])
        return {"loss": sums["loss"] / count, "nearest": sums["right"] / count}

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self.folder, self.images, self.scale, self.read(self.folder), ended)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, figures, console)
