"""What is trained: a detector, on pieces of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from headwater_recipes.common.task import Batch, Ended, Task
from headwater_recipes.detection import data, report, tiles
from headwater_recipes.detection import model as network
from headwater_recipes.detection.model import Detector, NetworkSettings
from headwater_recipes.detection.settings import RECIPE, DetectionSettings
from headwater_recipes.detection.tiles import Tile

PERIODIC = 32
"""Pieces of a periodic validation, over all workers; the final one takes all."""
TOGETHER = 8


class Detection(Task[DetectionSettings]):
    """What is counted are pieces of images, as many for each worker: the mean over workers is that over all pieces."""

    recipe = RECIPE

    def __init__(self, settings: DetectionSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        prepared = data.load(folder)
        self.pictures, self._measures = prepared.pictures, prepared.measures

    @classmethod
    def prepare(cls, settings: DetectionSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def build(self) -> torch.nn.Module:
        torch.manual_seed(self.settings.seed)
        labels, s = tuple(self.pictures.classes), self.settings
        return Detector(
            NetworkSettings(labels=labels, tile=s.tile, width=s.width, **msgspec.structs.asdict(self._measures))
        )

    def batches(self, step: int) -> Sequence[Batch]:
        random = np.random.default_rng([self.settings.seed, step, self.rank])
        side = self.settings.tile
        return [_batch([tiles.drawn(self.pictures.training, side, random) for _ in range(self.settings.batch)])]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        side = self.settings.tile
        places = [(each, at) for each in self.pictures.held_out for at in tiles.grid(each.width, each.height, side)]
        if not whole:
            places = [places[i] for i in np.linspace(0, len(places) - 1, min(PERIODIC, len(places))).astype(int)]
        mine = places[self.rank :: self.world]
        for first in range(0, len(mine), TOGETHER):
            some = mine[first : first + TOGETHER]
            yield _batch([tiles.cut(picture, left, top, side) for picture, (left, top) in some])

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        pixels, boxes, labels = batch.inputs
        return network.loss(model(_detector(model).scale(pixels)), boxes, labels, self._measures.size).sum()

    def write(self, model: torch.nn.Module, folder: Path) -> None:
        _detector(model).save_pretrained(folder)

    def read(self, folder: Path) -> torch.nn.Module:
        return Detector.from_pretrained(folder)

    def verify(self, model: torch.nn.Module) -> float:
        pixels = next(iter(self.held_out(whole=False))).inputs[0]
        model.eval()
        with torch.no_grad():
            ours, theirs = (each(_detector(each).scale(pixels)) for each in (model, self.read(self.folder).eval()))
        return max(float((mine - other).abs().max()) for mine, other in zip(ours, theirs, strict=True))

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self.folder, self.pictures, _detector(self.read(self.folder)), ended)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        del ended
        report.tell(self.folder, figures, console)


def _detector(model: torch.nn.Module) -> Detector:
    """The network itself, of one that DDP wraps too."""
    found = getattr(model, "module", model)
    assert isinstance(found, Detector)
    return found


def _batch(chosen: list[Tile]) -> Batch:
    pixels = torch.from_numpy(np.stack([each.pixels for each in chosen]))
    boxes, labels = ([torch.from_numpy(np.ascontiguousarray(tile[at])) for tile in chosen] for at in (1, 2))
    return Batch((pixels, boxes, labels), len(chosen), len(chosen))
