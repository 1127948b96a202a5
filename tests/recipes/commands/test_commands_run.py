"""Four words through real servers: learnt from some voices, told in others, and by a person; then served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.commands.data import HELD, LEARNT, PERSON, RECORDED
from headwater_recipes.commands.settings import RECIPE, CommandsSettings
from headwater_recipes.commands.words import words
from headwater_recipes.common import job
from headwater_recipes.sound.espeak import Espeak, Manner
from headwater_recipes.sound.examples import Examples
from headwater_recipes.sound.served import AudioClassification
from tests.recipes.data import need

WORDS = ("four", "hello", "one", "zero")
QUIET = Console(quiet=True)


def test_the_words() -> None:
    labels = [word.label for word in words()]
    assert len(labels) == len(set(labels)) == 74
    people = need("asterisk-en")
    assert all((people / file).is_file() for word in words() for file in word.recorded)


def test_every_voice_speaks_and_none_is_on_both_sides() -> None:
    espeak = Espeak(need("espeak"))
    assert not set(LEARNT) & set(HELD)
    said = {voice: espeak.say("hello", Manner(f"en-us+{voice}", 160, 50, 50)) for voice in (*LEARNT, *HELD)}
    assert all(len(samples) > 0.2 * espeak.rate and abs(samples).max() > 0.05 for samples in said.values())
    assert len({samples.tobytes() for samples in said.values()}) == len(said)
    slow, fast = (espeak.say("hello", Manner("en-us+m1", speed, 50, 50)) for speed in (90, 240))
    assert len(slow) > 1.5 * len(fast)
    with pytest.raises(DataError, match="no voice 'xx-none'"):
        espeak.say("hello", Manner("xx-none", 160, 50, 50))


def test_two_workers_and_two_servers_train_it(tmp_path: Path) -> None:
    need("espeak")
    people = need("asterisk-en")
    settings = CommandsSettings(words=",".join(WORDS), takes=1, steps=50, width=16, batch=16, lr=5e-3, log_every=10)
    run = job.prepare(RECIPE, settings, tmp_path / "run", QUIET)
    spoken, recorded = Examples.load(run), Examples.load(run / RECORDED)
    assert spoken.facts.names == recorded.facts.names == WORDS
    assert spoken.speakers(held=True) == sorted(HELD)
    assert (recorded.speakers(held=True), len(recorded)) == ([PERSON], 4)
    assert job.Job(RECIPE, run, QUIET).run() == 0

    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 50
    assert report["accuracy"] > 0.7  # chance: 0.25
    assert report["sounds"] == len(HELD) * len(WORDS)
    assert report["baseline"]["majority"]["accuracy"] == 0.25
    assert report["baseline"]["MFCC and nearest centroid"]["accuracy"] > 0.5
    assert report["recordings of a person"]["sounds"] == 4
    assert report["largest_difference_of_saved_model"] < 1e-3
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in report["pictures"])
    assert json.loads((run / "headwater.json").read_text(encoding="utf-8"))["recipe"] == "commands"

    model, served = AudioClassification.read(run)
    with torch.no_grad():
        said = served.inputs((people / "hello.wav").read_bytes(), "audio/wav")
        assert {each["label"] for each in served.answer(model, said, {})} == set(WORDS)


@pytest.mark.parametrize("given", ["one,eleventy", "one", "one,one"])
def test_words_that_cannot_be_had_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--words"):
        RECIPE.load().prepare(CommandsSettings(words=given), QUIET)
