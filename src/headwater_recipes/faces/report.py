"""After training: recognition and verification of people never seen, beside pixels and eigenfaces; and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from headwater_recipes.common.pictures import new_figure
from headwater_recipes.common.scores import equal_error_rate
from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.faces.model import embed_both
from headwater_recipes.images.pictures import draw_gallery
from headwater_recipes.images.store import Images, Labels, Scale, Split

PICTURES = ("roc.png", "nearest.png")

_COMPONENTS = 50
"""Eigenfaces, at most."""

Vectors = npt.NDArray[np.float64]
"""(N, D): rows of length one."""

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def figures(folder: Path, images: Images, scale: Scale, model: torch.nn.Module, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; draws the pictures."""
    truth = images.held_out.labels
    vectors = {"model": embedded(model, images.held_out, scale), **baselines(images)}
    curves, scores = {}, {}
    for name, each in vectors.items():
        equal, area, curves[name] = verification(each, truth)
        scores[name] = {"rank_1": rank_1(each, truth), "equal_error_rate": equal, "roc_auc": area}
    draw_roc(folder / PICTURES[0], curves, scores)
    draw_nearest(folder / PICTURES[1], images, vectors["model"])
    return {
        "validation_loss": ended.metrics["loss"],
        **{f"validation_{name}": value for name, value in scores.pop("model").items()},
        "validation_people": len(np.unique(truth)),
        "validation_images": len(truth),
        "baseline": {f"{name}_{metric}": value for name, each in scores.items() for metric, value in each.items()},
        "largest_difference_of_saved_model": ended.difference,
        "pictures": list(PICTURES),
    }


def embedded(model: torch.nn.Module, split: Split, scale: Scale, together: int = 200) -> Vectors:
    """Where the model puts the faces."""
    model.eval()
    with torch.no_grad():
        parts = [
            embed_both(model, scale.tensor(split.pixels[start : start + together]))
            for start in range(0, len(split.labels), together)
        ]
    return torch.cat(parts).double().numpy()


def baselines(images: Images) -> dict[str, Vectors]:
    """Pixels less the mean training face; and eigenfaces (Turk and Pentland, 1991) of the training ones, whitened."""
    from sklearn.decomposition import PCA

    training, held_out = (
        part.pixels.mean(-1, dtype=np.float64).reshape(len(part.labels), -1)
        for part in (images.training, images.held_out)
    )
    fitted = PCA(min(_COMPONENTS, len(training) - 1, training.shape[1]), whiten=True, random_state=0).fit(training)
    return {"pixels": _unit(held_out - training.mean(0)), "eigenfaces": _unit(fitted.transform(held_out))}


def _unit(rows: Vectors) -> Vectors:
    found: Vectors = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return found


def rank_1(vectors: Vectors, labels: Labels) -> float:
    """The share of faces whose most similar face among *one* of each person shows the same person.

    The mean over all choices of the one: the first images of all people, the second ones, and so on.
    """
    people = [np.flatnonzero(labels == person) for person in np.unique(labels)]
    right = []
    for index in range(min(map(len, people))):
        known = np.array([places[index] for places in people])
        others = np.setdiff1d(np.arange(len(labels)), known)
        said = labels[known][(vectors[others] @ vectors[known].T).argmax(1)]
        right.append((said == labels[others]).mean())
    return float(np.mean(right))


def verification(vectors: Vectors, labels: Labels) -> tuple[float, float, Curve]:
    """Of all pairs of faces: the equal error rate, the area under the ROC curve, and the curve (false positive rate,
    true positive rate). The equal error rate is where the curve, between its points, crosses that of equal errors.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    first, second = np.triu_indices(len(labels), 1)
    same, alike = labels[first] == labels[second], (vectors @ vectors.T)[first, second]
    wrongly, rightly, _ = roc_curve(same, alike)
    return equal_error_rate(wrongly, rightly), float(roc_auc_score(same, alike)), (wrongly, rightly)


def draw_roc(path: Path, curves: Mapping[str, Curve], scores: Mapping[str, Mapping[str, float]]) -> None:
    """The curves with a logarithmic axis of false positives, on which good systems differ."""
    figure = new_figure(6.5, 5)
    axes = figure.add_subplot()
    for (name, (wrongly, rightly)), colour in zip(curves.items(), ("#c8553d", "#888888", "#4878a8"), strict=True):
        said = f"{name}: EER {scores[name]['equal_error_rate']:.1%}, AUC {scores[name]['roc_auc']:.3f}"
        axes.plot(np.maximum(wrongly, 1e-4), rightly, color=colour, label=said)
    axes.plot(np.geomspace(1e-4, 1), np.geomspace(1e-4, 1), ":", color="#bbbbbb", lw=1, label="chance")
    axes.set(
        xscale="log",
        xlim=(1e-4, 1),
        ylim=(0, 1.01),
        xlabel="pairs of two people taken for one",
        ylabel="pairs of one person known as such",
        title="Do two pictures show one person? People never seen",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def draw_nearest(path: Path, images: Images, vectors: Vectors, rows: int = 10, nearest: int = 7) -> None:
    """A face of each of some people, and those that lie nearest to it."""
    pixels, labels = images.held_out
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -2)
    shown, words = [], []
    for person in np.unique(labels)[:rows]:
        face = int(np.flatnonzero(labels == person)[0])
        shown.append(pixels[face])
        words.append(f"{images.classes[person]}: nearest →")
        for place in np.argsort(-alike[face], kind="stable")[:nearest]:
            shown.append(pixels[place])
            verdict = "same" if labels[place] == person else f"WRONG: {images.classes[labels[place]]}"
            words.append(f"{alike[face, place]:.2f} {verdict}")
    draw_gallery(path, shown, words, "Faces of people never seen, and the nearest to them", columns=nearest + 1)


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures."""
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; on {found['validation_images']} images "
        f"of {found['validation_people']} people never seen:",
    )
    beside = found["baseline"]
    rows = {
        "model": {name.removeprefix("validation_"): value for name, value in found.items()},
        **{
            each: {name.removeprefix(f"{each}_"): value for name, value in beside.items()}
            for each in ("eigenfaces", "pixels")
        },
    }
    for name, row in rows.items():
        figures = f"rank-1 {row['rank_1']:.1%}   EER {row['equal_error_rate']:.1%}   ROC-AUC {row['roc_auc']:.3f}"
        say(console, f"  {name:<11}{figures}{'' if name == 'model' else '   (a baseline)'}")
    say_saved(console, "AutoModel.from_pretrained", "vectors", found["largest_difference_of_saved_model"])
    names = "model.safetensors, config.json, preprocessor_config.json, metrics.jsonl, loss.png, report.json"
    say(console, f"{folder}: {names}, {', '.join(PICTURES)}", whole=True)
