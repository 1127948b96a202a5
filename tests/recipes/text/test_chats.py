from __future__ import annotations

import random
from pathlib import Path

import pytest

from headwater.errors import DataError
from headwater_recipes.finetune import docstrings
from headwater_recipes.text import chats
from headwater_recipes.text.chats import Chat, Message
from headwater_recipes.text.corpus import Document
from tests.recipes.conftest import write_corpus
from tests.recipes.finetuning import write_chats


def _chat(i: int) -> Chat:
    return Chat((Message("user", f"{i}?"), Message("assistant", f"{i}!")), f"file:{i}")


def test_both_kinds_of_lines_are_chats(tmp_path: Path) -> None:
    found = chats.from_paths([write_chats(tmp_path / "chats.jsonl")])
    everything = [*found.training, *found.held_out]
    assert len(everything) == 60
    assert 1 <= len(found.held_out) <= 10
    assert all(isinstance(chat, Chat) and chat.answer.startswith("It is") for chat in everything)
    assert all(isinstance(chat, Chat) and [m.role for m in chat.question] == ["user"] for chat in everything)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no chat"),
        ("[1]", "no chat"),
        ('{"prompt": "x"}', "no chat"),
        ('{"prompt": "x", "response": 3}', "no chat"),
        ('{"messages": [{"role": "user"}]}', "no chat"),
        ('{"messages": "hello"}', "no chat"),
        ('{"messages": []}', "no answer"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no answer"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no answer"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"chats\.jsonl:3: .*{says}.*Nothing was started"):
        chats.from_paths([path])


def test_one_chat_is_too_few(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match="two different ones"):
        chats.from_paths([path])
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="the file is empty"):
        chats.from_paths([path])
    with pytest.raises(DataError, match="no such file"):
        chats.from_paths([tmp_path / "none.jsonl"])


@pytest.mark.parametrize("count", [2, 3, 50, 500])
def test_what_is_held_out_hangs_on_the_chats_and_not_on_their_order(count: int) -> None:
    made = [_chat(i) for i in range(count)]
    training, held = chats.split(made)
    assert training
    assert held
    assert len(training) + len(held) == count
    random.Random(1).shuffle(made)
    assert set(chats.split(made)[1]) == set(held)


def test_plain_text_is_documents(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus")
    found = chats.from_paths([folder / "text0.txt", write_chats(tmp_path / "chats.jsonl")])
    assert sum(isinstance(item, Document) for item in found.training) == 1
    assert sum(isinstance(item, Document) for item in found.held_out) == 1
    assert found.source == "text0.txt, chats.jsonl"


def test_the_docstrings_are_the_same_each_time() -> None:
    first, second = docstrings.standard_library(), docstrings.standard_library()
    assert first == second
    places = [item.place for item in (*first.training, *first.held_out) if isinstance(item, Chat)]
    assert len(places) == len(set(places)) > 2000
    assert {"json.dumps", "os.path.join", "len", "math.sqrt"} <= set(places)
    assert not [place for place in places if any(part.startswith("_") for part in place.split("."))]
    assert not {item.answer for item in first.training} & {item.answer for item in first.held_out}  # type: ignore[union-attr]
    answers = {item.place: item.answer for item in (*first.training, *first.held_out) if isinstance(item, Chat)}
    assert answers["json.dumps"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert max(map(len, answers.values())) <= docstrings.LONGEST


def test_a_docstring_is_cleaned_and_cut_at_a_sentence() -> None:
    assert docstrings.clean("  First\n    line.\n\n    More.") == "First line."
    long = "A sentence of some words. " * 30
    assert docstrings.clean(long).endswith("words.")
    assert docstrings.LONGEST - 30 < len(docstrings.clean(long)) <= docstrings.LONGEST
    assert len(docstrings.clean("word " * 200)) <= docstrings.LONGEST
    assert len(docstrings.clean("x" * 1000)) <= docstrings.LONGEST
