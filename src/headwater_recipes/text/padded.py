"""From examples to batches: each epoch visits every example once, in a random order.

Batches are padded to their longest example, so examples of like length go together: the shuffled order is cut into
pools, each pool sorted by length and cut into rounds (what all workers take in one step), and the rounds shuffled.

Legend: B examples, T tokens of the longest, K positions whose logits are needed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from headwater.errors import DataError
from headwater_recipes.text.examples import Example, Examples

_POOL = 8
"""Rounds that a pool makes."""


class Padded(NamedTuple):
    """``ids_BT`` int64, padded at the right; ``mask_BT`` int64, 1 where there is a token; ``keep_K`` int64, positions
    from which something is learnt in some example; ``targets_BK`` int64, what comes after them, ``-100`` where nothing
    is learnt; ``nbytes``: UTF-8 bytes of the text that is learnt from.
    """

    ids_BT: torch.Tensor  # noqa: N815 - the shape is part of the name
    mask_BT: torch.Tensor  # noqa: N815
    keep_K: torch.Tensor  # noqa: N815
    targets_BK: torch.Tensor  # noqa: N815
    nbytes: int

    @property
    def learnt(self) -> int:
        """Number of tokens that are learnt from."""
        return int((self.targets_BK >= 0).sum())

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask_BT.sum())


class Order:
    """Which of N examples one rank learns from in a step. It depends on (seed, rank, world, step) only, so a run can go
    on anywhere.

    Args:
        lengths: (N,) tokens of each.
        size: B, examples that go through the model at once.
        count: batches of this rank in a step.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], size: int, count: int, rank: int, world: int, seed: int) -> None:
        self._lengths, self._size, self._count, self._rank, self._seed = lengths, size, count, rank, seed
        self._round = size * count * world
        self._rounds = max(1, len(lengths) // self._round)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        """(rounds, examples of a round); those left over have their turn in another epoch."""
        random = np.random.default_rng([self._seed, epoch])
        order = np.resize(random.permutation(len(self._lengths)), self._rounds * self._round)
        pool = _POOL * self._round
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part[:] = part[np.argsort(self._lengths[part], kind="stable")]
        rounds = order.reshape(self._rounds, self._round)
        return random.permutation(rounds, axis=0)

    def chosen(self, step: int) -> list[list[int]]:
        """The examples of this rank's batches in a step."""
        epoch, place = divmod(step, self._rounds)
        each = self._order(epoch)[place].reshape(self._count, -1, self._size)
        return [row[self._rank].tolist() for row in each]


class Batches:
    """What one rank trains on, in an ``Order``.

    Raises:
        DataError: no example.
    """

    def __init__(
        self, examples: Examples, size: int, count: int, rank: int, world: int, seed: int, padding: int
    ) -> None:
        if len(examples) == 0:
            raise DataError("no example to train on; nothing was started. Give more data, or a greater --seq")
        self._examples, self._padding = examples, padding
        self.order = Order(examples.lengths, size, count, rank, world, seed)

    def chosen(self, step: int) -> list[list[int]]:
        """The examples of this rank's batches in a step."""
        return self.order.chosen(step)

    def step(self, step: int) -> list[Padded]:
        """This rank's batches in a step."""
        return [collate([self._examples[i] for i in row], self._padding) for row in self.chosen(step)]


def collate(chosen: list[Example], padding: int) -> Padded:
    """Examples side by side."""
    width = max(len(example.ids) for example in chosen)
    ids, learnt, mask = (np.full((len(chosen), width), value) for value in (padding, False, 0))
    for row, example in enumerate(chosen):
        ids[row, : len(example.ids)] = example.ids
        learnt[row, : len(example.ids)] = example.learnt
        mask[row, : len(example.ids)] = 1
    keep = np.flatnonzero(learnt[:, 1:].any(axis=0))
    targets = np.where(learnt[:, 1:], ids[:, 1:], -100)[:, keep]
    nbytes = sum(example.nbytes for example in chosen)
    return Padded(_tensor(ids), _tensor(mask), _tensor(keep), _tensor(targets), nbytes)


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def nats(model: Any, batch: Padded, skips: bool) -> torch.Tensor:
    """The sum of the negative log likelihoods of what is learnt from, a scalar.

    ``skips``: the model can leave out logits (``logits_to_keep``); those of questions and padding cost most of a
    small model's time.
    """
    options = {"logits_to_keep": batch.keep_K} if skips else {}
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False, **options).logits
    logits_bkv = logits if skips else logits[:, batch.keep_K]
    return F.cross_entropy(
        logits_bkv.float().flatten(0, 1), batch.targets_BK.flatten(), ignore_index=-100, reduction="sum"
    )
