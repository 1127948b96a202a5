"""A task whose samples are labelled images, which the run folder keeps as pixels."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch

from headwater import pretrained
from headwater_recipes.common import checkpoint
from headwater_recipes.common.settings import AnySettings
from headwater_recipes.common.task import Batch, Task
from headwater_recipes.images.decode import Pixels
from headwater_recipes.images.store import Images, Labels, Scale

_VERIFIED = 16
"""Images on which the saved model is compared with that in training."""


class ImageTask(Task[AnySettings]):
    """A batch's inputs are pixels as the model is given them, float32 (B, 3, S, S), and labels, int64 (B,)."""

    def __init__(self, settings: AnySettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        pretrained.quiet()
        self.images = Images.load(folder)
        self.scale = Scale.read(folder)

    @abstractmethod
    def outputs(self, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """What the model says of images: (B, …)."""

    def batch(self, pixels: Pixels, labels: Labels) -> Batch:
        """(B, S, S, C) pixels and their labels."""
        return Batch((self.scale.tensor(pixels), torch.from_numpy(labels)), len(labels), len(labels))

    def write(self, model: torch.nn.Module, folder: Path) -> None:
        checkpoint.write_model(model, folder)
        self.scale.processor(self.images.size).save_pretrained(folder)

    def verify(self, model: torch.nn.Module) -> float:
        pixels = self.scale.tensor(self.images.held_out.pixels[:_VERIFIED])
        model.eval()
        with torch.no_grad():
            ours, theirs = (self.outputs(each, pixels) for each in (model, self.read(self.folder).eval()))
        return float((ours - theirs).abs().max())
