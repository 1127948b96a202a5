"""How good a causal model is on a held-out stream of tokens, beside a model without context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from headwater_recipes.common.task import Batch
from headwater_recipes.text.score import Score
from headwater_recipes.text.tokenizer import Arrays
from headwater_recipes.text.windows import cut

_ROWS = 16


def starts(arrays: Arrays, length: int, most: int | None = None) -> list[int]:
    """Windows side by side over the validation text; ``most`` of them, spread evenly."""
    count = max(1, (len(arrays.validation) - 1) // length)
    chosen = range(count) if most is None or most >= count else [i * count // most for i in range(most)]
    return [index * length for index in chosen]


def fits(arrays: Arrays, length: int) -> int:
    """The window's length for this validation text: shorter if the text is."""
    return min(length, len(arrays.validation) - 1)


def batches(arrays: Arrays, places: Sequence[int], length: int) -> Iterator[Batch]:
    """The windows at ``places``; context does not reach over a window's start."""
    for first in range(0, len(places), _ROWS):
        yield batch(*cut(arrays.validation, list(places[first : first + _ROWS]), length))


def batch(inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> Batch:
    """Every token is learnt from."""
    return Batch((inputs_bt, targets_bt), targets_bt.numel(), inputs_bt.numel())


def nats(model: Any, batch: Batch) -> torch.Tensor:
    """The sum of the targets' negative log likelihoods, a scalar."""
    inputs_bt, targets_bt = batch.inputs
    logits_btv = model(input_ids=inputs_bt, use_cache=False).logits
    return F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten(), reduction="sum")


def nbytes(arrays: Arrays, batch: Batch) -> int:
    """UTF-8 bytes that the targets stand for."""
    return int(arrays.lengths[batch.inputs[1].numpy()].sum())


def unigram(arrays: Arrays, places: Sequence[int], length: int) -> Score:
    """The baseline on the same windows: each token's frequency in the training text, one added to every count."""
    counts = np.bincount(arrays.training, minlength=len(arrays.lengths)) + 1.0
    nats_v = np.log(counts.sum()) - np.log(counts)
    targets = np.concatenate([arrays.validation[place + 1 : place + length + 1] for place in places])
    return Score(float(nats_v[targets].sum()), len(targets), int(arrays.lengths[targets].sum()))
