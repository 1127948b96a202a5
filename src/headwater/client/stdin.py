"""The standard input of a worker that a launcher gave none: reading it says so, instead of finding an end of file."""

from __future__ import annotations

import io
import os
import sys

from headwater.errors import UsageError


class NoInput(UsageError, EOFError):
    """A worker reads its standard input, and has none."""


class _Nothing(io.RawIOBase):
    """``/dev/null`` that speaks. Debuggers take an ``EOFError`` for their end, so stderr is told too."""

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0

    def isatty(self) -> bool:
        return False

    def readinto(self, _: object) -> int:
        rank = os.environ.get("HEADWATER_RANK", "0")
        what = f"worker {rank} reads its standard input and has none; headwater run --stdin-rank {rank} gives it yours"
        print(f"headwater: {what}", file=sys.stderr, flush=True)
        raise NoInput(what)


def refuse() -> None:
    """Put it in the place of ``sys.stdin`` where that is ``/dev/null``: not if the script has found another."""
    try:
        same = os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev and sys.stdin.fileno() == 0
    except (OSError, ValueError, AttributeError):
        return
    if same:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_Nothing()), encoding="utf-8")
