"""The classifier: a small convolutional network on log-mel spectrograms."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater_recipes.common import checkpoint
from headwater_recipes.sound.features import MelSettings


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json``: all that a program needs to make the network and what goes into it. ``frames`` is the longest
    piece of a sound that it looks at at once; what it finds is averaged over ``parts`` of it, which overlap: with more
    than one it knows what came first.
    """

    labels: tuple[str, ...]
    mel: MelSettings
    frames: int
    width: int = 32
    parts: int = 1
    dropout: float = 0.2
    model_type: str = "headwater-sound"
    architectures: tuple[str, ...] = ("headwater_recipes.sound.network:SoundNetwork",)


class SoundNetwork(nn.Module):
    """(B, T, M) log-mel with (B,) lengths in frames, to (B, C) logits.

    Each band's mean over the sound is taken away first, as it tells the microphone. Group norm, not batch norm: no
    statistics that each worker would have of its own.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        w = settings.width
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in [(1, w // 2), (w // 2, w), (w, 2 * w), (2 * w, 2 * w)]
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, after) for after in (w // 2, w, 2 * w, 2 * w))
        high = settings.mel.mels // 8
        self.over_time = nn.Conv1d(2 * w * high, 4 * w, 5, padding=2, bias=False)
        self.norm_over_time = nn.GroupNorm(4, 4 * w)
        self.dropout = nn.Dropout(settings.dropout)
        self.embedding = nn.Linear(4 * w * (1 + settings.parts), 2 * w)
        self.out = nn.Linear(2 * w, len(settings.labels))

    def embed(self, mel_btm: Tensor, lengths_b: Tensor) -> Tensor:
        """(B, 2 × width): what the labels are told from."""
        inside_bt = torch.arange(mel_btm.shape[1])[None] < lengths_b[:, None]
        x = _normalised(mel_btm, inside_bt)[:, None]
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if index < 3:
                x = F.max_pool2d(x, 2)
        x = F.relu(self.norm_over_time(self.over_time(_stack(x))))
        inside_bt = inside_bt[:, ::8][:, : x.shape[2]]
        means = torch.einsum("bct,bpt->bpc", x, _weights(inside_bt, self.settings.parts).to(x.dtype)).flatten(1)
        most = x.masked_fill(~inside_bt[:, None], 0).amax(2)
        # Not a ReLU: in this narrow place it died at a rate that was a little too high.
        return F.gelu(self.embedding(self.dropout(torch.cat([means, most], 1))))

    def forward(self, mel_btm: Tensor, lengths_b: Tensor) -> Tensor:
        return self.out(self.dropout(self.embed(mel_btm, lengths_b)))  # type: ignore[no-any-return]

    def save_pretrained(self, folder: Path) -> None:
        """``model.safetensors`` and ``config.json``."""
        checkpoint.write_network(self, self.settings, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Raises ``DataError`` if a file is missing, damaged or not of this network."""
        return checkpoint.read_network(cls, NetworkSettings, folder)


def _stack(x_bcmt: Tensor) -> Tensor:
    """(B, C, T, M) to (B, C × M, T)."""
    return x_bcmt.transpose(2, 3).flatten(1, 2)


def _weights(inside_bt: Tensor, parts: int) -> Tensor:
    """(B, P, T): each part's weights add up to 1; hats over the inside of a sound, at equal distances."""
    inside = inside_bt.float()
    if parts == 1:
        weights = inside[:, None]
    else:
        last = (inside.sum(1, keepdim=True) - 1).clamp(min=1)
        place = torch.arange(inside.shape[1])[None] / last * (parts - 1)
        weights = (1 - (place[:, None] - torch.arange(parts)[None, :, None]).abs()).clamp(min=0.01) * inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def _normalised(mel_btm: Tensor, inside_bt: Tensor) -> Tensor:
    inside = inside_bt[..., None]
    count = inside.sum(1, keepdim=True).clamp(min=1)
    centred = (mel_btm - (mel_btm * inside).sum(1, keepdim=True) / count) * inside
    deviation = (centred.square().sum((1, 2), keepdim=True) / (count * mel_btm.shape[2])).sqrt()
    return centred / (deviation + 0.1)


def pieces(mel_tm: Tensor, frames: int, most: int = 16) -> tuple[Tensor, Tensor]:
    """A sound as (P, ``frames``, M) and their (P,) lengths: side by side, the last one flush with its end; of a sound
    of more than ``most`` pieces as many, at equal distances.
    """
    total = len(mel_tm)
    count = min(most, -(-total // frames))
    last = max(0, total - frames)
    starts = [round(last * place / max(1, count - 1)) for place in range(count)]
    found = [mel_tm[start : start + frames].float() for start in starts]
    padded = torch.stack([F.pad(each, (0, 0, 0, frames - len(each))) for each in found])
    return padded, torch.tensor([len(each) for each in found])


def logits_of(model: SoundNetwork, mel_tm: Tensor) -> Tensor:
    """(C,): the mean of log-probabilities over a sound's pieces."""
    return F.log_softmax(model(*pieces(mel_tm, model.settings.frames)), 1).mean(0)


def embedding_of(model: SoundNetwork, mel_tm: Tensor) -> Tensor:
    """(E,): the mean over a sound's pieces."""
    return model.embed(*pieces(mel_tm, model.settings.frames)).mean(0)
