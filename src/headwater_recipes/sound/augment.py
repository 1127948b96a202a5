"""Other voices, microphones and rooms: what is drawn for each sound that is learnt from, and each time anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def augmented(mel_btm: Tensor, lengths_b: Tensor, random: torch.Generator) -> Tensor:
    """(B, T, M) to (B, T, M): bands and frames shifted and stretched, another loudness of bands, noise, gaps.

    Stretching along the bands is what another length of the vocal tract does (Jaitly and Hinton 2013), the gaps are
    SpecAugment's (Park and others 2019). Frames after a sound's end are as they come.
    """
    batch, _, bands = mel_btm.shape
    x = _warped(mel_btm, random) + _coloured(batch, bands, random)
    x = torch.logaddexp(x, _noise(x, lengths_b, random))
    return _with_gaps(x, random)


def _uniform(count: int, low: float, high: float, random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=random)


def _warped(x: Tensor, random: torch.Generator) -> Tensor:
    """Frames stretched by up to 15 % from the beginning; bands by up to 12 % and shifted by up to 4 %."""
    batch, frames, bands = x.shape
    theta = torch.zeros(batch, 2, 3)
    stretch = _uniform(batch, 0.87, 1.15, random)
    theta[:, 0, 0] = _uniform(batch, 0.88, 1.12, random)
    theta[:, 0, 2] = _uniform(batch, -0.08, 0.08, random)
    theta[:, 1, 1], theta[:, 1, 2] = stretch, stretch - 1
    grid = F.affine_grid(theta, [batch, 1, frames, bands], align_corners=False)
    return F.grid_sample(x[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _coloured(batch: int, bands: int, random: torch.Generator) -> Tensor:
    """(B, 1, M): a smooth curve over the bands, in nats; a microphone."""
    places = torch.linspace(0, math.pi, bands)
    waves = torch.stack([torch.cos(k * places) for k in range(1, 5)])
    return (0.5 * torch.randn(batch, 4, generator=random) @ waves)[:, None]


def _noise(x: Tensor, lengths_b: Tensor, random: torch.Generator) -> Tensor:
    """Log power of a steady noise, 3 to 40 dB below the sound's mean power, of some colour."""
    batch, frames, bands = x.shape
    inside = (torch.arange(frames)[None] < lengths_b[:, None])[..., None]
    power = (x.exp() * inside).sum((1, 2)) / (lengths_b * bands)
    level = power.clamp(min=1e-12).log() - _uniform(batch, 3, 40, random) * math.log(10) / 10
    flicker = torch.rand(batch, frames, bands, generator=random).clamp(min=1e-4)
    return level[:, None, None] + _coloured(batch, bands, random) + torch.log(-torch.log(flicker)).clamp(min=-6)


def _with_gaps(x: Tensor, random: torch.Generator) -> Tensor:
    """One gap of up to 6 bands and one of up to 12 frames, at the sound's mean."""
    batch, frames, bands = x.shape
    filler = x.mean((1, 2), keepdim=True)
    for size, axis, most in ((bands, 2, 6), (frames, 1, 12)):
        start, width = _uniform(batch, 0, size, random).floor(), _uniform(batch, 0, most, random).floor()
        places = torch.arange(size)[None]
        gap = (places >= start[:, None]) & (places < (start + width)[:, None])
        x = torch.where(gap[:, None, :] if axis == 2 else gap[:, :, None], filler, x)
    return x
