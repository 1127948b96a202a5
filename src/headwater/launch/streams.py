"""Standard output and error of a process that has work to do: that a line cannot be written never ends the work."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import IO, TYPE_CHECKING, Any

from headwater.transports import standard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def prepare() -> None:
    """For a command, before all else: descriptors 0 to 2 are there, and any text can be printed.

    What is not in the output's encoding (``PYTHONIOENCODING=ascii``) is written with a backslash and its number.
    """
    standard.occupy()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class Sturdy:
    """A text stream that never raises: when nobody reads any more, or a disk is full, what is written is lost.

    Args:
        file: the stream, or ``"stdout"`` or ``"stderr"`` for what ``sys`` has at the time.
        lost: called once, with the reason, when something could not be written.

    Attributes: ``error``: that reason.
    """

    def __init__(self, file: IO[str] | str, lost: Callable[[OSError], None] | None = None) -> None:
        self._given, self._lost = file, lost
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._guard() as file:
            try:
                file.write(text)
            except UnicodeEncodeError:
                encoding = getattr(file, "encoding", None) or "ascii"
                file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._guard() as file:
            file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @property
    def _file(self) -> Any:
        found = getattr(sys, self._given) if isinstance(self._given, str) else self._given
        return found or _Nothing()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[Any]:
        """The stream; what it raises is the end of it."""
        file = self._file if self.error is None else _Nothing()
        try:
            yield file
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
            _silence(file)
            if self._lost is not None:
                self._lost(self.error)


class _Nothing:
    """Takes everything."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing to do."""

    def isatty(self) -> bool:
        return False


def _silence(file: Any) -> None:
    """Python would complain again, and end with code 120, when it flushes at its own exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)
