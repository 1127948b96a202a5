"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated, Literal

from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe, Wording
from headwater_recipes.common.settings import Training


class ImageSettings(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are what Fashion-MNIST is trained with."""

    MINUTES = 3.0

    model: Annotated[
        str,
        Option(
            "A classifier to train on: a folder, or a name on the hub. Default: a small ResNet from scratch.",
            fixed=True,
        ),
    ] = ""
    size: Annotated[
        int, Option("Pixels that images are resized to, both ways. Default: {default}.", least=8, most=1024, fixed=True)
    ] = 28
    augment: Annotated[
        Literal["none", "shift", "flip"],
        Option("none, shift (moved a little) or flip (and half of them mirrored). Default: {default}."),
    ] = "flip"
    data: Annotated[
        tuple[str, ...],
        Option(
            "A folder with a subfolder of images for each class (a tenth is held out), or with train/CLASS and "
            "test/CLASS; or a name that the library datasets finds (owner/name). Default: Fashion-MNIST.",
            path=True,
            named=True,
            fixed=True,
        ),
    ] = ()
    batch: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05


RECIPE = Recipe(
    name="image",
    help="""Train an image classifier through servers of its own.

    Example: headwater train image --workers 2 --servers 2

    Example: headwater train image --data photos --size 64

    The run's folder holds a model that transformers loads, with its image processor,
    a confusion matrix and the worst mistakes. Images that cannot be read are left out and counted.
    """,
    task="headwater_recipes.image.task:ImageClassification",
    settings=ImageSettings,
    served="headwater_recipes.image.serving:ImageServed",
    wording=Wording(
        unit="images",
        headline="{accuracy:.1%} right",
        data="images",
        prepared="the prepared images",
    ),
    about=About(
        task="image classification",
        data=("fashion-mnist",),
        model="ResNet from scratch, 0.3 M parameters",
        metric="accuracy",
        baseline="most frequent class; logistic regression on pixels",
        minutes=3.5,
    ),
)
