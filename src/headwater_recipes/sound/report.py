"""After training: figures beside baselines, pictures, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from headwater_recipes.common.pictures import draw_confusion
from headwater_recipes.common.scores import confusion_matrix
from headwater_recipes.common.stages import clock, say
from headwater_recipes.common.task import Ended
from headwater_recipes.sound import baselines, pictures
from headwater_recipes.sound.examples import Examples
from headwater_recipes.sound.network import SoundNetwork, embedding_of, logits_of
from headwater_recipes.sound.score import Floats, Ints, scores

_SAME = 1e-3
"""Log-probabilities of the saved model may differ by this much from those in training: there, bfloat16 aside, only the
order of summation differs.
"""

Classical = Callable[[Examples, Sequence[tuple[list[Tensor], Ints]]], list[dict[str, float]]]


class Judged(NamedTuple):
    """Sounds (T, M) that were not learnt from, and what the saved model makes of them: (N, C) log-probabilities and
    (N, E) embeddings; ``labels`` (N,).
    """

    mels: list[Tensor]
    labels: Ints
    told: Ints
    log_probabilities: Floats
    embeddings: Floats


def judge(folder: Path, examples: Examples) -> Judged:
    """The run's saved model on the held-out sounds of ``examples``."""
    model = SoundNetwork.from_pretrained(folder).eval()
    places = examples.places(held=True)
    mels = [examples.mel(place) for place in places]
    with torch.no_grad():
        found = torch.stack([F.log_softmax(logits_of(model, mel), 0) for mel in mels])
        seen = torch.stack([embedding_of(model, mel) for mel in mels])
    return Judged(mels, examples.labels[places].numpy(), found.argmax(1).numpy(), found.numpy(), seen.numpy())


def figures(
    examples: Examples, ended: Ended, sets: Mapping[str, Judged], classical: tuple[str, Classical]
) -> dict[str, Any]:
    """For ``report.json``; ``sets`` by what their sounds are, the first being the recipe's own measure. ``classical``:
    a baseline, and its name.
    """
    first, *others = sets
    beside = classical[1](examples, [(each.mels, each.labels) for each in sets.values()])
    found = {
        name: {
            **scores(each.told, each.labels, each.log_probabilities),
            "sounds": len(each.labels),
            "baseline": {"majority": baselines.majority(examples, each.labels), classical[0]: base},
        }
        for (name, each), base in zip(sets.items(), beside, strict=True)
    }
    return {
        "validation_loss": ended.metrics["loss"],
        "judged_by": first,
        **found[first],
        "labels": len(examples.facts.names),
        "sounds_learnt_from": len(examples.places(held=False)),
        "speakers_learnt_from": examples.speakers(held=False),
        "speakers_held_out": examples.speakers(held=True),
        "left_out": examples.facts.left_out,
        "largest_difference_of_saved_model": ended.difference,
        **{name: found[name] for name in others},
    }


def draw(folder: Path, names: Sequence[str], sets: Mapping[str, Judged]) -> list[str]:
    """The pictures, and their names: confusions and embeddings of the first set, spectrograms of the last."""
    first, last = next(iter(sets)), list(sets)[-1]
    judged, seen = sets[first], sets[last]
    told, labels = judged.told, judged.labels
    counts = confusion_matrix(labels, told, len(names))
    draw_confusion(folder / "confusion.png", counts, names, f"{folder.name}: {first}")
    pictures.embedding_map(folder / "embedding.png", judged.embeddings, labels, names, f"{folder.name}: {first}")
    pictures.spectrograms(
        folder / "spectrograms.png", seen.mels, seen.told, seen.labels, names, f"what is told: {last}"
    )
    return ["confusion.png", "embedding.png", "spectrograms.png"]


def tell(folder: Path, ended: Ended, found: Mapping[str, Any], others: Sequence[str], console: Console) -> None:
    """Show the figures."""
    say(console, f"trained {ended.step} steps in {clock(ended.seconds)}; {found['labels']} labels")
    _tell_set(found["judged_by"], found, console)
    for name in others:
        _tell_set(name, found[name], console)
    left = ", ".join(f"{count} {name}" for name, count in found["left_out"].items())
    if left:
        say(console, f"  sounds left out (cut: only shortened): {left}")
    same = (found["largest_difference_of_saved_model"] or 0.0) <= _SAME
    if not same:
        say(console, "  the saved model DOES NOT give the same answers as the one in training")
    shown = ", ".join(found["pictures"])
    say(console, f"{folder}: model.safetensors, config.json, {shown}, metrics.jsonl, report.json", whole=True)


def _tell_set(name: str, found: Mapping[str, Any], console: Console) -> None:
    say(console, f"on {found['sounds']:,} {name}:")
    rows = {"the network": found, **found["baseline"]}
    width = max(map(len, rows))
    for row, values in rows.items():
        eer = f"   EER {values['eer']:.3f}" if "eer" in values else ""
        line = f"  {row:<{width}}  accuracy {values['accuracy']:.3f}   macro-F1 {values['macro_f1']:.3f}{eer}"
        say(console, line, whole=True)
