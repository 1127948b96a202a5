"""A run's model over HTTP: an image's bytes in, the vector where the face lies out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from headwater_recipes.common.serving import check_names
from headwater_recipes.faces.model import embed_both, read
from headwater_recipes.images.serving import image_pixels
from headwater_recipes.images.store import Scale


class FacesServed:
    """``common.serving.Served``. The cosine (dot product) of two answers says how alike two faces are."""

    task = "image-feature-extraction"

    def __init__(self, scale: Scale, size: int) -> None:
        self._scale, self._size = scale, size

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        """See ``Served``."""
        return read(folder).eval(), cls(Scale.read(folder), Scale.read_size(folder))

    def inputs(self, body: bytes, content_type: str) -> torch.Tensor:
        """Pixels of shape (1, 3, size, size)."""
        return image_pixels(body, content_type, self._scale, self._size)

    def answer(self, model: nn.Module, inputs: torch.Tensor, parameters: Mapping[str, Any]) -> list[float]:
        """D numbers, a vector of length one."""
        check_names(parameters, ())
        found: list[float] = embed_both(model, inputs)[0].tolist()
        return found
