"""Labelled sounds, from files to spectrograms in the run folder, with whole speakers held out."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.errors import DataError
from headwater_recipes.common import hub
from headwater_recipes.common.unreadable import check_unreadable
from headwater_recipes.sound.decode import Silent, Unreadable, decode
from headwater_recipes.sound.features import MelSettings, log_mel

SOUNDS = frozenset({".wav", ".ogg", ".oga", ".opus", ".flac", ".mp3", ".gsm", ".aiff", ".aif", ".au"})


class Clip(NamedTuple):
    """A file, what is said in it, and who says it. ``row``: where it is, if it is none of the disk."""

    path: Path
    label: str
    speaker: str
    row: hub.File | None = None

    def read_bytes(self) -> bytes:
        """Raises ``OSError``."""
        return self.path.read_bytes() if self.row is None else self.row.read_bytes()


Heard = tuple[Clip, Tensor]
"""A sound, and its log-mel: float16 (T, M)."""


class Facts(msgspec.Struct, kw_only=True):
    """``sounds.json``: by sound ``paths`` and ``speakers`` (its number in ``who``); what was left out, and why."""

    names: tuple[str, ...]
    who: tuple[str, ...]
    paths: list[str]
    speakers: list[int]
    left_out: dict[str, int]
    mel: MelSettings


@dataclass
class Examples:
    """Of N sounds: ``frames`` float16 (F, M), ``starts`` int64 (N + 1,), ``labels`` int64 (N,), ``held`` bool (N,)."""

    facts: Facts
    frames: Tensor
    starts: Tensor
    labels: Tensor
    held: Tensor
    _places: dict[bool, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def mel(self, place: int) -> Tensor:
        """float32 (T, M) of a sound."""
        return self.frames[int(self.starts[place]) : int(self.starts[place + 1])].float()

    def places(self, held: bool) -> list[int]:
        """Numbers of the sounds held out, or of the others."""
        if held not in self._places:
            self._places[held] = torch.nonzero(self.held == held).flatten().tolist()
        return self._places[held]

    def speakers(self, held: bool) -> list[str]:
        """Who speaks on that side."""
        return sorted({self.facts.who[self.facts.speakers[place]] for place in self.places(held)})

    def save(self, folder: Path) -> None:
        """``sounds.safetensors`` and ``sounds.json``."""
        tensors = {"frames": self.frames, "starts": self.starts, "labels": self.labels, "held": self.held}
        save_file(tensors, folder / "sounds.safetensors")
        (folder / "sounds.json").write_bytes(msgspec.json.encode(self.facts))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises ``DataError`` if they are not whole."""
        try:
            facts = msgspec.json.decode((folder / "sounds.json").read_bytes(), type=Facts)
            found = load_file(folder / "sounds.safetensors")
            return cls(facts, found["frames"], found["starts"], found["labels"], found["held"])
        except (OSError, msgspec.MsgspecError, KeyError) as error:
            raise DataError(f"{folder}: the sounds cannot be read ({error})") from error


def from_folder(folder: Path) -> list[Clip]:
    """The sounds of ``folder/LABEL/…``. The speaker is the folder in the label's folder, if the sound lies in one, else
    what stands before the first ``_`` of its name, else unknown: then the file counts as a speaker of its own.

    Raises:
        DataError: there is no such folder, no sound in it, or sounds of one label alone.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: there is no such folder; nothing was started")
    found = []
    for path in sorted(each for each in folder.rglob("*") if each.suffix.lower() in SOUNDS):
        label, *between = path.relative_to(folder).parts[:-1] or ("",)
        # A label that begins with an underline is none: Speech Commands keeps its background noise there.
        if label and not label.startswith("_"):
            speaker = between[0] if between else path.stem.split("_")[0] if "_" in path.stem else str(path)
            found.append(Clip(path, label, speaker))
    labels = {clip.label for clip in found}
    if len(labels) < 2:
        raise DataError(
            f"--data {folder}: sounds of {len(labels)} labels ({', '.join(sorted(labels)) or 'none'}); at least 2 are "
            f"needed, each in a subfolder of its name; nothing was started"
        )
    return found


def given(data: Sequence[str], seed: int) -> tuple[list[Clip], set[str]]:
    """The sounds of what a user gave, a folder or a data set's name, and the speakers that are held out.

    Raises ``DataError``: there are more, or what ``from_folder``, ``from_hub`` and ``hold_out`` say.
    """
    if len(data) > 1:
        raise DataError(f"--data: give one folder, with a subfolder per label, not {len(data)}; nothing was started")
    if hub.finds(data[0]):
        return from_hub(data[0], seed)
    clips = from_folder(Path(data[0]))
    return clips, hold_out(clips, seed)


def from_hub(name: str, seed: int) -> tuple[list[Clip], set[str]]:
    """The sounds of a data set that ``datasets`` finds, and the speakers that are held out.

    The speaker is in a column ``speaker_id`` (or ``speaker``, ``client_id``); else he is found by the file's name, as
    in ``from_folder``. The data set's own part is held out if none of its speakers is in ``train`` too; otherwise
    speakers are drawn out of all, as nobody may be on both sides.

    Raises:
        DataError: what ``hub.files`` and ``hold_out`` say.
    """
    found = hub.files(name, "Audio")
    sides = [[_clip(file) for file in part] for part in (found.training, found.held_out)]
    learnt, held = ({clip.speaker for clip in side} for side in sides)
    clips = sides[0] + sides[1]
    return clips, held if held and not held & learnt else hold_out(clips, seed)


def _clip(file: hub.File) -> Clip:
    stem = "" if file.speaker else file.stem()
    speaker = file.speaker or (stem.split("_")[0] if "_" in stem else file.place)
    return Clip(Path(file.place), file.label, speaker, file)


def hold_out(clips: Sequence[Clip], seed: int, share: float = 0.2) -> set[str]:
    """Speakers to hold out, drawn: so many that each label has one held out and one left to learn from, and that at
    least ``share`` of all sounds are theirs, if that can be.

    Raises:
        DataError: a label that only one speaker says, so that nobody is left to learn from or to be judged by.
    """
    says: dict[str, set[str]] = defaultdict(set)
    spoken: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        says[clip.speaker].add(clip.label)
        spoken[clip.label].add(clip.speaker)
    order = sorted(says)
    random.Random(seed).shuffle(order)
    counts, held = Counter(clip.speaker for clip in clips), set[str]()

    def can(speaker: str) -> bool:
        return speaker not in held and all(len(spoken[label] - held) > 1 for label in says[speaker])

    for label in sorted(spoken, key=lambda each: (len(spoken[each]), each)):
        if not spoken[label] & held:
            found = next((each for each in order if each in spoken[label] and can(each)), None)
            if found is None:
                raise DataError(
                    f"label {label!r} is said by {len(spoken[label])} speaker(s) that can be told apart; one has to be "
                    f"held out and one to be learnt from. Nothing was started; add a speaker, or take the label out"
                )
            held.add(found)
    for speaker in order:
        if sum(counts[each] for each in held) >= share * len(clips):
            break
        if can(speaker):
            held.add(speaker)
    return held


def read_all(clips: Iterable[Clip], held: set[str], mel: MelSettings, *, names: tuple[str, ...] = ()) -> Examples:
    """Decode every sound. The same bytes count once; silent and unreadable ones are left out and counted.

    Raises:
        DataError: more than a tenth cannot be read, or a side has no sound of a label.
    """
    kept: list[Heard] = []
    left: Counter[str] = Counter()
    seen: set[bytes] = set()
    bad: list[str] = []
    for clip in clips:
        try:
            body = clip.read_bytes()
        except OSError as error:
            bad.append(f"{clip.path}: {error}")
            continue
        digest = hashlib.sha256(body).digest()
        if digest in seen:
            left["again"] += 1
            continue
        seen.add(digest)
        try:
            sound = decode(body, mel.rate)
        except Silent:
            left["silent"] += 1
            continue
        except Unreadable as error:
            bad.append(f"{clip.path}: {error}")
            continue
        left["cut"] += sound.cut
        kept.append((clip, log_mel(sound.samples, mel).half()))
    check_unreadable("sounds", len(kept) + left["silent"] + len(bad), bad)
    left["unreadable"] = len(bad)
    return put_together(kept, held, mel, {name: count for name, count in left.items() if count}, names=names)


def put_together(
    kept: Sequence[Heard], held: set[str], mel: MelSettings, left: dict[str, int], *, names: tuple[str, ...] = ()
) -> Examples:
    """What was heard of the ``held`` speakers and of others; ``names``: the labels, if nothing
    is to be learnt from these sounds and some may be missing.

    Raises:
        DataError: a side has no sound of a label, or there is one label only.
    """
    only_judged = bool(names)
    names = names or tuple(sorted({clip.label for clip, _ in kept}))
    who = tuple(sorted({clip.speaker for clip, _ in kept}))
    sides = {side: {c.label for c, _ in kept if (c.speaker in held) == side} for side in (False, True)}
    missing = [name for name in names if not only_judged and not all(name in sides[side] for side in sides)]
    if missing or len(names) < 2:
        raise DataError(
            f"{len(names)} labels are left of the sounds, and {', '.join(missing) or 'none'} without one to learn from "
            f"or to be judged by ({left}); nothing was started"
        )
    numbers = {name: number for number, name in enumerate(who)}
    lengths = torch.tensor([0, *(len(mel_tm) for _, mel_tm in kept)])
    facts = Facts(
        names=names,
        who=who,
        paths=["/".join(clip.path.parts[-3:]) for clip, _ in kept],
        speakers=[numbers[clip.speaker] for clip, _ in kept],
        left_out=left,
        mel=mel,
    )
    return Examples(
        facts,
        torch.cat([mel_tm for _, mel_tm in kept]),
        lengths.cumsum(0),
        torch.tensor([names.index(clip.label) for clip, _ in kept]),
        torch.tensor([clip.speaker in held for clip, _ in kept]),
    )


def describe(found: Examples) -> str:
    """For the user: how much there is, and how it is split."""
    learnt, held = (len(found.places(side)) for side in (False, True))
    spoken = [len(found.speakers(side)) for side in (False, True)]
    left = ", ".join(f"{count} {name}" for name, count in found.facts.left_out.items() if name != "cut")
    return (
        f"{len(found.facts.names)} labels: {learnt:,} sounds of {spoken[0]} speakers to learn from, {held:,} of "
        f"{spoken[1]} others held out{f'; left out: {left}' if left else ''}"
    )
