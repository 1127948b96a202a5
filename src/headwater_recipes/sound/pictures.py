"""Pictures of what a classifier of sounds does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from headwater_recipes.common.pictures import new_figure
from headwater_recipes.sound.score import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 20
"""Labels that a map names in its legend."""


def embedding_map(path: Path, seen: Floats, labels: Ints, names: Sequence[str], title: str) -> None:
    """Sounds (N, E) on a plane, near each other if the network takes them for alike (t-SNE; axes mean nothing)."""
    from sklearn.manifold import TSNE

    nearness = max(1.0, min(30.0, (len(seen) - 1) / 3))
    plane = TSNE(perplexity=nearness, init="pca", random_state=0).fit_transform(seen)
    figure = new_figure(8.5, 6.5)
    axes = figure.add_subplot()
    if len(names) <= _FEW:
        for label, name in enumerate(names):
            of = plane[labels == label]
            axes.scatter(of[:, 0], of[:, 1], s=14, alpha=0.75, label=f"{name} ({len(of)})", color=f"C{label % 10}")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.scatter(plane[:, 0], plane[:, 1], s=10, c=labels, cmap="hsv", alpha=0.6)
        for label, name in enumerate(names):
            if (labels == label).any():
                x, y = np.median(plane[labels == label], axis=0)
                axes.text(x, y, name, fontsize=8, ha="center", va="center")
    axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def spectrograms(
    path: Path, mels: Sequence[Tensor], told: Ints, labels: Ints, names: Sequence[str], title: str, most: int = 16
) -> None:
    """Some sounds, (T, M) each, at equal distances among the given, with what is told; mistakes in red."""
    places = np.unique(np.linspace(0, len(mels) - 1, min(most, len(mels))).round().astype(int))
    columns = 4
    rows = -(-len(places) // columns)
    figure = new_figure(11, 1 + 1.9 * rows)
    for index, place in enumerate(places):
        axes: Axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(mels[place].T.numpy(), origin="lower", aspect="auto", cmap="magma")
        right = told[place] == labels[place]
        text = names[told[place]] if right else f"{names[told[place]]} (said: {names[labels[place]]})"
        axes.set_title(text, fontsize=10, color="black" if right else "#c8102e")
        axes.set_xticks([0, len(mels[place])], ["0", f"{len(mels[place]) / 100:.1f} s"], fontsize=7)
        axes.set_yticks([])
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
