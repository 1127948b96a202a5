"""The ``headwater`` command."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``headwater`` script; see ``app.main``.

    Ctrl-C shows no traceback of ours, come when it may: not while modules are loaded, nor while Python shuts down.
    """
    try:
        from headwater.cli.app import main as run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if arguments is None:  # this process is the command and ends now
            signal.signal(signal.SIGINT, signal.SIG_DFL)
