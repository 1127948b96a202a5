"""Chats and documents as token arrays, with the tokens that are learnt from marked.

Of a chat these are the assistant's, the one that ends an answer among them; of a document all. A chat longer than
``seq`` loses its end; a document is cut into windows of ``seq`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headwater.errors import DataError
from headwater_recipes.text.chats import Chat, Item
from headwater_recipes.text.corpus import Document


class Example(NamedTuple):
    """``ids`` (T,) int32; ``learnt`` (T,) bool; ``nbytes``: UTF-8 bytes of the text that is learnt from."""

    ids: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]
    nbytes: int


@dataclass(frozen=True)
class Examples:
    """N examples, one after the other: ``ids``, ``learnt``; ``ends`` (N,) int64 is where each one ends; ``nbytes``
    (N,) int64. All may be mapped files.
    """

    ids: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:
        start = int(self.ends[index - 1]) if index else 0
        end = int(self.ends[index])
        return Example(self.ids[start:end], self.learnt[start:end], int(self.nbytes[index]))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each."""
        return np.diff(self.ends, prepend=0)


class Encoded(NamedTuple):
    """``cut``: chats that lost their end; ``dropped``: those whose answers all lay there."""

    examples: Examples
    cut: int
    dropped: int


def encode(tokenizer: Any, items: Sequence[Item], seq: int) -> Encoded:
    """Examples of at most ``seq`` tokens.

    Raises:
        DataError: the tokenizer has no chat template, or its template refuses a chat.
    """
    if any(isinstance(item, Chat) for item in items) and not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template, so it was not made for chats. Nothing was started; choose "
            "another --model (an instruct one), or give --data plain text."
        )
    found: list[Example] = []
    cut = dropped = 0
    for item in items:
        if isinstance(item, Document):
            found += windows(tokenizer, item.text, seq)
            continue
        example = of_chat(tokenizer, item)
        cut += len(example.ids) > seq
        if example.learnt[1:seq].any():
            found.append(Example(example.ids[:seq], example.learnt[:seq], example.nbytes))
        else:
            dropped += 1
    return Encoded(_join(found), cut, dropped)


def of_chat(tokenizer: Any, chat: Chat) -> Example:
    """The chat as the model's template writes it.

    Raises:
        DataError: the template refuses the chat, or does not add messages one after the other.
    """
    text = render(tokenizer, chat)
    spans = list(_answers(tokenizer, chat, text))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    learnt = np.zeros(len(starts), np.bool_)
    for start, end in spans:
        learnt |= (starts >= start) & (starts < end)
    nbytes = sum(len(text[start:end].encode()) for start, end in spans)
    return Example(np.array(encoded["input_ids"], np.int32), learnt, nbytes)


def _answers(tokenizer: Any, chat: Chat, text: str) -> Iterator[tuple[int, int]]:
    """Where in the chat's text each answer stands, with the mark that ends it."""
    for index, message in enumerate(chat.messages):
        if message.role != "assistant" or index == 0:
            continue
        before = render(tokenizer, Chat(chat.messages[:index], chat.place), ask=True)
        after = render(tokenizer, Chat(chat.messages[: index + 1], chat.place))
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            raise DataError(
                f"{chat.place}: the model's chat template rewrites what came before an answer, so it is not known what "
                f"the answer is. Nothing was started; give chats of one question and one answer, or another --model."
            )
        yield len(before), len(after.rstrip())


def render(tokenizer: Any, chat: Chat, ask: bool = False) -> str:
    """The chat as text; ``ask`` adds the beginning of an answer.

    Raises:
        DataError: the template refuses it.
    """
    from jinja2 import TemplateError

    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise DataError(
            f"{chat.place}: the model's chat template refuses the chat: {error}. Nothing was started; mend the chat."
        ) from error


def windows(tokenizer: Any, text: str, seq: int) -> Iterator[Example]:
    """The text in pieces of ``seq`` tokens; the last is shorter."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = np.array(encoded["input_ids"], np.int32), encoded["offset_mapping"]
    for start in range(0, len(ids) - 1, seq):
        piece = ids[start : start + seq]
        if len(piece) > 1:
            learnt = text[places[start + 1][0] : places[start + len(piece) - 1][1]]
            yield Example(piece, np.ones(len(piece), np.bool_), len(learnt.encode()))


def _join(found: Sequence[Example]) -> Examples:
    return Examples(
        np.concatenate([example.ids for example in found] or [np.zeros(0, np.int32)]),
        np.concatenate([example.learnt for example in found] or [np.zeros(0, np.bool_)]),
        np.cumsum([len(example.ids) for example in found], dtype=np.int64),
        np.array([example.nbytes for example in found], np.int64),
    )


_FIELDS = ("ids", "learnt", "ends", "nbytes")


def save(folder: Path, name: str, examples: Examples) -> None:
    """Into ``tokens/`` of the run folder."""
    (folder / "tokens").mkdir(exist_ok=True)
    for field in _FIELDS:
        np.save(folder / "tokens" / f"{name}-{field}.npy", getattr(examples, field))


def load(folder: Path, name: str) -> Examples:
    """Map the arrays of a run folder; the pages are shared by all processes.

    Raises:
        DataError: an array is missing or damaged.
    """
    found = []
    for field in _FIELDS:
        path = folder / "tokens" / f"{name}-{field}.npy"
        try:
            found.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}. The run cannot go on without it; start a new one.") from error
    return Examples(*found)
