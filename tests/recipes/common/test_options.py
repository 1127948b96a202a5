"""An option is written once, in the settings: help, default, bounds, and whether a run that goes on can change it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.common.command import command
from headwater_recipes.common.options import Option, check_bounds, fields, make_changes
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.settings import Training
from headwater_recipes.finetune import settings as finetune
from headwater_recipes.lm import settings as lm
from tests.recipes.linear_recipe import Linear, LinearSettings


class ManySettings(Training, frozen=True, kw_only=True):
    """Of every kind."""

    files: Annotated[tuple[str, ...], Option("Some.", path=True)] = ()
    share: Annotated[float | None, Option("Between.", least=1, most=3)] = None
    deep: Annotated[bool, Option("Or not.")] = False
    inner: int = 3
    workers: int = 7


MANY = Recipe("many", "Of every kind.", "nowhere:Task", ManySettings)


def _helps(recipe: Recipe[Any]) -> dict[str, str]:
    return {
        name: each.annotation.__metadata__[0].help
        for name, each in inspect.signature(command(recipe)).parameters.items()
    }


def test_help_says_the_default_of_the_recipe_and_not_of_its_base() -> None:
    many, small, large = _helps(MANY), _helps(lm.RECIPE), _helps(finetune.RECIPE)
    assert [each["workers"] for each in (many, small, large)] == [
        f"Worker processes. Default: {count}." for count in (7, 2, 2)
    ]
    assert [each["minutes"].split()[-1] for each in (small, large)] == ["2.5.", "3."]
    assert many["run"] == "The run's folder. Default: runs/many-DATE-TIME."
    assert all("{" not in text for each in (many, small, large) for text in each.values())
    assert "inner" not in many
    assert "betas" not in small
    assert list(large)[:2] == ["model", "lora"]  # what it is about comes first
    assert list(large).index("run") == list(large).index("data") + 1


def test_what_typer_makes_of_each_word() -> None:
    kinds = {name: each.annotation for name, each in inspect.signature(command(MANY)).parameters.items()}
    assert get_args(get_args(kinds["files"])[0]) == (list[Path], type(None))
    assert get_args(get_args(kinds["ack"])[0]) == (str, type(None))  # its words are checked with ours
    assert get_args(get_args(kinds["share"])[0]) == (float, type(None))
    assert get_args(kinds["deep"])[0] is bool


def test_a_switch_says_nothing_unless_it_is_given() -> None:
    """So that a run that began with it goes on with it."""
    assert make_changes(Training, {"elastic": False}) == {}
    assert make_changes(Training, {"elastic": True}) == {"elastic": True}


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"files": [Path("a"), Path("b")], "state": Path("c"), "share": None, "seed": 3}
    found = make_changes(ManySettings, given)
    assert found == {"files": (str(tmp_path / "a"), str(tmp_path / "b")), "state": str(tmp_path / "c"), "seed": 3}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"share": 0.5}, "share=0.5: must be from 1 to 3; nothing was started"),
        ({"share": 3.5}, "share=3.5: must be from 1 to 3; nothing was started"),
        ({"workers": 0}, "workers=0: must be 1 or more; nothing was started"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0; nothing was started"),
    ],
)
def test_bounds(changes: dict[str, Any], says: str) -> None:
    check_bounds(ManySettings(share=2.0))
    with pytest.raises(UsageError) as refused:
        check_bounds(ManySettings(**changes))
    assert str(refused.value) == says


def test_an_option_that_is_defined_again_counts_once() -> None:
    assert [field.name for field in fields(ManySettings)].count("workers") == 1
    assert {field.name for field in fields(ManySettings) if field.option.fixed} == {"data", "seed"}


def test_a_model_that_exists_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    look_up, quiet = finetune.FinetuneSettings.look_up, Console(quiet=True)
    assert look_up({"model": "smollm2"}, quiet) == {"model": "smollm2"}
    assert look_up({"seed": 1}, quiet) == {"seed": 1}
    (tmp_path / "smollm2").mkdir()  # a folder of the user's, called as the default model is
    assert look_up({"model": "smollm2", "seed": 1}, quiet) == {"model": str(tmp_path / "smollm2"), "seed": 1}


def test_a_model_without_a_library_of_its_own_is_written_and_read(tmp_path: Path) -> None:
    task = Linear(LinearSettings(), tmp_path)
    model = task.build()
    task.write(model, tmp_path)
    changed = Linear(LinearSettings(seed=5), tmp_path).read(tmp_path).state_dict()
    assert changed["weight"].equal(model.state_dict()["weight"])
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="the model cannot be read"):
        task.read(tmp_path)
