"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe, Wording
from headwater_recipes.common.settings import Training


class FacesSettings(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are what the ORL faces are trained with."""

    size: Annotated[
        int,
        Option("Pixels that images are resized to, both ways. Default: {default}.", least=16, most=1024, fixed=True),
    ] = 48
    each: Annotated[int, Option("Images of each person in a batch. Default: {default}.", least=2)] = 4
    margin: Annotated[float, Option("Of the loss, in cosines. Default: {default}.", above=0)] = 0.2
    temperature: Annotated[float, Option("That cosines are divided by. Default: {default}.", above=0)] = 0.1
    augment: Annotated[
        Literal["none", "shift", "flip", "warp"],
        Option(
            "none, shift (moved a little), flip (and half of them mirrored) or warp (turned, scaled, partly "
            "hidden as well). Default: {default}."
        ),
    ] = "warp"
    data: Annotated[
        tuple[str, ...],
        Option(
            "A folder with a subfolder of images for each person; a quarter of the people is held out; "
            "or a name that the library datasets finds (owner/name). Default: the ORL faces.",
            path=True,
            named=True,
            fixed=True,
        ),
    ] = ()
    batch: int = 60
    lr: float = 3e-3
    weight_decay: float = 0.05
    validate_every: int = 50

    steps: int | None = 200
    """More do not help with so few people: it gets to know them, not what tells people apart."""

    @classmethod
    def of(cls, changes: dict[str, Any]) -> Self:
        return cls(**({"steps": None, **changes} if "minutes" in changes else changes))

    def check(self) -> None:
        super().check()
        if self.batch < 2 * self.each:
            raise UsageError(
                f"--batch {self.batch}: a batch of --each {self.each} images of a person must hold two people or more; "
                f"nothing was started"
            )


RECIPE = Recipe(
    name="faces",
    help="""Train a recogniser of faces through servers of its own.

    Example: headwater train faces --workers 2 --servers 2

    It learns to tell people apart, and is judged by people whom it never saw: whose face is it
    (rank-1), do two show one person (EER, ROC-AUC). The run's folder holds a model that
    transformers loads, its ROC curve and the nearest faces.
    """,
    task="headwater_recipes.faces.task:Faces",
    settings=FacesSettings,
    served="headwater_recipes.faces.serving:FacesServed",
    wording=Wording(
        unit="images",
        headline="{nearest:.1%} have a nearest face of the same person",
        data="people",
        prepared="the prepared faces",
    ),
    about=About(
        task="recognition and verification of faces",
        data=("orl-faces",),
        model="ResNet from scratch, 0.3 M parameters",
        metric="rank-1, equal error rate, ROC-AUC of people never seen",
        baseline="pixels; eigenfaces",
        minutes=0.5,
    ),
)
