"""Features and network: what must not change what is told, and what must."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from headwater.errors import BadInput, DataError
from headwater_recipes.sound.augment import augmented
from headwater_recipes.sound.features import MelSettings, log_mel, mfcc, statistics
from headwater_recipes.sound.network import NetworkSettings, SoundNetwork, _weights, logits_of, pieces
from headwater_recipes.sound.served import AudioClassification
from tests.recipes.sound.test_decode import encoded, tone

MEL = MelSettings()
SETTINGS = NetworkSettings(labels=("a", "b", "c"), mel=MEL, frames=50, width=8)


@pytest.fixture(params=[1, 3])
def network(request: pytest.FixtureRequest) -> SoundNetwork:
    torch.manual_seed(0)
    return SoundNetwork(msgspec.structs.replace(SETTINGS, parts=request.param)).eval()


@pytest.fixture
def mel() -> torch.Tensor:
    return torch.randn(40, 40, generator=torch.Generator().manual_seed(1))


def test_a_tone_is_in_its_band_and_the_quiet_around_it_is_left_out() -> None:
    quiet = np.zeros(4000, np.float32)
    found = log_mel(np.concatenate([quiet, tone(8000, 1.0, 1000), quiet]), MEL)
    assert found.shape == (pytest.approx(101, abs=3), 40)
    low, high = (int(log_mel(tone(8000, 1.0, hertz), MEL).mean(0).argmax()) for hertz in (300, 2000))
    assert low < int(found.mean(0).argmax()) < high


def test_a_sound_of_one_sample_has_frames() -> None:
    assert log_mel(np.array([0.5], np.float32), MEL).shape == (2, 40)
    assert statistics(log_mel(np.array([0.5], np.float32), MEL)).isfinite().all()


def test_mfcc_is_the_orthonormal_cosine_transform(mel: torch.Tensor) -> None:
    from scipy.fft import dct

    wanted = dct(mel.numpy(), norm="ortho", axis=1)[:, :20]
    assert np.allclose(mfcc(mel).numpy(), wanted - wanted.mean(0), atol=1e-4)


def test_padding_and_the_microphone_change_nothing(network: SoundNetwork, mel: torch.Tensor) -> None:
    with torch.no_grad():
        told = logits_of(network, mel)
        other = torch.cat([mel, torch.zeros(10, 40)])[None]
        rubbish = torch.cat([mel, 9 * torch.ones(10, 40)])[None]
        length = torch.tensor([40])
        assert torch.equal(network(other, length), network(rubbish, length))
        curve = torch.linspace(-2, 2, 40)
        assert torch.allclose(logits_of(network, mel + curve), told, atol=1e-4)
        assert not torch.allclose(logits_of(network, mel.flip(0)), told, atol=1e-4)


def test_parts_tell_what_came_first() -> None:
    inside = torch.arange(12)[None] < torch.tensor([[12], [9], [1]])
    found = _weights(inside, 3)
    assert torch.allclose(found.sum(2), torch.ones(3, 3))
    assert not found[~inside[:, None].expand(-1, 3, -1)].any()
    assert found[1].argmax(1).tolist() == [0, 4, 8]


def test_every_frame_of_a_long_sound_is_in_a_piece() -> None:
    found, lengths = pieces(torch.arange(130.0)[:, None], 50)
    assert found.shape == (3, 50, 1)
    assert lengths.tolist() == [50, 50, 50]
    assert set(found.flatten().tolist()) == set(range(130))
    assert pieces(torch.zeros(100_000, 1), 50)[0].shape == (16, 50, 1)
    assert pieces(torch.zeros(7, 1), 50)[1].tolist() == [7]


def test_saved_and_read_again_it_is_the_same(network: SoundNetwork, mel: torch.Tensor, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    found = SoundNetwork.from_pretrained(tmp_path).eval()
    assert found.settings == network.settings
    with torch.no_grad():
        assert torch.equal(logits_of(found, mel), logits_of(network, mel))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be read"):
        SoundNetwork.from_pretrained(tmp_path)


def test_augmented_sounds_are_others_and_the_same_for_the_same_seed(mel: torch.Tensor) -> None:
    x, lengths = mel.expand(3, -1, -1), torch.tensor([40, 30, 1])
    once, again = (augmented(x, lengths, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.isfinite().all()
    assert not torch.allclose(once[0], once[1])


def test_it_is_served(network: SoundNetwork, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    model, served = AudioClassification.read(tmp_path)
    body = encoded(np.stack([tone(44_100)] * 2, axis=1), 44_100, "OGG", "VORBIS")
    with torch.no_grad():
        told = served.answer(model, served.inputs(body, "audio/ogg"), {"top_k": 2})
    assert len(told) == 2
    assert told[0]["score"] >= told[1]["score"] > 0
    assert {each["label"] for each in told} < {"a", "b", "c"}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"no sound", "audio/wav", 400),
        (encoded(np.zeros(800, np.float32), 8000), "audio/wav", 400),
        (encoded(tone(8000), 8000), "text/plain", 415),
        (bytes(32 * 2**20 + 1), "audio/wav", 413),
    ],
)
def test_what_is_no_sound_is_refused_with_the_reason(body: bytes, kind: str, status: int) -> None:
    with pytest.raises(BadInput) as caught:
        AudioClassification(("a", "b"), MEL).inputs(body, kind)
    assert caught.value.status == status
