"""The tree of commands, and what becomes of an error.

``bench``, ``chaos``, ``export`` and the recipes' commands cost an import of torch or more, so they are loaded when they
are called.
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
        name="headwater", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, callback=_root
    )
    app.command(context_settings=_PASS_ON)(run)
    app.command()(up)
    app.command()(status)
    app.command("add-server")(add_server)
    app.command()(drain)
    app.command()(snapshot)
    app.add_typer(versions.app, name="versions")
    called = next((word for word in words if not word.startswith("-")), None)
    plugins.add(app, called)
    return app


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
