"""One image: from a file or from bytes to RGB pixels, by Pillow.

What becomes of the kinds of images that there are:

- the first frame of an animation; turned and mirrored as its EXIF orientation says;
- modes 1, L, P, CMYK, YCbCr, LAB and HSV are converted, and of RGBA, LA and PA the transparency is dropped: what
  ``transformers`` and torchvision do with a file, so that a model sees there what it saw here;
- 16-bit grey keeps its upper 8 bits; modes I and F, whose range nothing states, are refused;
- above ``MOST_PIXELS`` it is refused by its header, before anything is decoded.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485
"""Pillow's own bound, above which it warns of decompression bombs: a quarter of a gigabyte of RGB."""

Pixels = npt.NDArray[np.uint8]


class Unreadable(Exception):
    """An image that cannot be read; the message says why."""


class TooLarge(Unreadable):
    """It has more than ``MOST_PIXELS``."""


def read_image(source: Path | bytes) -> Image:
    """The image in mode RGB, upright.

    Raises:
        Unreadable: it is no image, or cut off, or of a mode that has no stated range. TooLarge: too many pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise TooLarge(f"{image.width} × {image.height} pixels are above {MOST_PIXELS:,}")
            return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from error
    except Unreadable:
        raise
    except Exception as error:  # on damaged bytes Pillow's decoders raise what they like
        told = "not an image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Unreadable(told or type(error).__name__) from error


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Unreadable(f"mode {image.mode} has no stated range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def square(image: Image, size: int) -> Pixels:
    """Pixels of shape (size, size, 3): resized bilinearly, whatever the image's aspect.

    It is what the image processor of a run's folder does, see ``store.Scale.processor``.
    """
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)
