"""Pictures of what came of it: a gallery of images with words under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwater_recipes.common.pictures import new_figure
from headwater_recipes.images.decode import Pixels


def draw_gallery(path: Path, images: Sequence[Pixels], words: Sequence[str], title: str, columns: int = 8) -> None:
    """Images of shape (S, S, C), each with its words under it."""
    rows = max(1, -(-len(images) // columns))
    figure = new_figure(1.5 * columns, 1.95 * rows + 0.5)
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, image, said in zip(grid.flat, images, words, strict=False):
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_xlabel(said, fontsize=7, labelpad=3)
    figure.savefig(path, dpi=110)
