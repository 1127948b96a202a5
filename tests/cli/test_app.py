"""The command tree, and what the shell sees of an error."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer

import headwater
from headwater.cli import app as app_module
from headwater.cli import plugins

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]


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
    points = [
        EntryPoint("train.toy", "nowhere_at_all:train", plugins.GROUP),
        EntryPoint("train.whole", f"{__name__}:_a_recipe", plugins.GROUP),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == plugins.GROUP else [])
    assert headwater_command("--help").code == 0
    assert headwater_command("--version").code == 0
    assert "(not available: nowhere_at_all:train cannot be imported)" in headwater_command("train", "--help").out
    assert headwater_command("train", "whole", "--name", "it").out == "trained it\n"
    with pytest.raises(ModuleNotFoundError):
        app_module.main(["train", "toy", "--epochs", "3"])


def test_a_package_may_add_a_group(headwater_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    group = typer.Typer(help="Toys.")
    group.command("one")(_a_recipe)
    group.command("two")(_a_recipe)
    points = [EntryPoint("toys", "nowhere_at_all:app", plugins.GROUP)]
    monkeypatch.setattr(EntryPoint, "load", lambda _: group)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == plugins.GROUP else [])
    assert headwater_command("toys", "two", "--name", "it").out == "trained it\n"
    assert " toys " in headwater_command("--help").out
    assert "Did you mean 'one'?" in headwater_command("toys", "onn").err


def test_the_commands_of_headwater_bench_have_entry_points() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][plugins.GROUP]
    assert {name for name, value in points.items() if value.startswith("headwater_bench.")} == set(plugins.BESIDE)


@pytest.mark.parametrize("line", ["bench", "bench small --rounds 3", "chaos --help"])
def test_an_installation_that_is_older_than_the_files_is_told_so(
    headwater_command: Command, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    answer = headwater_command(*line.split())
    assert (answer.code, answer.out) == (1, "")
    assert f"the command '{line.split()[0]}' is not registered" in answer.err
    assert "pip install -e ." in answer.err
    assert "install Headwater again" in headwater_command("--help").out
    assert headwater_command("status", "--help").code == 0


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("trian", "Did you mean 'train'?"),
        ("stat", "Did you mean 'status'?"),
        ("serv", "Did you mean 'serve'?"),
        ("lm", "Did you mean 'train lm'?"),
        ("rollback", "Did you mean 'versions rollback'?"),
        ("train ml", "There is: commands, detection, faces, image, linear, lm, qa, sentiment, speech, translation."),
        ("versions rolback m production", "Did you mean 'rollback'?"),
        ("bench stp", "Did you mean 'step'?"),
        ("benhc", "Did you mean 'bench'?"),
        ("chaso", "Did you mean 'chaos'?"),
        ("chaos --second 3", "Did you mean '--seconds'?"),
        ("run --worker 2", "Did you mean '--workers'?"),
        ("train lm --step 3", "Did you mean '--steps'?"),
        ("status --whatch", "Did you mean '--watch'?"),
        ("--versoin", "Did you mean '--version'?"),
    ],
)
def test_what_was_probably_meant(headwater_command: Command, line: str, meant: str) -> None:
    answer = headwater_command(*line.split())
    assert answer.code == 2
    assert meant in " ".join(answer.err.replace("│", " ").split())


def test_what_is_like_nothing_is_only_refused(headwater_command: Command) -> None:
    answer = headwater_command("run", "--xyzzy")
    assert answer.code == 2
    assert "No such option: --xyzzy." in answer.err
    assert "mean" not in answer.err


@pytest.mark.parametrize("line", ["", "run", "versions", "versions rollback", "bench", "serve", "train", "train lm"])
def test_h_is_help_everywhere(headwater_command: Command, line: str) -> None:
    answer = headwater_command(*line.split(), "-h")
    assert answer.code == 0
    assert f"Usage: {' '.join(('headwater', *line.split()))}" in answer.out


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("stat", "status"),
        ("train l", "linear lm"),
        ("serve --mod", "--model --module"),
        ("versions ro", "rollback"),
        ("bench st", "step"),
        ("cha", "chaos"),
        ("chaos --trans", "--transport"),
    ],
)
def test_a_shell_is_told_how_a_word_goes_on(
    headwater_command: Command, monkeypatch: pytest.MonkeyPatch, line: str, completed: str
) -> None:
    words = ["headwater", *line.split()]
    monkeypatch.setenv("_HEADWATER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert headwater_command().out.split() == completed.split()


def test_a_ctrl_c_is_a_line_and_130_also_amid_an_import(
    headwater_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def importing() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy's extensions") from error

    for command in (interrupted, importing):
        monkeypatch.setattr(app_module, "run", command)
        answer = headwater_command("interrupted" if command is interrupted else "importing")
        assert (answer.code, answer.out, answer.err) == (130, "", "headwater: interrupted\n")
