"""From a stream of tokens to batches: each epoch visits every window once, in a random order.

Legend: B batch, T tokens of a window.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from headwater.errors import DataError
from headwater_recipes.text.tokenizer import Tokens


class Windows:
    """The batches of one rank. A step's batch depends on (seed, rank, world, step) only, so a run can go on anywhere.

    Args:
        tokens: the training stream.
        length: T, tokens that a window predicts.
        batch: B, windows per step and rank.

    Raises:
        DataError: fewer than 2 T tokens.
    """

    def __init__(self, tokens: Tokens, length: int, batch: int, rank: int, world: int, seed: int) -> None:
        self._tokens, self._length, self._batch = tokens, length, batch
        self._rank, self._world, self._seed = rank, world, seed
        self._count = len(tokens) // length - 1  # one less, as an epoch starts up to T tokens late
        if self._count < 1:
            raise DataError(
                f"the training text has {len(tokens)} tokens, too few for windows of {length}; give more text or a "
                f"shorter --seq"
            )
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Where the epoch's windows start to be counted (so that they are cut elsewhere each time), their order."""
        random = np.random.default_rng([self._seed, epoch])
        return int(random.integers(self._length)), random.permutation(self._count)

    def starts(self, step: int) -> list[int]:
        """Where the windows of this rank's batch start in the stream."""
        first = (step * self._world + self._rank) * self._batch
        found = []
        for index in range(first, first + self._batch):
            epoch, place = divmod(index, self._count)
            phase, order = self._order(epoch)
            found.append(phase + int(order[place]) * self._length)
        return found

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(inputs_BT, targets_BT)``, int64: the targets are the inputs' successors."""
        return cut(self._tokens, self.starts(step), self._length)


def cut(tokens: Tokens, starts: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(inputs_BT, targets_BT)`` of the windows that start there."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
