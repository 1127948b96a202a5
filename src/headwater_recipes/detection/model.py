"""The detector: objects as points (Zhou, Wang and Krähenbühl 2019, arXiv:1904.07850), small and from scratch.

Of every fourth pixel, both ways, it tells for each class how likely the middle of a box is there, how far from it the
middle lies, and how large the box is. Peaks are boxes; none has to be suppressed.

Legend: B images, H and W their pixels, multiples of 16; C classes; h, w a quarter of H, W; K boxes.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater_recipes.common import checkpoint

STRIDE = 4
MULTIPLE = 16
"""Of what the sides of an image must be."""


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json``. ``size``: mean width and height of the boxes that were learnt from, in pixels. ``mean`` and
    ``deviation``: of each channel, 0 to 1.
    """

    labels: tuple[str, ...]
    size: tuple[float, float]
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    tile: int = 192
    width: int = 32
    model_type: str = "headwater-detector"
    architectures: tuple[str, ...] = ("headwater_recipes.detection.model:Detector",)


class Told(NamedTuple):
    """``heat`` (B, C, h, w) logits; ``size`` (B, 2, h, w): log of width and height by the mean box; ``offset`` (B, 2,
    h, w): of the middle, x and y, from the cell's corner, in cells.
    """

    heat: Tensor
    size: Tensor
    offset: Tensor


def _layer(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(8, after), nn.ReLU(inplace=True)
    )


class ResidualBlock(nn.Module):
    """Two layers, and what goes in added to what comes out (He and others 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _layer(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Detector(nn.Module):
    """Down to a sixteenth and up again to a quarter, with what was there on the way added (a small U-Net)."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        w = settings.width
        widths = (2 * w, 3 * w, 4 * w)
        self.stem = nn.Sequential(_layer(3, w, 2), _layer(w, 2 * w, 2), ResidualBlock(2 * w))
        self.down = nn.ModuleList(
            nn.Sequential(_layer(before, after, 2), ResidualBlock(after))
            for before, after in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(nn.Conv2d(after, before, 1) for before, after in itertools.pairwise(widths))
        self.merge = nn.ModuleList(_layer(each, each) for each in widths[:-1])
        self.head = _layer(2 * w, 2 * w)
        self.out = nn.Conv2d(2 * w, len(settings.labels) + 4, 1)
        first = [-4.0] * len(settings.labels) + [0.0] * 2 + [0.5] * 2  # few cells hold a middle (Lin and others 2017)
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.out.bias = nn.Parameter(torch.tensor(first))

    def forward(self, pixels: Tensor) -> Told:
        """(B, 3, H, W) float32, scaled by ``mean`` and ``deviation``."""
        x = self.stem(pixels)
        passed = [x]
        for down in self.down:
            x = down(x)
            passed.append(x)
        for level in (1, 0):
            x = F.interpolate(self.up[level](x), scale_factor=2.0, mode="nearest")
            x = self.merge[level](x + passed[level])
        found = self.out(self.head(x)).float()
        return Told(found[:, :-4], found[:, -4:-2], found[:, -2:])

    def scale(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to what ``forward`` takes."""
        mean, deviation = (
            torch.tensor(each).view(1, 3, 1, 1) for each in (self.settings.mean, self.settings.deviation)
        )
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / deviation

    def save_pretrained(self, folder: Path) -> None:
        """``model.safetensors`` and ``config.json``."""
        checkpoint.write_network(self, self.settings, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Raises ``DataError`` if a file is missing, damaged or not of this network."""
        return checkpoint.read_network(cls, NetworkSettings, folder)


def loss(told: Told, boxes: list[Tensor], labels: list[Tensor], size: tuple[float, float]) -> Tensor:
    """(B,) of each image the sum over its cells and boxes: the paper's equations 1, 2 and (of sizes as logarithms by
    the mean box, so that large and small count alike) 3, per ten boxes.

    Args:
        boxes: B times (K, 4), in pixels; a middle inside the image.
        labels: B times (K,).
        size: see ``NetworkSettings``.
    """
    found = []
    for image, (each, label) in enumerate(zip(boxes, labels, strict=True)):
        heat = told.heat[image]
        target = heat_of(each, label, heat.shape)
        sure = F.logsigmoid(heat), F.logsigmoid(-heat)
        shares = heat.sigmoid()
        is_middle = target == 1
        missed = -(sure[0] * (1 - shares).square())[is_middle].sum()
        wrong = -(sure[1] * shares.square() * (1 - target).pow(4))[~is_middle].sum()
        total = missed + wrong
        if len(each):
            middle, extent = _measures(each)
            x, y = _cells(middle, heat.shape).T
            total = total + (told.offset[image][:, y, x].T - (middle / STRIDE - torch.stack([x, y], 1))).abs().sum()
            wanted = (extent / torch.tensor(size)).log()
            total = total + (told.size[image][:, y, x].T - wanted).abs().sum()
        found.append(total / 10)
    return torch.stack(found)


def heat_of(boxes: Tensor, labels: Tensor, shape: torch.Size) -> Tensor:
    """(C, h, w): 1 at middles, falling off as a bell whose width is a sixth of the box's (each way by itself)."""
    heat = torch.zeros(shape)
    if not len(boxes):
        return heat
    middle, extent = _measures(boxes)
    cells = _cells(middle, shape)
    spread = (extent / STRIDE / 6).clamp(min=0.5)
    across = torch.arange(shape[2])[None] - cells[:, :1]
    along = torch.arange(shape[1])[None] - cells[:, 1:]
    bells = (
        torch.exp(-(along / spread[:, 1:]).square() / 2)[:, :, None]
        * torch.exp(-(across / spread[:, :1]).square() / 2)[:, None]
    )
    for bell, label in zip(bells, labels.tolist(), strict=True):
        torch.maximum(heat[label], bell, out=heat[label])
    return heat


def _measures(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(K, 2) middles and (K, 2) extents."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def _cells(middle: Tensor, shape: torch.Size) -> Tensor:
    """(K, 2) x and y of the cells that middles are in."""
    most = torch.tensor([shape[2] - 1, shape[1] - 1])
    return torch.minimum((middle / STRIDE).long().clamp(min=0), most)


class Detections(NamedTuple):
    """Boxes (K, 4) in pixels, scores (K,) of 0 to 1 and labels (K,), surest first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def peaks(told: Told, size: tuple[float, float], least: float, most: int) -> list[Detections]:
    """Of each image the cells that are surer than their eight neighbours, up to ``most`` of score ``least`` or more."""
    shares = told.heat.sigmoid()
    highest = F.max_pool2d(shares, 3, 1, 1) == shares
    found = []
    for image, (share, high) in enumerate(zip(shares, highest, strict=True)):
        label, y, x = torch.nonzero(high & (share >= least), as_tuple=True)
        scores, order = share[label, y, x].sort(descending=True, stable=True)
        label, y, x = (each[order][:most] for each in (label, y, x))
        middle = (torch.stack([x, y], 1) + told.offset[image][:, y, x].T) * STRIDE
        half = told.size[image][:, y, x].T.clamp(-4, 4).exp() * torch.tensor(size) / 2
        found.append(Detections(torch.cat([middle - half, middle + half], 1), scores[:most], label))
    return found
