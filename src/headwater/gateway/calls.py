"""The calls of tools in an answer's text, taken from it as it comes. See ``grammar`` for how they are written."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headwater.gateway import grammar
from headwater.gateway.detokenize import overlap
from headwater.gateway.engine_types import GenerationEnded, Token
from headwater.gateway.requests import finish_reason

if TYPE_CHECKING:
    from headwater.gateway.openai_types import FinishReason

_HEAD = re.compile(re.escape(grammar.HEAD) + r'"([^"]*)"' + re.escape(grammar.ARGUMENTS))


class Said(NamedTuple):
    """A piece of an answer that is text."""

    text: str


class Called(NamedTuple):
    """A piece of an answer that begins call ``number``."""

    number: int
    id: str
    name: str


class Argued(NamedTuple):
    """A piece of the arguments of call ``number``, which are JSON."""

    number: int
    text: str


Piece = Said | Called | Argued


class Calls:
    """Takes an answer apart, as it comes. What may be the beginning of a tag is held back."""

    def __init__(self) -> None:
        self._held = ""
        self._state = self._text
        self._count = 0

    def push(self, text: str) -> list[Piece]:
        """What the text adds."""
        self._held += text
        return list(self._pieces())

    def flush(self) -> list[Piece]:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        if self._state == self._arguments:
            return [Argued(self._count - 1, held)] if held else []
        if self._state == self._head:
            held = grammar.OPEN + held
        return [Said(held)] if held.strip() or (held and not self._count) else []

    def _pieces(self) -> Iterator[Piece]:
        while True:
            before, held = self._state, len(self._held)
            yield from self._state()
            if self._state == before and len(self._held) == held:
                return

    def _text(self) -> Iterator[Piece]:
        if self._count:
            self._held = self._held.lstrip()  # a line break between two calls is no text
        text, found, rest = self._held.partition(grammar.OPEN)
        if found:
            self._state = self._head
        else:
            keep = overlap(text, grammar.OPEN)
            text, rest = text[: len(text) - keep], text[len(text) - keep :]
        self._held = rest
        if text:
            yield Said(text)

    def _head(self) -> Iterator[Piece]:
        found = _HEAD.match(self._held)
        if found:
            self._held = self._held[found.end() :]
            self._state = self._arguments
            self._count += 1
            yield Called(self._count - 1, f"call_{secrets.token_hex(12)}", found[1])

    def _arguments(self) -> Iterator[Piece]:
        text, found, rest = self._held.partition(grammar.CLOSE)
        if found:
            self._state = self._text
        else:
            keep = overlap(text, grammar.CLOSE)
            text, rest = text[: len(text) - keep], text[len(text) - keep :]
        self._held = rest
        if text:
            yield Argued(self._count - 1, text)


@dataclass(slots=True)
class Call:
    """One call of an answer, as far as it has come."""

    id: str
    name: str
    arguments: str = ""


class Answer:
    """One choice, as it comes: its text and its calls. ``calls``: whether tags in its text are calls."""

    def __init__(self, *, calls: bool) -> None:
        self._parser = Calls() if calls else None
        self.text = ""
        self.calls: list[Call] = []

    def push(self, event: Token | GenerationEnded) -> list[Piece]:
        """What an event adds."""
        text = event.text
        if self._parser is None:
            pieces: list[Piece] = [Said(text)] if text else []
        else:
            pieces = self._parser.push(text)
            if isinstance(event, GenerationEnded):
                pieces += self._parser.flush()
        for piece in pieces:
            match piece:
                case Said(said):
                    self.text += said
                case Called(_, id_, name):
                    self.calls.append(Call(id_, name))
                case Argued(number, argued):
                    self.calls[number].arguments += argued
        return pieces

    def finish_reason(self, end: Token | GenerationEnded) -> FinishReason:
        """Of a choice that has ended; the other reasons are errors and do not come here."""
        reason = finish_reason(end)
        return "tool_calls" if self.calls and reason == "stop" else reason
