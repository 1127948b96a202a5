"""Files to chats and documents, and which of them are held out.

A ``.jsonl`` file holds one chat a line, ``{"messages": [{"role": …, "content": …}, …]}`` or ``{"prompt": …,
"response": …}``; any other file is plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headwater.errors import DataError
from headwater_recipes.text import corpus

HELD_OUT = 20
"""One chat in this many is held out; of text, see ``text.corpus``."""


class Message(msgspec.Struct, frozen=True):
    """``role`` is system, user or assistant, or what else the model's template knows."""

    role: str
    content: str


class Chat(msgspec.Struct, frozen=True):
    """``place``: where it stands, for messages of error."""

    messages: tuple[Message, ...]
    place: str = ""

    @property
    def question(self) -> tuple[Message, ...]:
        """All before the first answer."""
        answer = next(i for i, message in enumerate(self.messages) if message.role == "assistant")
        return self.messages[:answer]

    @property
    def answer(self) -> str:
        return self.messages[len(self.question)].content


Item = Chat | corpus.Document


@dataclass(frozen=True)
class Corpus:
    """What to train on and what is held out; ``source`` says in words where it is from."""

    training: tuple[Item, ...]
    held_out: tuple[Item, ...]
    source: str


def from_paths(paths: Sequence[Path]) -> Corpus:
    """All chats and documents of some files.

    Raises:
        DataError: a file that is missing, empty or no text; a line that is no chat, by file and number; too little.
    """
    chats = [chat for path in paths if path.suffix == ".jsonl" for chat in _chats(path)]
    texts = [path for path in paths if path.suffix != ".jsonl"]
    training, held = split(chats) if chats else ([], [])
    documents = corpus.from_paths(texts) if texts else corpus.Corpus((), ())
    return Corpus(
        (*training, *documents.training), (*held, *documents.validation), ", ".join(path.name for path in paths)
    )


def split(chats: Sequence[Chat]) -> tuple[list[Chat], list[Chat]]:
    """Which chats to train on and which are held out: by their content, so that the order of a file does not matter.

    Raises:
        DataError: fewer than two different chats.
    """
    marks = {_mark(chat): chat for chat in chats}
    if len(marks) < 2:
        raise DataError(
            f"{chats[0].place}: {len(marks)} chat; two different ones or more are needed, as one is held out. Nothing "
            f"was started; give --data more."
        )
    held = set(sorted(marks)[: max(1, len(marks) // HELD_OUT)])
    return [c for m, c in marks.items() if m not in held], [c for m, c in marks.items() if m in held]


def _mark(chat: Chat) -> int:
    # Not hash(): that differs from process to process.
    text = msgspec.json.encode(chat.messages)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _chats(path: Path) -> list[Chat]:
    text = corpus.read_named(path)
    return [_chat(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _chat(line: str, place: str) -> Chat:
    try:
        found: Any = msgspec.json.decode(line)
        if isinstance(found, dict) and "messages" in found:
            messages = msgspec.convert(found["messages"], tuple[Message, ...])
        else:
            pair = msgspec.convert(found, dict[str, Any])
            prompt, response = (msgspec.convert(pair.get(name), str) for name in ("prompt", "response"))
            messages = (Message("user", prompt), Message("assistant", response))
    except msgspec.MsgspecError as error:
        raise DataError(
            f'{place}: no chat ({error}). A line is {{"messages": [{{"role": …, "content": …}}, …]}} or '
            f'{{"prompt": …, "response": …}}. Nothing was started; mend the line.'
        ) from error
    if not any(message.role == "assistant" for message in messages[1:]):
        raise DataError(
            f"{place}: the chat has no answer (a message with the role assistant, not the first), so there is nothing "
            f"to learn from it. Nothing was started; mend the line."
        )
    return Chat(messages, place)
