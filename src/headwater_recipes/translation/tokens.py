"""Pairs as token arrays in the run folder, and as batches.

Legend: N pairs, B of them in a batch, S tokens of the longest source, T of the longest target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headwater.errors import DataError
from headwater_recipes.translation.verses import Pair

IGNORED = -100
"""In ``targets_BT`` where there is no token."""


class PairBatch(NamedTuple):
    """int64: ``sources_BS`` padded at the right, ``mask_BS`` 1 where there is a token, ``targets_BT`` padded with
    ``IGNORED``.
    """

    sources_BS: torch.Tensor  # noqa: N815 - the shape is part of the name
    mask_BS: torch.Tensor  # noqa: N815
    targets_BT: torch.Tensor  # noqa: N815


@dataclass(frozen=True)
class TokenPairs:
    """N sources and N targets, each one after the other, int32; ``…_ends`` (N,) int64 is where each one ends. All may
    be mapped files.
    """

    sources: npt.NDArray[np.int32]
    source_ends: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]
    target_ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.source_ends)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of both sides."""
        return np.diff(self.source_ends, prepend=0) + np.diff(self.target_ends, prepend=0)

    def batch(self, chosen: Sequence[int], padding: int) -> PairBatch:
        """Pairs side by side."""
        sources = _side(self.sources, self.source_ends, chosen, padding)
        targets = _side(self.targets, self.target_ends, chosen, IGNORED)
        lengths = torch.from_numpy(np.diff(self.source_ends, prepend=0)[chosen])
        mask = (torch.arange(sources.shape[1]) < lengths[:, None]).long()
        return PairBatch(sources, mask, targets)


def _side(ids: npt.NDArray[np.int32], ends: npt.NDArray[np.int64], chosen: Sequence[int], padding: int) -> torch.Tensor:
    starts = [int(ends[index - 1]) if index else 0 for index in chosen]
    rows = [ids[start : int(ends[index])] for start, index in zip(starts, chosen, strict=True)]
    found = np.full((len(rows), max(map(len, rows))), padding, np.int64)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(found)


class EncodedPairs(NamedTuple):
    """``long``: pairs that were left out, as a text has too many tokens; ``unknown``: the share of tokens that the
    vocabulary has no word for.
    """

    pairs: TokenPairs
    long: int
    unknown: float


def encode(tokenizer: Any, pairs: Sequence[Pair], seq: int) -> EncodedPairs:
    """Pairs of at most ``seq`` tokens on either side: an end that is cut off would teach to stop early."""
    sources = tokenizer([pair.source for pair in pairs], verbose=False)["input_ids"]
    targets = tokenizer(text_target=[pair.target for pair in pairs], verbose=False)["input_ids"]
    kept = [(a, b) for a, b in zip(sources, targets, strict=True) if len(a) <= seq and len(b) <= seq]
    sides = []
    for side in (0, 1):
        rows = [pair[side] for pair in kept]
        sides.append(np.concatenate([np.zeros(0, np.int32), *(np.array(row, np.int32) for row in rows)]))
        sides.append(np.cumsum([len(row) for row in rows], dtype=np.int64))
    unknown = tokenizer.unk_token_id
    ids = np.concatenate([sides[0], sides[2]])
    share = float((ids == unknown).mean()) if unknown is not None and len(ids) else 0.0
    return EncodedPairs(TokenPairs(*sides), len(pairs) - len(kept), share)


def save(folder: Path, name: str, pairs: TokenPairs) -> None:
    """Into ``tokens/`` of the run folder."""
    (folder / "tokens").mkdir(exist_ok=True)
    for field in fields(pairs):
        np.save(folder / "tokens" / f"{name}-{field.name}.npy", getattr(pairs, field.name))


def load(folder: Path, name: str) -> TokenPairs:
    """Map the arrays of a run folder. Raises ``DataError``: one is missing or damaged."""
    found = []
    for field in fields(TokenPairs):
        path = folder / "tokens" / f"{name}-{field.name}.npy"
        try:
            found.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}. The run cannot go on without it; start a new one.") from error
    return TokenPairs(*found)
