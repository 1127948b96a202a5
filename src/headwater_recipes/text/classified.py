"""Labelled texts as token arrays in the run folder, and as batches.

Legend: N texts, B of them in a batch, T tokens of the longest.
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
from headwater_recipes.text.labelled import Row


@dataclass(frozen=True)
class ClassifiedTexts:
    """N texts, one after the other: ``ids`` int32 and ``kinds`` int8 (1 in the second of a pair); ``ends`` (N,) int64
    is where each one ends; ``labels`` (N,) int64. All may be mapped files.
    """

    ids: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.int8]
    ends: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each."""
        return np.diff(self.ends, prepend=0)

    def batch(self, chosen: Sequence[int], padding: int) -> TextBatch:
        """Texts side by side, padded at the right."""
        lengths = self.lengths[chosen]
        shape = (len(chosen), int(lengths.max()))
        ids, kinds, mask = (np.full(shape, value, np.int64) for value in (padding, 0, 0))
        for row, (index, length) in enumerate(zip(chosen, lengths, strict=True)):
            end = int(self.ends[index])
            ids[row, :length] = self.ids[end - length : end]
            kinds[row, :length] = self.kinds[end - length : end]
            mask[row, :length] = 1
        labels = np.asarray(self.labels[chosen], np.int64)
        return TextBatch(*map(torch.from_numpy, (ids, kinds, mask, labels)))


class TextBatch(NamedTuple):
    """``ids_BT``, ``kinds_BT``, ``mask_BT`` and ``labels_B``, all int64."""

    ids_BT: torch.Tensor  # noqa: N815 - the shape is part of the name
    kinds_BT: torch.Tensor  # noqa: N815
    mask_BT: torch.Tensor  # noqa: N815
    labels_B: torch.Tensor  # noqa: N815


class Tokenized(NamedTuple):
    """``cut``: texts that lost their end; ``unknown``: the share of tokens that the vocabulary has no word for."""

    texts: ClassifiedTexts
    cut: int
    unknown: float


def encode(tokenizer: Any, rows: Sequence[Row], names: Sequence[str], seq: int) -> Tokenized:
    """At most ``seq`` tokens of each row; of a pair the second loses its end first."""
    paired = any(row.second for row in rows)
    given = ([row.text for row in rows], [row.second for row in rows]) if paired else ([row.text for row in rows],)
    found = tokenizer(*given, truncation=True, max_length=seq).encodings
    ids = np.concatenate([np.array(each.ids, np.int32) for each in found])
    kinds = np.concatenate([np.array(each.type_ids, np.int8) for each in found])
    place = {name: index for index, name in enumerate(names)}
    labels = np.array([place[row.label] for row in rows], np.int64)
    ends = np.cumsum([len(each.ids) for each in found], dtype=np.int64)
    unknown = tokenizer.unk_token_id
    share = 0.0 if unknown is None else float((ids == unknown).mean())
    return Tokenized(ClassifiedTexts(ids, kinds, ends, labels), sum(bool(each.overflowing) for each in found), share)


def save(folder: Path, name: str, texts: ClassifiedTexts) -> None:
    """Into ``tokens/`` of the run folder."""
    (folder / "tokens").mkdir(exist_ok=True)
    for field in fields(texts):
        np.save(folder / "tokens" / f"{name}-{field.name}.npy", getattr(texts, field.name))


def load(folder: Path, name: str) -> ClassifiedTexts:
    """Map the arrays of a run folder; the pages are shared by all processes.

    Raises:
        DataError: an array is missing or damaged.
    """
    found = []
    for field in fields(ClassifiedTexts):
        path = folder / "tokens" / f"{name}-{field.name}.npy"
        try:
            found.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}. The run cannot go on without it; start a new one.") from error
    return ClassifiedTexts(*found)
