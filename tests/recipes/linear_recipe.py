"""The smallest recipe, linear regression: what a stranger's package would hold. ``test_linear_recipe`` installs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch

from headwater_recipes.common.command import command
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.serving import BadInput, check_names
from headwater_recipes.common.settings import Training
from headwater_recipes.common.task import Batch, Task


class LinearSettings(Training, frozen=True, kw_only=True):
    noise: Annotated[float, Option("Standard deviation of y around the plane. Default: {default}.", above=0)] = 0.1
    lr: float = 0.3
    warmup: int = 5
    weight_decay: float = 0.0


class Linear(Task[LinearSettings]):
    recipe = Recipe("plane", "Fit y = βx.", "linear_recipe:Linear", LinearSettings, served="linear_recipe:Plane")

    def build(self) -> torch.nn.Module:
        torch.manual_seed(self.settings.seed)
        return torch.nn.Linear(3, 1)

    def drawn(self, seed: int) -> Batch:
        random = torch.Generator().manual_seed(seed)
        x, noise = torch.randn(32, 3, generator=random), torch.randn(32, 1, generator=random)
        return Batch((x, x @ torch.tensor([[1.0], [-2.0], [3.0]]) + 4 + self.settings.noise * noise), 32, 32)

    def batches(self, step: int) -> list[Batch]:
        return [self.drawn(1 + step * self.world + self.rank)]

    def held_out(self, whole: bool) -> list[Batch]:
        return [self.drawn(-1 - self.rank)]

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        x, y = batch.inputs
        return torch.nn.functional.mse_loss(model(x), y, reduction="sum")


class Plane:
    """``headwater serve`` of a run: rows of x in, y of each out."""

    task = "tabular-regression"

    @classmethod
    def read(cls, folder: Path) -> tuple[torch.nn.Module, Plane]:
        return Linear(LinearSettings(), folder, 0, 1).read(folder), cls()

    def inputs(self, body: bytes, content_type: str) -> torch.Tensor:
        try:
            return torch.tensor(json.loads(body), dtype=torch.float32).reshape(-1, 3)
        except (ValueError, TypeError, RuntimeError):
            raise BadInput('this model takes rows of three numbers: {"inputs": [[1, 2, 3]]}') from None

    def answer(self, model: torch.nn.Module, inputs: torch.Tensor, parameters: Mapping[str, Any]) -> list[float]:
        check_names(parameters, ())
        return model(inputs).flatten().tolist()


train = command(Linear.recipe)
