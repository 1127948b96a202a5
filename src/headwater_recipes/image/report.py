"""After training: accuracy beside baselines, the confusion matrix, the worst mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from headwater_recipes.common.pictures import draw_confusion
from headwater_recipes.common.scores import confusion_matrix
from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.images.pictures import draw_gallery
from headwater_recipes.images.store import Images, Scale, Split

PICTURES = ("confusion.png", "mistakes.png")

_LINEAR_SIDE = 28
_LINEAR_MOST = 60_000
"""The linear baseline is fitted on so many images at most, of at most this side: it shall not take a minute."""

Probabilities = npt.NDArray[np.float32]


def figures(folder: Path, images: Images, scale: Scale, model: torch.nn.Module, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; draws the pictures."""
    said = probabilities(model, images.held_out, scale)
    truth = images.held_out.labels
    counts = confusion_matrix(truth, said.argmax(1), len(images.classes))
    accuracy = ended.metrics["accuracy"]
    draw_confusion(folder / PICTURES[0], counts, images.classes, f"{accuracy:.1%} of {len(truth):,} held-out images")
    draw_mistakes(folder / PICTURES[1], images, said)
    return {
        "validation_loss": ended.metrics["loss"],
        "validation_accuracy": accuracy,
        "validation_images": ended.sums["count"],
        "accuracy_by_class": {
            name: float(counts[index, index] / max(1, counts[index].sum())) for index, name in enumerate(images.classes)
        },
        "baseline": baselines(images),
        "largest_logit_difference_of_saved_model": ended.difference,
        "pictures": list(PICTURES),
    }


def probabilities(model: torch.nn.Module, split: Split, scale: Scale, together: int = 250) -> Probabilities:
    """What the model says of each image, shape (images, classes)."""
    model.eval()
    with torch.no_grad():
        parts = [
            model(pixel_values=scale.tensor(split.pixels[start : start + together])).logits.softmax(1)
            for start in range(0, len(split.labels), together)
        ]
    return torch.cat(parts).numpy()


def baselines(images: Images) -> dict[str, float]:
    """Accuracies on what is held out: of always saying the most frequent class, and of scikit-learn's logistic
    regression on the pixels (a sample of ``linear_images`` of them), with its loss.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    truth = images.held_out.labels
    majority = np.bincount(images.training.labels).argmax()
    step = -(-len(images.training.labels) // _LINEAR_MOST)
    pixels, labels = _flat(images.training.pixels[::step]), images.training.labels[::step]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=100))
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # the last digit is not worth a minute
        fitted.fit(pixels, labels)
    said = fitted.predict_proba(_flat(images.held_out.pixels))
    return {
        "majority": float((truth == majority).mean()),
        "linear": float((fitted.classes_[said.argmax(1)] == truth).mean()),
        "linear_loss": float(log_loss(truth, said, labels=fitted.classes_)),
        "linear_images": len(labels),
    }


def _flat(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """One row of numbers for each image; larger ones are made smaller by means over blocks."""
    block = -(-pixels.shape[1] // _LINEAR_SIDE)
    side = pixels.shape[1] // block * block
    cut = np.asarray(pixels[:, :side, :side], np.float32)
    small = cut.reshape(len(cut), side // block, block, side // block, block, -1).mean((2, 4))
    flat: npt.NDArray[np.float32] = small.reshape(len(cut), -1)
    return flat


def draw_mistakes(path: Path, images: Images, said: Probabilities, most: int = 32) -> None:
    """The held-out images whose wrong class the model was surest of, the surest first."""
    truth, chosen = images.held_out.labels, said.argmax(1)
    wrong = np.flatnonzero(chosen != truth)
    worst = wrong[np.argsort(-said[wrong, chosen[wrong]], kind="stable")][:most]
    words = [
        f"{said[place, chosen[place]]:.0%} {images.classes[chosen[place]]}\nis {images.classes[truth[place]]}"
        for place in worst
    ]
    title = f"The surest of {len(wrong):,} mistakes on {len(truth):,} held-out images"
    draw_gallery(path, [images.held_out.pixels[place] for place in worst], words, title)


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures."""
    beside = found["baseline"]
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; "
        f"on {found['validation_images']:,} held-out images:",
    )
    say(console, f"  accuracy {found['validation_accuracy']:.2%}   loss {found['validation_loss']:.3f}")
    say(console, f"  baselines: linear model {beside['linear']:.2%}, most frequent class {beside['majority']:.2%}")
    weakest = sorted(found["accuracy_by_class"].items(), key=lambda item: item[1])[:3]
    say(console, "  weakest classes: " + ", ".join(f"{name} {share:.1%}" for name, share in weakest))
    say_saved(
        console,
        "AutoModelForImageClassification.from_pretrained",
        "logits",
        found["largest_logit_difference_of_saved_model"],
    )
    names = "model.safetensors, config.json, preprocessor_config.json, metrics.jsonl, loss.png, report.json"
    say(console, f"{folder}: {names}, {', '.join(PICTURES)}", whole=True)
