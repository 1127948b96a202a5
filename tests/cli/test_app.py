"""The command tree, and what the shell sees of an error."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import typer

import headwater
from headwater.cli import app as app_module
from headwater.cli import plugins

Command = Callable[..., Any]


def test_version(headwater_command: Command) -> None:
    answer = headwater_command("--version")
    assert (answer.code, answer.out) == (0, f"headwater {headwater.__version__}\n")


def test_the_help_names_every_command(headwater_command: Command) -> None:
    answer = headwater_command("--help")
    assert answer.code == 0
    own = ("run", "up", "status", "add-server", "drain", "snapshot", "versions", "export", "chaos", "bench")
    for name in (*own, "train", "generate"):
        assert f" {name} " in answer.out


def test_an_unknown_command_is_a_usage_error(headwater_command: Command) -> None:
    answer = headwater_command("swim")
    assert answer.code == 2
    assert "swim" in answer.err


def _with_command(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> None:
    def build(_: object) -> typer.Typer:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command("fail")(command)
        app.command("other")(plugins._nothing)
        return app

    monkeypatch.setattr(app_module, "build", build)


def test_an_error_of_ours_is_one_line_without_a_traceback(
    headwater_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise headwater.UnknownTable("no table 'w'; [declare] it first")

    _with_command(monkeypatch, fail)
    answer = headwater_command("fail")
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err == "headwater: UnknownTable: no table 'w'; [declare] it first\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise headwater.UnknownTable("no table 'w'")

    _with_command(monkeypatch, fail)
    monkeypatch.setenv("HEADWATER_DEBUG", "1")
    with pytest.raises(headwater.UnknownTable):
        app_module.main(["fail"])


def test_a_missing_optional_library_names_the_extra(
    headwater_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    _with_command(monkeypatch, fail)
    answer = headwater_command("fail")
    assert answer.code == 1
    assert "pip install 'headwater[recipes]'" in answer.err


@pytest.mark.parametrize(("module", "extra"), [("tokenizers", "recipes"), ("pytest", "dev"), ("nowhere", None)])
def test_which_extra_brings_a_module(module: str, extra: str | None) -> None:
    assert plugins.extra_of(module) == extra


def _a_recipe(name: str = "x") -> None:
    """Train something."""
    typer.echo(f"trained {name}")


def test_a_recipe_hangs_where_its_entry_point_says(headwater_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("train.toy", f"{__name__}:_a_recipe", plugins.GROUP)]
    monkeypatch.setattr(EntryPoint, "load", lambda _: _a_recipe)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == plugins.GROUP else [])
    answer = headwater_command("train", "toy", "--name", "it")
    assert (answer.code, answer.out) == (0, "trained it\n")
    assert "Train something." in headwater_command("train", "--help").out


def test_a_recipe_that_cannot_be_imported_spoils_only_itself(
    headwater_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EntryPoint("train.toy", "nowhere_at_all:train", plugins.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == plugins.GROUP else [])
    assert headwater_command("--help").code == 0
    assert headwater_command("--version").code == 0
    with pytest.raises(ModuleNotFoundError):
        app_module.main(["train", "toy"])
