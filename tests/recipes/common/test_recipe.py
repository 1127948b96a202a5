"""What a recipe says of itself: mistakes of its author are told where they are made, not shown as something else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from headwater.errors import UsageError
from headwater_recipes.common.recipe import About, Recipe, Wording
from headwater_recipes.common.settings import Training
from headwater_recipes.common.task import Batch, Ended, Task


class Nothing(Task[Training]):
    recipe = Recipe("nothing", "", f"{__name__}:Nothing", Training)

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def batches(self, step: int) -> Sequence[Batch]:
        return []

    def held_out(self, whole: bool) -> Sequence[Batch]:
        return []

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return torch.zeros(())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"about": About("t", "a file", "", "", "", 1)}, "About.data is a tuple of names, not 'a file'"),  # type: ignore[arg-type]
        ({"wording": Wording(headline="r2")}, "Wording.headline is a format .* and 'r2' names none"),
        ({"task": "module.Class"}, "task='module.Class' must be 'module:Class'"),
        ({"served": "module.Class"}, "served='module.Class' must be 'module:Class'"),
    ],
)
def test_what_would_be_shown_as_something_else_is_refused(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=f"recipe 'x': {told}"):
        Recipe(**{"name": "x", "help": "", "task": "a:B", "settings": Training, **words})


def test_a_task_of_another_recipe_is_not_loaded() -> None:
    assert Nothing.recipe.load() is Nothing
    with pytest.raises(UsageError, match=r"recipe 'other': .*Nothing has no line 'recipe = RECIPE'"):
        Recipe("other", "", f"{__name__}:Nothing", Training).load()


@pytest.mark.parametrize("name", ["prepare", "metrics"])
def test_what_is_called_on_the_class_is_of_the_class(name: str) -> None:
    with pytest.raises(UsageError, match=rf"Mine\.{name} is called on the class.* @classmethod and def {name}\(cls, "):
        type("Mine", (Nothing,), {name: lambda self: {}})
    type("Mine", (Nothing,), {name: classmethod(lambda cls: {})})


def test_a_headline_of_metrics_that_there_are_not_ends_no_training() -> None:
    assert Wording(headline="R² {r2:.2f}").shown({"loss": 1.0, "r2": 0.5}) == "R² 0.50"
    assert Wording(headline="{r3}").shown({"loss": 1.0}) == "(headline '{r3}': 'r3'; there are loss)"


def test_the_end_shows_numbers_baselines_and_pictures(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    figures = {"step": 3, "training_seconds": 61.0, "r2": 0.5, "beta": {"a": 1.0}, "pictures": ["a.png"]}
    ended = Ended(3, 61.0, {}, {"loss": 7.0}, [], None)
    Nothing(Training(), tmp_path).tell(ended, {**figures, "baseline": {"mean": {"r2": 0.0}, "loss": 2.5}}, console)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "trained 3 steps in 1:01; on held-out data: r2 0.5",
        "  beside it, mean: r2 0",
        "  beside it, loss: 2.5",
        f"{tmp_path}: model.safetensors, a.png, metrics.jsonl, loss.png, report.json",
    ]


def test_of_data_one_is_given() -> None:
    assert Training(data=("a.csv",)).one_given("a file") == "a.csv"
    with pytest.raises(UsageError, match="--data: give one, a file; nothing was started"):
        Training().one_given("a file")
    with pytest.raises(UsageError, match=r"--data a\.csv, b\.csv: give one, a file"):
        Training(data=("a.csv", "b.csv")).one_given("a file")
