"""Which language is spoken: who counts as a speaker, and a folder of one's own through real servers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from headwater.errors import DataError
from headwater_recipes.common import job
from headwater_recipes.sound.examples import Clip
from headwater_recipes.speech.data import clips_of, with_speakers
from headwater_recipes.speech.settings import DATA, RECIPE, SpeechSettings
from tests.recipes.data import need

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    folders = {  # named one by one, so that `make data` finds them
        "klettres": need("klettres"),
        "ktuberling": need("ktuberling"),
        "asterisk-en": need("asterisk-en"),
        "asterisk-es": need("asterisk-es"),
        "asterisk-fr": need("asterisk-fr"),
        "asterisk-it": need("asterisk-it"),
        "asterisk-ru": need("asterisk-ru"),
    }
    assert tuple(folders) == DATA
    return [clip for name, folder in folders.items() for clip in clips_of(name, folder)]


def test_languages_by_the_number_of_their_speakers(clips: list[Clip]) -> None:
    """What decides which languages can be judged at all."""
    labels = {least: {clip.label for clip in with_speakers(clips, least)} for least in (2, 3)}
    assert labels[3] == {"en", "es", "fr", "it", "ru"}
    assert labels[2] == labels[3] | {"da", "de", "lt", "nds", "nl", "no", "pt", "uk"}
    with pytest.raises(DataError, match="--speakers 4: 1 languages"):
        with_speakers(clips, 4)


def test_one_person_who_speaks_two_languages_is_one_speaker(clips: list[Clip]) -> None:
    spoken: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        spoken[clip.speaker].add(clip.label)
    assert spoken["Allison Smith"] == {"en", "es"}
    assert {who for who, labels in spoken.items() if len(labels) > 1} == {"Allison Smith"}
    assert spoken["ktuberling/sr"] == {"sr"}
    assert spoken["klettres/en_GB"] == {"en"}


def write(path: Path, hertz: float, seed: int) -> None:
    """Half a second of a tone with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(size=8000)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16_000) + 0.01 * noise, 16_000)


def test_a_folder_of_ones_own_is_learnt_through_servers(tmp_path: Path) -> None:
    for label, hertz in (("high", 2500), ("low", 400), ("middle", 1000)):
        for number in range(24):
            write(tmp_path / "own" / label / f"speaker{number % 4}_{number}.flac", hertz * (1 + 0.01 * number), number)
    settings = SpeechSettings(
        data=(str(tmp_path / "own"),), seconds=0.5, steps=30, width=16, batch=16, lr=5e-3, dropout=0.0, log_every=10
    )
    run = job.prepare(RECIPE, settings, tmp_path / "run", QUIET)
    assert job.Job(RECIPE, run, QUIET).run() == 0
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["accuracy"] > 0.8  # chance: 0.33
    assert report["eer"] < 0.2
    assert len(report["speakers_held_out"]) == 1
    assert not set(report["speakers_held_out"]) & set(report["speakers_learnt_from"])
    assert report["sounds"] + report["sounds_learnt_from"] == 72
    assert set(report["baseline"]) == {"majority", "MFCC statistics and logistic regression"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in report["pictures"])
