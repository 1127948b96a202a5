"""From folders of sounds to spectrograms: who speaks, who is held out, what is left out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from headwater.errors import DataError
from headwater_recipes.sound.examples import Clip, Examples, from_folder, given, hold_out, read_all
from headwater_recipes.sound.features import MelSettings
from tests.recipes import hub

MEL = MelSettings()


def write(path: Path, hertz: float, seconds: float = 0.3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(8000 * seconds)) / 8000), 8000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two labels, three speakers who say both."""
    for label, hertz in (("high", 2000), ("low", 300)):
        for number, speaker in enumerate(("ann", "bob", "eve")):
            for take in range(2):
                write(tmp_path / label / f"{speaker}_nohash_{take}.wav", hertz + 20 * number + take)
    return tmp_path


def test_speakers_are_told_by_folder_or_name(folder: Path) -> None:
    write(folder / "low" / "zoe" / "a.flac", 310)
    write(folder / "low" / "alone.wav", 320)
    write(folder / "_background_noise_" / "ann_0.wav", 50)
    found = {(clip.label, clip.speaker) for clip in from_folder(folder)}
    assert found == {
        *((label, speaker) for label in ("high", "low") for speaker in ("ann", "bob", "eve")),
        ("low", "zoe"),
        ("low", str(folder / "low" / "alone.wav")),
    }


def test_whole_speakers_are_held_out_and_every_label_is_on_both_sides(folder: Path) -> None:
    clips = from_folder(folder)
    for seed in range(10):
        held = hold_out(clips, seed)
        assert len(held) == 1
        found = read_all(clips, held, MEL)
        assert found.speakers(held=True) == sorted(held)
        assert not set(found.speakers(held=True)) & set(found.speakers(held=False))
        for side in (True, False):
            assert set(found.labels[found.places(side)].tolist()) == {0, 1}
    assert len({frozenset(hold_out(clips, seed)) for seed in range(10)}) > 1


def test_of_many_speakers_a_fifth_of_the_sounds_is_held_out() -> None:
    clips = [Clip(Path(f"{n}"), "ab"[n % 2], f"s{n // 2}") for n in range(100)]
    held = hold_out(clips, 0)
    assert sum(clip.speaker in held for clip in clips) == 20


def test_a_label_of_one_speaker_cannot_be_judged(folder: Path) -> None:
    write(folder / "middle" / "ann_0.wav", 900)
    with pytest.raises(DataError, match="label 'middle' is said by 1 speaker"):
        hold_out(from_folder(folder), 0)


def test_they_are_the_same_when_they_are_read_again(folder: Path, tmp_path: Path) -> None:
    made = read_all(from_folder(folder), {"ann"}, MEL)
    made.save(tmp_path)
    found = Examples.load(tmp_path)
    assert found.facts == made.facts
    assert len(found) == 12
    assert all(torch.equal(found.mel(place), made.mel(place)) for place in range(12))
    assert found.facts.paths[found.places(held=True)[0]].endswith("high/ann_nohash_0.wav")
    (tmp_path / "sounds.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        Examples.load(tmp_path)


def test_what_cannot_be_heard_is_left_out_and_counted(folder: Path) -> None:
    soundfile.write(folder / "low" / "bob_silent.wav", np.zeros(800), 8000)
    write(folder / "low" / "bob_long.wav", 350, seconds=31)
    (folder / "low" / "bob_again.wav").write_bytes((folder / "low" / "bob_nohash_0.wav").read_bytes())
    (folder / "low" / "bob_broken.wav").write_bytes(b"RIFF")
    found = read_all(from_folder(folder), {"ann"}, MEL)
    assert found.facts.left_out == {"silent": 1, "cut": 1, "again": 1, "unreadable": 1}
    assert len(found) == 13
    assert int((found.starts.diff()).max()) == pytest.approx(3000, abs=3)


def test_many_unreadable_files_are_an_error(folder: Path) -> None:
    for number in range(3):
        (folder / "low" / f"bob_broken{number}.ogg").write_bytes(b"no sound" + bytes([number]))
    with pytest.raises(DataError, match=r"3 of 15 sounds cannot be read, above 10%; the first is .*bob_broken0"):
        read_all(from_folder(folder), {"ann"}, MEL)


def test_a_folder_that_holds_nothing_of_use_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        from_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"0 labels \(none\)"):
        from_folder(tmp_path)
    write(tmp_path / "one" / "a_0.wav", 300)
    with pytest.raises(DataError, match=r"1 labels \(one\)"):
        from_folder(tmp_path)
    with pytest.raises(DataError, match="one folder"):
        given([str(tmp_path), str(tmp_path)], 0)


def test_a_side_without_a_label_is_an_error(folder: Path) -> None:
    for path in (folder / "low").glob("ann*"):
        soundfile.write(path, np.zeros(800), 8000)
    with pytest.raises(DataError, match="low without one"):
        read_all(from_folder(folder), {"ann"}, MEL)


def _wav(hertz: float) -> bytes:
    body = io.BytesIO()
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(2400) / 8000)
    soundfile.write(body, wave, 8000, format="WAV")
    return body.getvalue()


@pytest.mark.parametrize("by", hub.BY)
def test_a_data_set_of_the_library_holds_out_its_part_if_nobody_is_on_both_sides(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*speakers: str) -> hub.Rows:
        return [
            (_wav(hertz + 10 * ord(who[0])), f"{who}_{label}.wav", label)
            for who in speakers
            for label, hertz in enumerate((300, 900))
        ]

    parts = {"train": rows("ann", "bob", "cy"), "test": rows("eve")}
    name = hub.write(tmp_path / "apart", monkeypatch, by, "Audio", ["low", "high"], parts)
    clips, held = given([name], 0)
    assert held == {"eve"}
    made = read_all(clips, held, MEL)
    assert made.facts.names == ("high", "low")
    assert (made.speakers(False), made.speakers(True)) == (["ann", "bob", "cy"], ["eve"])
    assert len(made.places(False)) == 6

    who = {"train": ["x", "x", "y", "y", "z", "z"], "test": ["x", "x"]}  # a column counts, not the names of files
    name = hub.write(tmp_path / "mixed", monkeypatch, by, "Audio", ["low", "high"], parts, speaker_id=who)
    clips, held = given([name], 0)
    assert len(held) == 1 < len({clip.speaker for clip in clips}) == 3
    made = read_all(clips, held, MEL)
    assert not set(made.speakers(False)) & set(made.speakers(True))


def test_a_sound_that_must_not_be_read_is_left_out_and_counted(folder: Path) -> None:
    write(folder / "low" / "eve_9.wav", 350)
    (folder / "low" / "eve_8.wav").symlink_to(folder / "gone.wav")
    found = read_all(from_folder(folder), {"ann"}, MEL)
    assert found.facts.left_out == {"unreadable": 1}
