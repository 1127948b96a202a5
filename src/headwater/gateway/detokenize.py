"""Text out of tokens as they come: whole characters only, and never a stop text or the beginning of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens before the answer that are decoded with it: whether a word begins with a space depends on what precedes it."""
_LONGEST = 4
"""Bytes, and so tokens, of the longest character of UTF-8."""


class Detokenizer:
    """Decodes one more token at a time.

    Two decodings are compared, with and without the new tokens, behind a few old ones: a token's text depends on its
    neighbours. (The tokenizers library has a decoder of streams; it raises for ids that change the text
    before them.)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._shown = len(self._ids)
        self._before = decode(self._ids) if self._ids else ""

    def push(self, token: int) -> str:
        """The characters that are complete now; "" if the token leaves one open."""
        self._ids.append(token)
        if len(self._ids) - self._shown > 2 * _LONGEST:
            return self._show(len(self._ids) - _LONGEST)  # not half a character: bytes that never become one
        return self._show(len(self._ids), whole=True)

    def flush(self) -> str:
        """What is held back, now that nothing follows: whole characters, and U+FFFD for one that is not."""
        after = self._decode(self._ids)
        text, self._before, self._shown = after[len(self._before) :], after, len(self._ids)
        return text

    def _show(self, stop: int, *, whole: bool = False) -> str:
        after = self._decode(self._ids[:stop])
        if whole and (len(after) <= len(self._before) or after.endswith(_REPLACEMENT)):
            return ""
        text = after[len(self._before) :]
        # The tokens just shown become the context of the next.
        self._ids = self._ids[self._shown :]
        self._shown = stop - self._shown
        self._before = self._decode(self._ids[: self._shown])
        return text


class StopTexts:
    """Passes text on until one of ``stops`` appears in it, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # where in it texts of special tokens begin, and their lengths

    def push(self, text: str, special: str = "") -> tuple[str, bool]:
        """The text that may be shown, and whether a stop text has come. The earliest wins; it is not shown.

        ``special``: what follows the text and is not to be shown, but may be (a part of) a stop text.
        """
        if not self._stops:
            return text, False
        self._held += text
        if special:
            self._hidden.append((len(self._held), len(special)))
            self._held += special
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        keep = max(overlap(self._held, stop) for stop in self._stops)
        shown = self._take(min(found) if found else len(self._held) - keep)
        if found:
            self._held, self._hidden = "", []
        return shown, bool(found)

    def flush(self) -> str:
        """What is held back, now that nothing follows it."""
        return self._take(len(self._held))

    def _take(self, size: int) -> str:
        """The first ``size`` characters, without those of special tokens."""
        shown, at, left = "", 0, []
        for begin, length in self._hidden:
            end = min(begin + length, size)
            shown += self._held[at : min(begin, size)]
            at = max(at, end)
            if begin + length > size:
                left.append((max(begin - size, 0), begin + length - max(begin, size)))
        shown += self._held[at:size]
        self._held, self._hidden = self._held[size:], left
        return shown


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
