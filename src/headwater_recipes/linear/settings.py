"""What a run of this recipe is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from rich.console import Console

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe, Wording
from headwater_recipes.common.settings import Training

GENERATED, DIABETES = "generated", "diabetes"


class LinearSettings(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run has a number of steps, not of minutes. Two workers of the default ``batch`` see all default rows in each
    step: then the gradient is that of the whole table, and β comes to the closed form's.
    """

    data: Annotated[
        tuple[str, ...],
        Option(
            "generated, diabetes, or a .csv file: a row of names, then rows of numbers, the last column is what is "
            "predicted. Default: generated.",
            fixed=True,
        ),
    ] = (GENERATED,)
    rows: Annotated[int, Option("Generated: rows. Default: {default}.", least=10, most=10_000_000, fixed=True)] = 10_000
    features: Annotated[int, Option("Generated: columns. Default: {default}.", least=1, most=1000, fixed=True)] = 20
    noise: Annotated[
        float, Option("Generated: standard deviation of y around βx. Default: {default}.", above=0, fixed=True)
    ] = 1.0
    batch: Annotated[int, Option("Rows per worker and step. Default: {default}.", least=1)] = 4096
    lr: float = 0.05
    weight_decay: float = 0.0
    steps: Annotated[int | None, Option("Train for so many steps in all. Default: 1000.", above=0)] = 1000
    log_every: int = 20

    @classmethod
    def of(cls, changes: dict[str, Any]) -> Self:
        return cls(**{**({"steps": None} if changes.get("minutes") is not None else {}), **changes})

    @classmethod
    def look_up(cls, changes: dict[str, Any], console: Console) -> dict[str, Any]:
        """A file is named by its whole path, as workers may run elsewhere."""
        given = changes.get("data")
        if given is None:
            return changes
        return {**changes, "data": tuple(each if each in (GENERATED, DIABETES) else _whole(each) for each in given)}

    def check(self) -> None:
        super().check()
        if len(self.data) != 1:
            raise UsageError(f"--data {', '.join(self.data)}: give one table; nothing was started")


def _whole(path: str) -> str:
    return str(Path(path).resolve())


RECIPE = Recipe(
    name="linear",
    help="""Fit y = βx + c by least squares through servers, beside the closed form.

    Example: headwater train linear
    Example: headwater train linear --data diabetes --workers 2
    Example: headwater train linear --data houses.csv

    The run's folder holds the coefficients in model.safetensors, and
    beta.png: each beside the true one, or the closed form's.
    """,
    task="headwater_recipes.linear.task:Linear",
    settings=LinearSettings,
    wording=Wording(
        unit="rows", loss="share of the variance", headline="R² {r2:.4f}", data="rows", prepared="the prepared table"
    ),
    served="headwater_recipes.linear.serving:ServedRegression",
    about=About(
        task="linear regression",
        data=("generated", DIABETES),
        licence="generated: none",
        model="a table of coefficients",
        metric="R², β",
        baseline="mean, closed form",
        minutes=0.2,
    ),
)
