"""A task whose model tells the label of a sound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater_recipes.common.task import Batch, Sums, Task
from headwater_recipes.sound.augment import augmented
from headwater_recipes.sound.examples import Examples
from headwater_recipes.sound.network import NetworkSettings, SoundNetwork, logits_of
from headwater_recipes.sound.settings import SoundTraining

AnySound = TypeVar("AnySound", bound=SoundTraining)

_PART = 128
"""Sounds of a validation on the way, over all workers."""

_QUIET = -13.8
"""Log power of nothing: what comes after the end of a sound that is shorter than the piece."""


class SoundTask(Task[AnySound]):
    """Every label is drawn as often, and of a label every speaker: one who said much is not worth more."""

    def __init__(self, settings: AnySound, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        self.examples = Examples.load(folder)
        by: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for place in self.examples.places(held=False):
            by[int(self.examples.labels[place])][self.examples.facts.speakers[place]].append(place)
        self._by = [[places for _, places in sorted(by[label].items())] for label in sorted(by)]
        self._frames = round(settings.seconds * self.examples.facts.mel.frames_per_second)

    def build(self) -> torch.nn.Module:
        facts = self.examples.facts
        s = self.settings
        torch.manual_seed(s.seed)
        network = NetworkSettings(
            labels=facts.names,
            mel=facts.mel,
            frames=self._frames,
            width=s.width,
            parts=s.parts,
            dropout=s.dropout,
        )
        return SoundNetwork(network)

    def read(self, folder: Path) -> torch.nn.Module:
        return SoundNetwork.from_pretrained(folder)

    def batches(self, step: int) -> Sequence[Batch]:
        number = (self.settings.seed * 1_000_003 + step) * self.world + self.rank
        random = torch.Generator().manual_seed(number)
        torch.manual_seed(number)  # dropout's
        drawn = [self._drawn(random) for _ in range(self.settings.batch)]
        x = torch.stack([F.pad(piece, (0, 0, 0, self._frames - len(piece)), value=_QUIET) for piece, _ in drawn])
        lengths = torch.tensor([len(piece) for piece, _ in drawn])
        labels = torch.tensor([label for _, label in drawn])
        return [Batch((augmented(x, lengths, random), lengths, labels), len(drawn), len(drawn))]

    def _drawn(self, random: torch.Generator) -> tuple[Tensor, int]:
        """A piece of a sound, and the label."""

        def any_of(count: int) -> int:
            return int(torch.randint(count, (1,), generator=random))

        label = any_of(len(self._by))
        places = self._by[label][any_of(len(self._by[label]))]
        mel = self.examples.mel(places[any_of(len(places))])
        start = any_of(max(1, len(mel) - self._frames + 1))
        return mel[start : start + self._frames], label

    def held_out(self, whole: bool) -> Iterable[Batch]:
        places = self.examples.places(held=True)
        if not whole:
            places = places[:: max(1, len(places) // _PART)]
        for place in places[self.rank :: self.world]:
            yield Batch((self.examples.mel(place), int(self.examples.labels[place])), 1, 1)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        x, lengths, labels = batch.inputs
        found = model(x, lengths).float()
        return F.cross_entropy(found, labels, label_smoothing=self.settings.smoothing, reduction="sum")

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        mel, label = batch.inputs
        assert isinstance(model, SoundNetwork)
        logits = logits_of(model, mel).float()
        right = int(logits.argmax()) == label
        return {"loss": float(F.cross_entropy(logits, torch.tensor(label))), "right": int(right), "count": 1}

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        count = max(1, sums["count"])
        return {"loss": sums["loss"] / count, "accuracy": sums["right"] / count}

    def verify(self, model: torch.nn.Module) -> float:
        saved = self.read(self.folder).eval()
        model.eval()
        mel = self.examples.mel(self.examples.places(held=True)[0])
        assert isinstance(model, SoundNetwork)
        assert isinstance(saved, SoundNetwork)
        with torch.no_grad():
            return float((logits_of(model, mel) - logits_of(saved, mel)).abs().max())
