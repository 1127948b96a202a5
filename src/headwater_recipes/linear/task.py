"""What is trained: coefficients, on rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from headwater_recipes.common.task import Batch, Ended, Sums, Task
from headwater_recipes.linear import data, model, report
from headwater_recipes.linear.settings import RECIPE, LinearSettings
from headwater_recipes.tables.table import Numbers, Split


class Linear(Task[LinearSettings]):
    """Least squares. The loss is in units of the variance of y, so it is about 1 − R²."""

    recipe = RECIPE
    validates_first = True

    def __init__(self, settings: LinearSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        self.split = Split.load(folder)

    @classmethod
    def prepare(cls, settings: LinearSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def build(self) -> model.Regression:
        return model.build(self.split.training)

    def read(self, folder: Path) -> model.Regression:
        return model.read(folder, self.split.training.x.shape[1])

    def batches(self, step: int) -> Sequence[Batch]:
        """Every row that there is, if the workers take as many; else drawn ones. Each rank has its share of them."""
        rows = np.arange(len(self.split.training.y))
        wanted = self.settings.batch * self.world
        if wanted < len(rows):
            rows = np.random.default_rng((self.settings.seed, step)).integers(len(rows), size=wanted)
        return [self._batch(self.split.training, rows[self.rank :: self.world])]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        del whole  # it is quick
        return [self._batch(self.split.held_out, np.arange(self.rank, len(self.split.held_out.y), self.world))]

    def _batch(self, part: Numbers, rows: Any) -> Batch:
        return Batch((torch.from_numpy(part.x[rows]), torch.from_numpy(part.y[rows])), len(rows), len(rows))

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        x, y = batch.inputs
        mean, deviation = model.get_buffer("target")
        return torch.nn.functional.mse_loss(model(x), ((y - mean) / deviation).float(), reduction="sum")

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        mean, deviation = model.get_buffer("target")
        y = (batch.inputs[1] - mean) / deviation
        return {**super().measure(model, batch), "y": y.sum().item(), "squares": y.square().sum().item()}

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        """``loss``, and ``r2``: 1 − squared errors / squared distances from the mean of the held-out y."""
        around = sums["squares"] - sums["y"] ** 2 / max(1, sums["count"])
        return {**super().metrics(sums), "r2": 1 - sums["loss"] / around}

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self, ended)

    def baseline(self, figures: Mapping[str, Any]) -> tuple[str, float]:
        return "closed form", figures["baseline"]["closed_form"]["loss"]

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, figures, console)
