"""Answers as spans: tokens in overlapping windows, what is learnt of them, and the best span of a passage.

Legend: N windows, B of them in a batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from headwater_recipes.qa.questions import Question
from headwater_recipes.text.classified import ClassifiedTexts, TextBatch

LONGEST = 30
"""Tokens of an answer at most, as SQuAD's first programs had it."""
_TOGETHER = 32


class Best(NamedTuple):
    """Characters ``start`` to ``end`` of the passage; ``score``: the product of both ends' probabilities. ``nothing``:
    that of there being no answer.
    """

    start: int
    end: int
    score: float
    nothing: float


def windows(tokenizer: Any, questions: Sequence[str], passages: Sequence[str], seq: int) -> Any:
    """What the tokenizer makes of each pair: windows of ``seq`` tokens that overlap by a quarter. Of a question the
    first ``seq`` / 2 tokens count.
    """
    cut = [_shortened(tokenizer, question, seq // 2) for question in questions]
    return tokenizer(
        cut, list(passages), truncation="only_second", max_length=seq, stride=seq // 4,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip


def _shortened(tokenizer: Any, question: str, most: int) -> str:
    found = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(found) <= most else question[: found[most - 1][1]]


def encode(tokenizer: Any, asked: Sequence[Question], seq: int) -> ClassifiedTexts:
    """Windows with ``labels`` (N, 2): the first and the last token of the answer; both 0, where the window lacks it."""
    found = windows(tokenizer, [each.question for each in asked], [each.passage for each in asked], seq)
    ids, kinds, labels = [], [], []
    for number, row in enumerate(found["overflow_to_sample_mapping"]):
        encoding = found.encodings[number]
        ids.append(np.array(encoding.ids, np.int32))
        kinds.append(np.array(encoding.type_ids, np.int8))
        labels.append(_ends(encoding, asked[row].start, asked[row].end))
    ends = np.cumsum([len(each) for each in ids], dtype=np.int64)
    return ClassifiedTexts(np.concatenate(ids), np.concatenate(kinds), ends, np.array(labels, np.int64))


def _ends(encoding: Any, start: int, end: int) -> tuple[int, int]:
    places = [at for at, side in enumerate(encoding.sequence_ids) if side == 1]
    inside = [at for at in places if encoding.offsets[at][1] > start and encoding.offsets[at][0] < end]
    whole = start >= 0 and places and encoding.offsets[places[0]][0] <= start and encoding.offsets[places[-1]][1] >= end
    return (inside[0], inside[-1]) if whole and inside else (0, 0)


def logits(model: Any, batch: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) of where the answer begins and of where it ends, in float32; of padding -∞."""
    kinds = {"token_type_ids": batch.kinds_BT} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
    found = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **kinds)
    outside = batch.mask_BT == 0
    return tuple(each.float().masked_fill(outside, -torch.inf) for each in (found.start_logits, found.end_logits))


def loss(model: Any, batch: TextBatch) -> torch.Tensor:
    """The sum over windows of the mean of both ends' cross-entropies, as in BERT (Devlin and others 2019)."""
    start, end = logits(model, batch)
    ends = batch.labels_B
    return (F.cross_entropy(start, ends[:, 0], reduction="sum") + F.cross_entropy(end, ends[:, 1], reduction="sum")) / 2


def right(model: Any, batch: TextBatch) -> tuple[float, int]:
    """The loss, and in how many windows both ends are told right, each by itself."""
    found, ends = logits(model, batch), batch.labels_B
    nats = sum(F.cross_entropy(each, ends[:, at], reduction="sum") for at, each in enumerate(found)) / 2
    told = torch.stack([each.argmax(1) for each in found], 1)
    return float(nats), int((told == ends).all(1).sum())


def best(model: Any, tokenizer: Any, questions: Sequence[str], passages: Sequence[str], seq: int) -> list[Best]:
    """Of each passage the likeliest span over all its windows, of at most ``LONGEST`` tokens.

    Raises ``ValueError``: the model's logits are not numbers.
    """
    found = windows(tokenizer, questions, passages, seq)
    rows = found["overflow_to_sample_mapping"]
    order = sorted(range(len(rows)), key=lambda number: len(found.encodings[number].ids))
    told = [Best(0, 0, -1.0, 1.0)] * len(passages)
    for first in range(0, len(order), _TOGETHER):
        chosen = order[first : first + _TOGETHER]
        encodings = [found.encodings[number] for number in chosen]
        starts, ends = (each.softmax(1).numpy() for each in logits(model, _batch(encodings, tokenizer.pad_token_id)))
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
            raise ValueError("the model's logits are not finite: its training has diverged")
        for number, encoding, start, end in zip(chosen, encodings, starts, ends, strict=True):
            here, before = _likeliest(encoding, start, end), told[rows[number]]
            better = here if here.score > before.score else before
            told[rows[number]] = better._replace(nothing=min(here.nothing, before.nothing))
    return told


def _batch(encodings: Sequence[Any], padding: int) -> TextBatch:
    width = max(len(each.ids) for each in encodings)
    ids, kinds, mask = (np.full((len(encodings), width), value, np.int64) for value in (padding, 0, 0))
    for row, each in enumerate(encodings):
        ids[row, : len(each.ids)], kinds[row, : len(each.ids)], mask[row, : len(each.ids)] = each.ids, each.type_ids, 1
    labels = np.zeros((len(encodings), 2), np.int64)
    return TextBatch(*map(torch.from_numpy, (ids, kinds, mask, labels)))


def _likeliest(encoding: Any, start: npt.NDArray[np.float32], end: npt.NDArray[np.float32]) -> Best:
    places = np.array([at for at, side in enumerate(encoding.sequence_ids) if side == 1])
    if not len(places):  # the question takes all
        return Best(0, 0, 0.0, 1.0)
    both = np.triu(np.outer(start[places], end[places]))
    both -= np.triu(both, LONGEST)
    first, last = np.unravel_index(int(both.argmax()), both.shape)
    offsets = encoding.offsets
    score = float(both[first, last])
    return Best(offsets[places[first]][0], offsets[places[last]][1], score, float(start[0] * end[0]))
