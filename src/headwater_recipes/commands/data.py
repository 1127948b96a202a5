"""Words said by a synthesizer, and by a person, to spectrograms in the run folder."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import soxr
from rich.console import Console

from headwater.errors import UsageError
from headwater_recipes.commands.settings import CommandsSettings
from headwater_recipes.commands.words import Word, words
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data import cache
from headwater_recipes.sound import examples
from headwater_recipes.sound.espeak import Espeak, Manner
from headwater_recipes.sound.examples import Clip, Examples
from headwater_recipes.sound.features import MelSettings, log_mel

_LEARNT = """
m1 m2 m3 m4 m5 m6 f1 f2 f3 f4 Alex Andrea Andy Annie Denis Gene Lee Marco Michael adam belinda caleb david ed edward
linda steph
"""
LEARNT = _LEARNT.split()
HELD = ["m7", "m8", "f5", "Alicia", "Mario", "paul"]
"""Variants of eSpeak NG: other formants, and so other speakers."""

ACCENTS = ["en-us", "en-us", "en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc"]

PERSON = "Allison Smith"
RECORDED = "recorded"
"""The folder in the run's folder, if there are recordings of a person."""


def prepare(wanted: CommandsSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    mel = MelSettings(rate=wanted.rate)
    begun = time.monotonic()
    if wanted.data:
        found, recorded = _given(wanted, console, mel), None
    else:
        found, recorded = _spoken(wanted, console, mel)

    def fill(folder: Path) -> None:
        found.save(folder)
        if recorded is not None:
            (folder / RECORDED).mkdir()
            recorded.save(folder / RECORDED)
        say(console, f"{examples.describe(found)} ({time.monotonic() - begun:.1f} s)")

    return fill


def _given(wanted: CommandsSettings, console: Console, mel: MelSettings) -> Examples:
    with stage(console, "reading the sounds"):
        clips, held = examples.given(wanted.data, wanted.seed)
        return examples.read_all(clips, held, mel)


def _spoken(wanted: CommandsSettings, console: Console, mel: MelSettings) -> tuple[Examples, Examples]:
    chosen = _chosen(wanted.words)
    library, people = cache.folder("espeak"), cache.folder("asterisk-en")
    with stage(console, f"{len(LEARNT) + len(HELD)} voices say {len(chosen)} words {wanted.takes} times"):
        said = examples.put_together(list(_say(library, chosen, wanted, mel)), set(HELD), mel, {})
    clips = [Clip(people / file, word.label, PERSON) for word in chosen for file in word.recorded]
    recorded = examples.read_all(clips, {PERSON}, mel, names=said.facts.names)
    return said, recorded


def _chosen(given: str) -> list[Word]:
    known = {word.label: word for word in words()}
    wanted = [label.strip() for label in given.split(",") if label.strip()]
    for label in wanted:
        if label not in known:
            raise UsageError(f"--words {label}: none of {', '.join(known)}; nothing was started")
    found = [known[label] for label in dict.fromkeys(wanted)] or list(known.values())
    if len(found) < 2:
        raise UsageError("--words: give two or more; nothing was started")
    return found


def _say(library: Path, chosen: Sequence[Word], wanted: CommandsSettings, mel: MelSettings) -> Iterator[examples.Heard]:
    """Accent, speed and pitch are drawn for each take."""
    espeak, draw = Espeak(library), random.Random(wanted.seed)
    for variant in (*LEARNT, *HELD):
        for take in range(wanted.takes):
            for word in chosen:
                manner = Manner(
                    f"{draw.choice(ACCENTS)}+{variant}",
                    draw.randint(90, 240),
                    draw.randint(15, 85),
                    draw.randint(20, 80),
                )
                samples = soxr.resample(espeak.say(word.spelt, manner), espeak.rate, mel.rate)
                clip = Clip(Path(variant) / f"{word.label}-{take}", word.label, variant)
                yield clip, log_mel(samples.astype("float32"), mel).half()
