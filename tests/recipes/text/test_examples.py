"""What the model sees, and what it learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from headwater.errors import DataError
from headwater_recipes.text import examples
from headwater_recipes.text.chats import Chat, Message
from headwater_recipes.text.corpus import Document
from headwater_recipes.text.examples import Example, Examples
from headwater_recipes.text.padded import Batches, collate, nats
from tests.recipes.finetuning import tokenizer, write_model


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


def _chat(*contents: str) -> Chat:
    roles = ("user", "assistant") * len(contents)
    return Chat(tuple(Message(role, content) for role, content in zip(roles, contents, strict=False)), "here:1")


def test_of_a_chat_the_answers_are_learnt_and_the_marks_that_end_them(words: Any) -> None:
    found = examples.of_chat(words, _chat("Which? é", "It is red. é", "And?", "Blue"))
    assert words.decode(found.ids[found.learnt]) == "It is red. é<|im_end|>Blue<|im_end|>"
    assert words.decode(found.ids).startswith("<|im_start|>user\nWhich? é<|im_end|>\n<|im_start|>assistant\nIt is red.")
    assert found.nbytes == len("It is red. é<|im_end|>Blue<|im_end|>".encode())


def test_an_answer_that_stands_in_the_question_is_learnt_once(words: Any) -> None:
    found = examples.of_chat(words, _chat("red<|im_end|>\n<|im_start|>assistant\nred", "red"))
    assert words.decode(found.ids[found.learnt]) == "red<|im_end|>"


def test_long_chats_lose_their_end_and_questions_alone_are_left_out(words: Any) -> None:
    short, long, question = _chat("a", "b"), _chat("a", "b " * 100), _chat("a " * 100, "b")
    encoded = examples.encode(words, [short, long, question], 32)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (2, 2, 1)
    assert [len(encoded.examples[i].ids) for i in range(2)] == [len(examples.of_chat(words, short).ids), 32]
    assert encoded.examples.lengths.tolist()[1] == 32


def test_templates_that_cannot_be_used_are_refused(words: Any) -> None:
    other = tokenizer()
    other.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match=r"here:1: .*refuses the chat: no such role"):
        examples.encode(other, [_chat("a", "b")], 32)
    other.chat_template = "{{ messages | length }}" + words.chat_template
    with pytest.raises(DataError, match=r"here:1: .*rewrites what came before"):
        examples.encode(other, [_chat("a", "b")], 32)
    other.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        examples.encode(other, [_chat("a", "b")], 32)
    assert len(examples.encode(other, [Document("x", "some words")], 32).examples) == 1


def test_text_is_cut_into_windows_and_all_of_it_is_learnt(words: Any) -> None:
    text = "Which colour has thing 3? It is blue. " * 9
    found = examples.encode(words, [Document("x", text)], 16).examples
    assert words.decode(found.ids) == text
    assert found.learnt.all()
    assert set(found.lengths[:-1].tolist()) == {16}


def test_examples_come_back_from_the_disk(words: Any, tmp_path: Path) -> None:
    made = examples.encode(words, [_chat(f"{i}", "x " * i) for i in range(1, 9)], 32).examples
    examples.save(tmp_path, "training", made)
    found = examples.load(tmp_path, "training")
    for i in range(8):
        assert np.array_equal(found[i].ids, made[i].ids)
        assert np.array_equal(found[i].learnt, made[i].learnt)
    (tmp_path / "tokens" / "training-ends.npy").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"training-ends\.npy"):
        examples.load(tmp_path, "training")


def _examples(count: int) -> Examples:
    lengths = np.random.default_rng(0).integers(2, 30, count)
    total = int(lengths.sum())
    return Examples(
        np.arange(total, dtype=np.int32), np.ones(total, np.bool_), np.cumsum(lengths), np.ones(count, np.int64)
    )


@pytest.mark.parametrize(("count", "world", "accumulate"), [(96, 1, 1), (97, 2, 3), (5, 2, 2), (1, 1, 1)])
def test_an_epoch_visits_every_example_once_over_all_workers(count: int, world: int, accumulate: int) -> None:
    made = [Batches(_examples(count), 4, accumulate, rank, world, seed=3, padding=0) for rank in range(world)]
    steps = max(1, count // (4 * accumulate * world))
    for epoch in range(2):
        seen = [
            i
            for step in range(epoch * steps, (epoch + 1) * steps)
            for each in made
            for row in each.chosen(step)
            for i in row
        ]
        if count >= 4 * accumulate * world:
            assert len(set(seen)) == len(seen) > count - 4 * accumulate * world
        else:
            assert set(seen) == set(range(count))
    again = Batches(_examples(count), 4, accumulate, 0, world, seed=3, padding=0)
    assert again.chosen(steps + 1) == made[0].chosen(steps + 1)


def test_epochs_differ_and_batches_are_of_like_length() -> None:
    many = _examples(512)
    made = Batches(many, 8, 1, 0, 1, seed=0, padding=0)
    assert made.chosen(0) != made.chosen(64)
    padding = sum(b.ids_BT.numel() - b.tokens for step in range(64) for b in made.step(step))
    assert padding < 0.12 * many.lengths.sum()
    with pytest.raises(DataError, match="no example"):
        Batches(Examples(*(np.zeros(0, np.int64) for _ in range(4))), 8, 1, 0, 1, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("skips", [True, False])
def test_the_loss_is_that_of_each_example_alone(tmp_path: Path, skips: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    random = np.random.default_rng(0)
    chosen = []
    for length in (5, 9, 7):
        learnt = random.random(length) < 0.5
        learnt[-1] = True
        chosen.append(Example(random.integers(3, 200, length).astype(np.int32), learnt, 1))
    expected = 0.0
    with torch.no_grad():
        for example in chosen:
            ids = torch.from_numpy(example.ids.astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0]
            each = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            expected += each[torch.from_numpy(example.learnt[1:])].sum().item()
        batch = collate(chosen, padding=0)
        assert nats(model, batch, skips=skips).item() == pytest.approx(expected, rel=1e-5)
        last = chosen[1]._replace(learnt=np.arange(9) == 8)
        ids = torch.from_numpy(last.ids.astype(np.int64))
        expected = F.cross_entropy(model(input_ids=ids[None]).logits[0, -2], ids[-1]).item()
        assert nats(model, collate([last], 0), skips=skips).item() == pytest.approx(expected, rel=1e-5)
    assert batch.learnt == sum(int(example.learnt[1:].sum()) for example in chosen)
    assert batch.tokens == 21
    assert batch.nbytes == 3
