"""People's recordings in Debian's packages, by language and speaker, to spectrograms in the run folder."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from headwater.errors import DataError
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data import cache
from headwater_recipes.sound import examples
from headwater_recipes.sound.examples import SOUNDS, Clip
from headwater_recipes.sound.features import MelSettings
from headwater_recipes.speech.settings import DATA, SpeechSettings

HELD = "ktuberling"
"""The data set whose speakers are held out: they say whole words, of other things and into other microphones than those
that are learnt from.
"""

_SAME = {"en_GB": "en", "pt_BR": "pt", "nb": "no", "nn": "no"}
"""Folders of what counts as one language; Serbian in several scripts sounds the same."""

_VOICES = {"asterisk-en": "Allison Smith", "asterisk-es": "Allison Smith"}
"""One person speaks two languages, and is one speaker."""


def prepare(wanted: SpeechSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    mel = MelSettings(rate=wanted.rate)
    begun = time.monotonic()
    with stage(console, "reading the sounds"):
        if wanted.data:
            clips, held = examples.given(wanted.data, wanted.seed)
        else:
            clips = with_speakers(
                [clip for name in DATA for clip in clips_of(name, cache.folder(name))], wanted.speakers
            )
            held = {clip.speaker for clip in clips if clip.speaker.startswith(f"{HELD}/")}
        found = examples.read_all(clips, held, mel)

    def fill(folder: Path) -> None:
        found.save(folder)
        say(console, f"{examples.describe(found)} ({time.monotonic() - begun:.1f} s)")

    return fill


def clips_of(name: str, folder: Path) -> list[Clip]:
    """The sounds of a data set. Nobody says who speaks in KLettres and KTuberling: each folder of a language counts as
    a speaker. Of Asterisk's packages each has one voice.
    """
    found = []
    for path in sorted(each for each in folder.rglob("*") if each.suffix in SOUNDS):
        if name.startswith("asterisk-"):
            found.append(Clip(path, name.removeprefix("asterisk-"), _VOICES.get(name, name)))
        else:
            place = path.relative_to(folder).parts[0].split("@")[0]
            found.append(Clip(path, _SAME.get(place, place), f"{name}/{place}"))
    return found


def with_speakers(clips: list[Clip], least: int) -> list[Clip]:
    """The sounds of languages with so many speakers, of whom one is held out. Raises ``DataError``: too few."""
    speakers: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        speakers[clip.label].add(clip.speaker)
    kept = {
        label
        for label, who in speakers.items()
        if len(who) >= least and any(each.startswith(f"{HELD}/") for each in who)
    }
    if len(kept) < 2:
        raise DataError(f"--speakers {least}: {len(kept)} languages have so many; nothing was started. Ask for fewer")
    return [clip for clip in clips if clip.label in kept]
