"""Sounds of every kind that people have: read as they sound, or refused with the reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from headwater_recipes.sound.decode import Silent, Unreadable, decode

RATE = 8000


def tone(rate: int, seconds: float = 0.5, hertz: float = 440, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    place = io.BytesIO()
    soundfile.write(place, samples, rate, format=kind, subtype=subtype)
    return place.getvalue()


def loudest(samples: np.ndarray) -> float:
    """The frequency in Hz with the most power."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples))


@pytest.mark.parametrize("rate", [4000, 8000, 22_050, 44_100, 96_000])
def test_any_rate_is_brought_to_one(rate: int) -> None:
    found = decode(encoded(tone(rate), rate), RATE)
    assert (found.rate, found.cut, found.samples.dtype) == (RATE, False, np.float32)
    assert len(found.samples) == pytest.approx(RATE / 2, abs=2)
    assert loudest(found.samples) == pytest.approx(440, abs=3)
    assert np.abs(found.samples[500:-500]).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "subtype", "near"),
    [
        ("WAV", "PCM_U8", 0.02),
        ("WAV", "PCM_24", 1e-3),
        ("WAV", "FLOAT", 1e-3),
        ("WAV", "ULAW", 0.03),
        ("WAV", "GSM610", 0.1),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("FLAC", "PCM_16", 1e-3),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_every_kind_of_file_sounds_the_same(kind: str, subtype: str, near: float, tmp_path: Path) -> None:
    path = tmp_path / "tone"
    path.write_bytes(encoded(tone(RATE), RATE, kind, subtype))
    found = decode(path, RATE)
    assert loudest(found.samples) == pytest.approx(440, abs=8)
    assert np.abs(found.samples[500:3000]).max() == pytest.approx(0.5, abs=near)


def test_channels_are_averaged() -> None:
    both = np.stack([tone(RATE, hertz=440), tone(RATE, hertz=1000, peak=0.1)], axis=1)
    found = decode(encoded(both, RATE, subtype="FLOAT"), RATE)
    assert np.allclose(found.samples, both.mean(1), atol=1e-6)


def test_of_an_hour_the_beginning_is_read() -> None:
    hour = np.zeros(3600 * RATE, dtype=np.int16)
    hour[: 30 * RATE] = 16_384
    found = decode(encoded(hour, RATE, subtype="PCM_U8"), RATE)
    assert found.cut
    assert len(found.samples) == 30 * RATE
    assert found.samples.min() > 0.4  # nothing of what comes after


@pytest.mark.parametrize("peak", [0.0, 5e-5])
def test_silence_is_told(peak: float) -> None:
    with pytest.raises(Silent, match="silent"):
        decode(encoded(tone(RATE, peak=peak), RATE, subtype="FLOAT"), RATE)


def test_channels_that_cancel_are_silence() -> None:
    with pytest.raises(Silent):
        decode(encoded(np.stack([tone(RATE), -tone(RATE)], axis=1), RATE), RATE)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no sound that can be read"),
        (b"not a sound at all, but long enough to be one", "no sound that can be read"),
        (encoded(tone(RATE), RATE)[:30], "no sound that can be read"),
        (encoded(np.zeros(0, np.float32), RATE), "no sample"),
        (encoded(np.full(800, np.nan, np.float32), RATE, subtype="FLOAT"), "no numbers"),
        (encoded(np.full(800, np.inf, np.float32), RATE, subtype="FLOAT"), "no numbers"),
    ],
)
def test_what_is_no_sound_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason) as caught:
        decode(body, RATE)
    assert not isinstance(caught.value, Silent)


def test_a_file_without_its_end_gives_what_is_there() -> None:
    found = decode(encoded(tone(RATE), RATE)[: 44 + 2 * 1000], RATE)
    assert len(found.samples) == 1000
