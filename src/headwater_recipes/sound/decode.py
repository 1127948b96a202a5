"""A sound file to samples, by libsndfile (wav with PCM, µ-law or GSM 6.10, ogg with Vorbis or Opus, flac, mp3, …)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headwater.errors import DataError

MOST_SECONDS = 30.0
"""Of a longer sound the beginning is read, so that one of an hour costs neither memory nor time."""

_SILENT = 1e-4
"""A peak below this (-80 dB of full scale) is silence: three steps of 16 bits."""


class Unreadable(DataError):
    """These bytes are no sound that can be read; the message says why."""


class Silent(Unreadable):
    """There is nothing to hear in it."""


class Sound(NamedTuple):
    """``samples``: float32 (N,), from -1 to 1, at ``rate`` per second; ``cut``: whether there was more of it."""

    samples: npt.NDArray[np.float32]
    rate: int
    cut: bool


def decode(source: Path | bytes, rate: int, most: float = MOST_SECONDS) -> Sound:
    """Samples of a sound.

    Several channels are averaged; any rate is resampled (soxr, high quality); 8 bits and others are scaled to -1 … 1.
    A file whose end is missing gives what is there.

    Args:
        source: a file, or its bytes.
        rate: samples per second that are wanted.
        most: seconds that are read from the beginning.

    Raises:
        Unreadable: it is none of libsndfile's formats, damaged, or has no sample, or samples that are no numbers.
        Silent: its peak is below -80 dB of full scale.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            own = int(file.samplerate)
            wanted = int(most * own)
            found = file.read(wanted + 1, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise Unreadable(f"this is no sound that can be read ({_short(error)})") from None
    mono = found[:wanted].mean(axis=1, dtype=np.float32)
    if mono.size == 0:
        raise Unreadable("there is no sample in this sound")
    if not np.isfinite(mono).all():
        raise Unreadable("samples of this sound are no numbers (NaN or infinite)")
    if float(np.abs(mono).max()) < _SILENT:
        raise Silent("this sound is silent (below -80 dB of full scale)")
    samples = mono if own == rate else soxr.resample(mono, own, rate)
    if samples.size == 0:
        raise Unreadable(f"this sound is too short: {mono.size} samples at {own} Hz")
    return Sound(np.clip(samples, -1, 1).astype(np.float32), rate, len(found) > wanted)


def _short(error: Exception) -> str:
    """libsndfile's words, without the name of Python's buffer."""
    return str(error).split(": ", 1)[-1].rstrip(".")
