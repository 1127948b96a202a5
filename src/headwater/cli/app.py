"""The tree of commands, and what becomes of an error.

``export``, ``serve``, ``relay`` and what other packages add (recipes, ``bench``, ``chaos``) cost an import of torch or
more, so they are loaded when they are called.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

import headwater
from headwater.cli import plugins, versions
from headwater.cli.add_server import add_server
from headwater.cli.console import complain
from headwater.cli.drain import drain
from headwater.cli.mistakes import Root
from headwater.cli.run import run
from headwater.cli.snapshot import snapshot
from headwater.cli.status import status
from headwater.cli.up import up
from headwater.errors import HeadwaterError
from headwater.launch import streams

if TYPE_CHECKING:
    from collections.abc import Sequence

# Arguments after the script's name are the script's, even if they look like options.
_PASS_ON = {"allow_interspersed_args": False}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"headwater {headwater.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A parameter server for PyTorch."""
    del version


def build(words: Sequence[str]) -> typer.Typer:
    """The command tree for a command line of these words."""
    app = typer.Typer(
        name="headwater",
        cls=Root,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        callback=_root,
        context_settings={"help_option_names": ["-h", "--help"]},  # of all commands: they inherit it
    )
    app.command(context_settings=_PASS_ON)(run)
    app.command()(up)
    app.command()(status)
    app.command("add-server")(add_server)
    app.command()(drain)
    app.command()(snapshot)
    app.add_typer(versions.app, name="versions")
    own = {each.name or getattr(each.callback, "__name__", "") for each in app.registered_commands}
    called = next((word for word in _completed() or words if not word.startswith("-")), None)
    # For a word that is no command all are added, so that the message can say which one may be meant.
    plugins.add(app, called if called in {*own, "versions", *plugins.names()} else None)
    return app


def _completed() -> list[str]:
    """The words after ``headwater`` on the command line that a shell asks to complete; none otherwise."""
    if "_HEADWATER_COMPLETE" not in os.environ:
        return []
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``headwater`` script; always ends in ``SystemExit``.

    An error that Headwater raises on purpose is one line on stderr and exit code 1; with ``HEADWATER_DEBUG=1`` it is
    a traceback.
    """
    streams.prepare()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        build(words)(args=words, prog_name="headwater")
    except HeadwaterError as error:
        if os.environ.get("HEADWATER_DEBUG") == "1":
            raise
        complain(f"{error.code}: {error}")
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = plugins.extra_of(error.name or "")
        if extra is None or os.environ.get("HEADWATER_DEBUG") == "1":
            raise
        complain(f"this command needs {error.name}, which is not installed: pip install 'headwater[{extra}]'")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
