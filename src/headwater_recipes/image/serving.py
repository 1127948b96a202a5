"""A run's model over HTTP: an image's bytes in, the likeliest classes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from headwater_recipes.common.serving import classes
from headwater_recipes.image import model
from headwater_recipes.images.serving import image_pixels
from headwater_recipes.images.store import Scale


class ImageServed:
    """``common.serving.Served`` of https://huggingface.co/docs/inference-providers/tasks/image-classification."""

    task = "image-classification"

    def __init__(self, scale: Scale, size: int, labels: list[str]) -> None:
        self._scale, self._size, self._labels = scale, size, labels

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        """See ``Served``."""
        module = model.read(folder).eval()
        names = module.config.id2label
        return module, cls(Scale.read(folder), Scale.read_size(folder), [names[index] for index in range(len(names))])

    def inputs(self, body: bytes, content_type: str) -> torch.Tensor:
        """Pixels of shape (1, 3, size, size)."""
        return image_pixels(body, content_type, self._scale, self._size)

    def answer(self, model: nn.Module, inputs: torch.Tensor, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``[{"label", "score"}]``, likeliest first."""
        return classes(model(pixel_values=inputs).logits[0], self._labels, parameters)
