"""The bytes of a pipe as lines."""

from __future__ import annotations

_LINE = 1 << 16
_PROMPT = 0.1
"""Seconds after which a line without an end is taken for a prompt."""


class LineSplitter:
    """Bytes of one pipe in, whole lines out.

    A progress bar redraws itself by carriage returns: of these at most one a second becomes a line, so that a bar
    neither floods the terminal nor looks dead. A line longer than 64 KiB is cut.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._redrawn = float("-inf")
        self._fed = float("-inf")

    def feed(self, data: bytes, now: float) -> list[str]:
        """The lines that ``data`` completes at time ``now`` (seconds)."""
        self._fed = now
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [self._text(line.rstrip(b"\r").rpartition(b"\r")[2]) for line in whole]
        drawn, returned, rest = self._rest.rpartition(b"\r")
        if returned:
            self._rest = rest
            if now - self._redrawn >= 1.0:
                self._redrawn = now
                lines.append(self._text(drawn.rpartition(b"\r")[2]))
        if len(self._rest) > _LINE:
            lines.append(self._text(self._rest))
            self._rest = b""
        return lines

    @property
    def prompting(self) -> float:
        """When an unfinished line is to be taken for a prompt. A progress bar, which is redrawn, never is."""
        asked = bool(self._rest) and self._redrawn == float("-inf")
        return self._fed + _PROMPT if asked else float("inf")

    def prompt(self) -> str:
        """The unfinished line; what its process adds to it will be a line of its own."""
        rest, self._rest = self._rest, b""
        return self._text(rest)

    def flush(self) -> list[str]:
        """What is left when the pipe closes."""
        rest, self._rest = self._rest, b""
        return [self._text(rest)] if rest else []

    @staticmethod
    def _text(line: bytes) -> str:
        return line.decode("utf-8", errors="replace")
