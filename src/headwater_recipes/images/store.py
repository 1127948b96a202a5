"""Pixels and labels as a run folder keeps them, and how pixels become what a model is given.

Legend: N images, S side in pixels, C channels (1 if all images are grey, else 3).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from headwater.errors import DataError
from headwater_recipes.images.decode import Pixels

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Labels = npt.NDArray[np.int64]

_SPLITS = ("training", "held_out")


class Split(NamedTuple):
    """``pixels`` uint8 of shape (N, S, S, C); ``labels`` int64 of shape (N,), indices of classes."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True)
class Images:
    """Labelled images. ``classes``: their names, which labels are indices of."""

    classes: tuple[str, ...]
    training: Split
    held_out: Split

    @property
    def size(self) -> int:
        """S."""
        return int(self.training.pixels.shape[1])

    def check(self, workers: int) -> Self:
        """Raises ``DataError`` if nothing can be learnt, or known, from them."""
        if len(self.classes) < 2:
            raise DataError(f"the images have {len(self.classes)} class; to tell classes apart takes two or more")
        for name, split in zip(_SPLITS, (self.training, self.held_out), strict=True):
            _check_labels(name, split.labels, self.classes)
        if len(self.training.labels) < workers:
            raise DataError(
                f"{len(self.training.labels)} images to train on are fewer than the {workers} workers; give more "
                f"images or fewer --workers"
            )
        if not len(self.held_out.labels):
            raise DataError("no image is held out, so nothing could be said of the model; give more of each class")
        return self

    def save(self, folder: Path) -> None:
        """Write them into a run folder."""
        (folder / "classes.json").write_text(json.dumps(self.classes, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, split in zip(_SPLITS, (self.training, self.held_out), strict=True):
            np.save(folder / f"{name}-images.npy", split.pixels)
            np.save(folder / f"{name}-labels.npy", split.labels)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What ``save`` wrote; pixels stay on the disk until they are asked for. Raises ``DataError``."""
        try:
            classes = tuple(json.loads((folder / "classes.json").read_text(encoding="utf-8")))
            splits = [
                Split(np.load(folder / f"{name}-images.npy", mmap_mode="r"), np.load(folder / f"{name}-labels.npy"))
                for name in _SPLITS
            ]
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: the prepared images cannot be read ({error})") from error
        return cls(classes, *splits)


def _check_labels(name: str, labels: Labels, classes: Sequence[str]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(
            f"label {labels[wrong[0]]} of image {wrong[0]} ({name.replace('_', ' ')}) is out of range: there are "
            f"{len(classes)} classes, 0 to {len(classes) - 1}"
        )


class Scale(NamedTuple):
    """How pixels become numbers around 0: divided by 255, then less ``mean``, then divided by ``deviation``."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, pixels: Pixels, most: int = 10_000) -> Self:
        """Mean and standard deviation of each of three channels, over evenly spaced images."""
        some = pixels[:: max(1, len(pixels) // most)].astype(np.float32) / 255
        some = some.reshape(-1, some.shape[-1]).astype(np.float64)
        spread = np.maximum(some.std(0), 1 / 255)  # images of one colour
        return cls(*(tuple(float(value) for value in np.broadcast_to(each, 3)) for each in (some.mean(0), spread)))

    def tensor(self, pixels: Pixels) -> torch.Tensor:
        """(N, S, S, C) pixels as float32 of shape (N, 3, S, S)."""
        values = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        mean, deviation = (torch.tensor(each).view(1, 3, 1, 1) for each in self)
        return (values - mean) / deviation

    def processor(self, size: int) -> BaseImageProcessor:
        """What makes the same of an image file elsewhere: its configuration is the run's
        ``preprocessor_config.json``, which ``AutoImageProcessor`` reads.
        """
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        options: dict[str, Any] = {"image_mean": list(self.mean), "image_std": list(self.deviation), "resample": 2}
        return ViTImageProcessorPil(size={"height": size, "width": size}, **options)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the ``preprocessor_config.json`` of a folder. Raises ``DataError``."""
        found = _processor(folder)
        return cls(tuple(found["image_mean"]), tuple(found["image_std"]))

    @staticmethod
    def read_size(folder: Path) -> int:
        """S, from there as well."""
        return int(_processor(folder)["size"]["height"])


def _processor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: it cannot be read ({error})") from error
    missing = [name for name in ("image_mean", "image_std", "size") if name not in found]
    if missing:
        raise DataError(f"{path}: it says nothing of {missing[0]}")
    return found
