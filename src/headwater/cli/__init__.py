"""The ``headwater`` command."""

from __future__ import annotations

import os
import signal
import sys
import threading
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
            _leave_threads(sys.exc_info()[1])


def _leave_threads(ending: BaseException | None) -> None:
    """End at once if a thread still loads a model: what it uses must not be taken down under it (SIGABRT)."""
    loads = any(thread.name == "headwater-load" and thread.is_alive() for thread in threading.enumerate())
    if loads and isinstance(ending, (SystemExit, KeyboardInterrupt)):
        code = 130 if isinstance(ending, KeyboardInterrupt) else ending.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
