"""Log-mel spectrograms and what the classical baselines are made of."""

from __future__ import annotations

import functools

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_FLOOR = 1e-6
"""Added to the power of a band before its logarithm: the noise of 16 bits, so that digital silence is no outlier."""


class MelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``rate`` in samples per second; a window of ``window`` s every ``hop`` s; ``mels`` bands up to half the rate."""

    rate: int = 8000
    window: float = 0.032
    hop: float = 0.01
    mels: int = 40

    @property
    def frames_per_second(self) -> int:
        """100 for a hop of 10 ms."""
        return round(1 / self.hop)


def log_mel(samples: npt.NDArray[np.float32], settings: MelSettings) -> Tensor:
    """float32 (T, M): natural logarithms of the power in M mel bands (Slaney's scale) of T frames.

    Frames at both ends that are 40 dB or more below the loudest are left out: how long someone waits before speaking
    says how it was recorded, not what was said.
    """
    length = round(settings.window * settings.rate)
    padded = torch.nn.functional.pad(torch.from_numpy(samples), (0, max(0, length - len(samples))))
    hop = round(settings.hop * settings.rate)
    spectrum = torch.stft(
        padded, length, hop, window=torch.hann_window(length), center=True, pad_mode="constant", return_complex=True
    )
    power_tm = spectrum.abs().square().T @ _bank(length, settings)
    return torch.log(power_tm[_heard(power_tm)] + _FLOOR)


def _heard(power_tm: Tensor) -> slice:
    loud = power_tm.sum(1)
    places = torch.nonzero(loud >= loud.max() * 1e-4).flatten()
    return slice(int(places[0]), int(places[-1]) + 1)


@functools.lru_cache(maxsize=8)
def _bank(length: int, settings: MelSettings) -> Tensor:
    """(length / 2 + 1, M)."""
    from transformers.audio_utils import mel_filter_bank

    return torch.from_numpy(
        mel_filter_bank(
            num_frequency_bins=length // 2 + 1,
            num_mel_filters=settings.mels,
            min_frequency=60.0,
            max_frequency=settings.rate / 2,
            sampling_rate=settings.rate,
            mel_scale="slaney",
        )
    ).float()


def mfcc(mel_tm: Tensor, count: int = 20) -> Tensor:
    """Mel-frequency cepstral coefficients, (T, count): the orthonormal cosine transform of the bands
    (Davis and Mermelstein 1980), each less its mean over the sound.
    """
    bands = mel_tm.shape[1]
    places = torch.arange(bands, dtype=torch.float32) + 0.5
    basis = torch.cos(torch.pi / bands * places[:, None] * torch.arange(count)) * (2 / bands) ** 0.5
    basis[:, 0] /= 2**0.5
    found: Tensor = mel_tm @ basis
    return found - found.mean(0)


def statistics(mel_tm: Tensor) -> Tensor:
    """(80,): how the cepstral coefficients 1 to 20 and their differences spread over a sound: standard deviation, and
    the mean of absolute differences from frame to frame, over the sound and over each of its halves.
    """
    found = mfcc(mel_tm, 21)[:, 1:]
    if len(found) < 2:
        found = found.repeat(2, 1)
    steps = found.diff(dim=0)
    half = max(1, len(steps) // 2)
    return torch.cat([found.std(0), steps.abs().mean(0), steps[:half].abs().mean(0), steps[-half:].abs().mean(0)])


def in_equal_parts(mel_tm: Tensor, parts: int = 12) -> Tensor:
    """(parts × 20,): cepstral coefficients at equal places of a sound, whatever its length."""
    found = mfcc(mel_tm, 21)[:, 1:]
    return torch.nn.functional.interpolate(found.T[None], size=parts, mode="linear", align_corners=True)[0].flatten()
