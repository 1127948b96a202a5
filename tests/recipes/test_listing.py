"""`headwater recipes` names what can be trained, of whatever package, with the licences of its data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from headwater.cli.app import build
from headwater_recipes import listing
from headwater_recipes.common.recipe import About
from headwater_recipes.data.catalog import CATALOG
from headwater_recipes.lm.settings import RECIPE
from tests.recipes.linear_recipe import Linear


def test_every_recipe_of_ours_says_what_it_is() -> None:
    known = {recipe.typed: recipe for recipe in listing.found()}
    assert {"headwater train lm", "headwater finetune"} <= set(known)
    for recipe in known.values():
        about = recipe.about
        assert about is not None, recipe.name
        assert all(about[:5]), recipe.name
        assert 0 < about.minutes <= 10
        assert listing.row(recipe).licence, f"{recipe.name}: whose data are {about.data}?"
        assert all(name in CATALOG for name in about.data) or about.licence, recipe.name


def test_the_licences_are_those_of_the_data() -> None:
    about = About(
        "sounds", ("klettres", "ktuberling", "asterisk-en", "noise"), "a net", "accuracy", "none", 2.5, "CC0-1.0"
    )
    shown = listing.row(replace(RECIPE, about=about))
    assert shown.licence == "GPL-2.0-or-later, CC-BY-SA-3.0, CC0-1.0"
    assert shown.data == "klettres, ktuberling, asterisk-en, noise"
    assert shown.minutes == 2.5


def test_a_recipe_that_says_nothing_is_shown_by_its_help() -> None:
    shown = listing.row(Linear.recipe)
    assert (shown.command, shown.task, shown.minutes) == ("headwater train plane", "Fit y = βx.", None)


def test_the_command_shows_it_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "found", lambda: iter([RECIPE, Linear.recipe]))
    app, runner = build(["recipes"]), CliRunner()
    shown = runner.invoke(app, ["recipes"])
    assert shown.exit_code == 0
    assert "bits per byte · unigram" in shown.stdout
    assert "headwater train plane" in shown.stdout
    told = json.loads(runner.invoke(app, ["recipes", "--json"]).stdout)
    assert [each["command"] for each in told] == ["headwater train lm", "headwater train plane"]
    assert told[0]["minutes"] == 3
    assert told[1]["minutes"] is None
