"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe, Wording
from headwater_recipes.common.settings import Training


class DetectionSettings(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are those of trees seen from the air."""

    MINUTES = 4.0

    data: Annotated[
        tuple[str, ...],
        Option(
            "A .csv file with columns image, xmin, ymin, xmax, ymax, label (images beside it; an image that has no box "
            "is named once, with the others empty), a .json file in COCO's form, a folder with train.* and test.* of "
            "these, or a name that the library datasets finds. Default: trees from the air.",
            path=True,
            named=True,
            fixed=True,
        ),
    ] = ()
    tile: Annotated[
        int, Option("Side of the pieces of images that are learnt from, in pixels: a multiple of 16.", fixed=True)
    ] = 192
    width: Annotated[
        int, Option("Channels of the network; a multiple of 8. Default: {default}.", least=8, fixed=True)
    ] = 32
    batch: Annotated[int, Option("Pieces of images per worker and step. Default: {default}.", least=1)] = 6
    lr: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 30
    validate_every: int = 200

    def check(self) -> None:
        super().check()
        for name, each, unit in (("tile", self.tile, 16), ("width", self.width, 8)):
            if each % unit or each < unit:
                raise UsageError(f"{name}={each} is not a multiple of {unit}; nothing was started")


RECIPE = Recipe(
    name="detection",
    help="""Find things in images: a box around each, and what it is.

    Example: headwater train detection --workers 2
    Example: headwater train detection --data cars/train.csv

    Ctrl-C stops and saves; --resume goes on. The run's folder holds the
    model, its mean average precision on images that it never saw, and
    these images with its boxes beside the true ones.
    """,
    task="headwater_recipes.detection.task:Detection",
    settings=DetectionSettings,
    served="headwater_recipes.detection.serving:DetectionServed",
    wording=Wording(unit="tiles", data="images", prepared="the boxes"),
    about=About(
        task="object detection",
        data=("tree-crowns",),
        model="CenterNet (objects as points) from scratch, 0.6 M parameters",
        metric="mAP@50, mAP@[50:95]",
        baseline="a grid of mean boxes; green blobs",
        minutes=4.2,
    ),
)
