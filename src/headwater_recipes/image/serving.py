"""A run's model over HTTP: an image's bytes in, the likeliest classes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from headwater_recipes.common.serving import BadInput, classes
from headwater_recipes.image import model
from headwater_recipes.images.decode import TooLarge, Unreadable, read_image, square
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
        if not content_type.startswith("image/") and content_type != "application/octet-stream":
            raise BadInput(f"this model takes the bytes of an image, not {content_type}", 415)
        try:
            image = read_image(body)
        except TooLarge as error:
            raise BadInput(f"the image is too large: {error}; nothing was answered", 413) from error
        except Unreadable as error:
            raise BadInput(f"the image cannot be read: {error}; nothing was answered") from error
        return self._scale.tensor(square(image, self._size)[None])

    def answer(self, model: nn.Module, inputs: torch.Tensor, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``[{"label", "score"}]``, likeliest first."""
        return classes(model(pixel_values=inputs).logits[0], self._labels, parameters)
