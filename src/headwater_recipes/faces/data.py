"""From the ORL faces, or the user's folder, to pixels and labels in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.common.stages import say, stage
from headwater_recipes.data import cache
from headwater_recipes.faces.settings import FacesSettings
from headwater_recipes.images.folder import read_classes
from headwater_recipes.images.store import Images, Scale, Split

ORL = "orl-faces"
"""Its name in the catalog."""

_EVERY = 4
"""One of so many people is held out."""


def prepare(wanted: FacesSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``."""
    if len(wanted.data) > 1:
        raise UsageError(f"--data: {len(wanted.data)} folders were given; give the one that holds all people")
    with stage(console, "reading the faces"):
        source = wanted.data[0] if wanted.data else cache.folder(ORL)
        people, split, skipped = read_classes(source, wanted.size)
        images = apart(people, split, wanted.seed).check(wanted.workers)
        scale = Scale.of(images.training.pixels)

    def fill(folder: Path) -> None:
        images.save(folder)
        scale.processor(wanted.size).save_pretrained(folder)
        counts = [
            f"{len(np.unique(part.labels))} people in {len(part.labels)}" for part in (images.training, images.held_out)
        ]
        text = (
            f"faces: {wanted.data[0] if wanted.data else 'ORL'}, {counts[0]} images to train on, {counts[1]} held out"
        )
        say(console, text + (f"; {len(skipped)} left out as they cannot be read: {skipped[0]}, …" if skipped else ""))

    return fill


def apart(people: Sequence[str], split: Split, seed: int) -> Images:
    """Some people to train on and others, whom the seed draws, held out with all their images.

    Raises:
        DataError: fewer than four people, or one with a single image.
    """
    counts = np.bincount(split.labels, minlength=len(people))
    if len(people) < 4:
        raise DataError(f"{len(people)} people are too few: two or more are trained on and two or more held out")
    if counts.min() < 2:
        raise DataError(
            f"of {people[int(counts.argmin())]!r} there is {counts.min()} image that can be read; it takes two of "
            f"each person to learn, or to see, what is the same in them"
        )
    drawn = np.random.default_rng([seed, len(people)]).permutation(len(people))[: max(2, len(people) // _EVERY)]
    held_out = np.isin(split.labels, drawn)
    return Images(tuple(people), *(Split(split.pixels[some], split.labels[some]) for some in (~held_out, held_out)))
