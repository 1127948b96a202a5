"""How good a model is on the held-out text, beside a model without context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from headwater_recipes.common.score import Score, total
from headwater_recipes.lm.tokenizer import Arrays
from headwater_recipes.lm.windows import cut

_ROWS = 16


def starts(arrays: Arrays, length: int, most: int | None = None) -> list[int]:
    """Windows side by side over the validation text; ``most`` of them, spread evenly."""
    count = max(1, (len(arrays.validation) - 1) // length)
    chosen = range(count) if most is None or most >= count else [i * count // most for i in range(most)]
    return [index * length for index in chosen]


def fits(arrays: Arrays, length: int) -> int:
    """The window's length for this validation text: shorter if the text is."""
    return min(length, len(arrays.validation) - 1)


@torch.no_grad()
def score(model: Any, arrays: Arrays, places: Sequence[int], length: int, bfloat16: bool = False) -> Score:
    """The model's score on the windows at ``places``; context does not reach over a window's start."""
    parts = []
    for first in range(0, len(places), _ROWS):
        inputs_bt, targets_bt = cut(arrays.validation, list(places[first : first + _ROWS]), length)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits_btv = model(input_ids=inputs_bt, use_cache=False).logits
        nats = F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten(), reduction="sum").item()
        parts.append(Score(nats, targets_bt.numel(), int(arrays.lengths[targets_bt.numpy()].sum())))
    return total(parts)


def unigram(arrays: Arrays, places: Sequence[int], length: int) -> Score:
    """The baseline on the same windows: each token's frequency in the training text, one added to every count."""
    counts = np.bincount(arrays.training, minlength=len(arrays.lengths)) + 1.0
    nats_v = np.log(counts.sum()) - np.log(counts)
    targets = np.concatenate([arrays.validation[place + 1 : place + length + 1] for place in places])
    return Score(float(nats_v[targets].sum()), len(targets), int(arrays.lengths[targets].sum()))
