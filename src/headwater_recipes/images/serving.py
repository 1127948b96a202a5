"""What a client sends as an image, for ``common.serving.Served``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwater_recipes.common.serving import BadInput
from headwater_recipes.images.decode import TooLarge, Unreadable, read_image, square
from headwater_recipes.images.store import Scale

if TYPE_CHECKING:
    from PIL.Image import Image


def image_pixels(body: bytes, content_type: str, scale: Scale, size: int) -> torch.Tensor:
    """Pixels of shape (1, 3, size, size) as the model is given them. Raises ``BadInput``, see ``read_sent``."""
    return scale.tensor(square(read_sent(body, content_type), size)[None])


def read_sent(body: bytes, content_type: str) -> Image:
    """The image that a client sent, in mode RGB, upright.

    Raises ``BadInput``: 415, it is not sent as an image; 413, it has too many pixels; 400, it cannot be read.
    """
    if not content_type.startswith("image/") and content_type != "application/octet-stream":
        raise BadInput(f"this model takes the bytes of an image, not {content_type}", 415)
    try:
        return read_image(body)
    except TooLarge as error:
        raise BadInput(f"the image is too large: {error}; nothing was answered", 413) from error
    except Unreadable as error:
        raise BadInput(f"the image cannot be read: {error}; nothing was answered") from error
