"""What is trained: an encoder-decoder, on pairs of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from headwater import pretrained
from headwater_recipes.common.task import Batch, Ended, Sums, Task
from headwater_recipes.text.padded import Order
from headwater_recipes.translation import data, model, report, tokens
from headwater_recipes.translation.settings import RECIPE, TranslationSettings
from headwater_recipes.translation.tokens import IGNORED, PairBatch

PERIODIC = 256
"""Pairs of a periodic validation."""
_ROWS = 32


class Translation(Task[TranslationSettings]):
    """A run folder holds the model with its first values, its tokenizer, and the pairs as tokens.

    On the way it is validated on pairs of their own; at the end on those that nothing was chosen by.
    """

    recipe = RECIPE

    def __init__(self, settings: TranslationSettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        pretrained.quiet()
        self.training, self.validation, self.aside = (
            tokens.load(folder, part) for part in ("training", "validation", "held_out")
        )
        self.padding = 0
        self.order = Order(self.training.lengths, settings.batch, 1, rank, world, settings.seed)

    @classmethod
    def prepare(cls, settings: TranslationSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    def batches(self, step: int) -> Sequence[Batch]:
        # What dropout leaves out in the pass that follows hangs on the step too, not on what was drawn before.
        seed = np.random.SeedSequence([self.settings.seed, step, self.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed >> 1))
        return [_batch(self.training.batch(chosen, self.padding)) for chosen in self.order.chosen(step)]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        pairs, count = (self.aside, len(self.aside)) if whole else (self.validation, PERIODIC)
        by_length = np.argsort(pairs.lengths[:count], kind="stable")[self.rank :: self.world].tolist()
        for first in range(0, len(by_length), _ROWS):
            yield _batch(pairs.batch(by_length[first : first + _ROWS], self.padding))

    def build(self) -> torch.nn.Module:
        return self.read(self.folder)

    def read(self, folder: Path) -> torch.nn.Module:
        found = model.read(folder)
        self.padding = int(found.config.pad_token_id)
        return found  # type: ignore[no-any-return]

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return _nats(logits(model, batch.inputs), batch.inputs, self.settings.smoothing)

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        found, targets = logits(model, batch.inputs), batch.inputs.targets_BT
        right = int((found.argmax(-1) == targets).sum())
        return {"loss": _nats(found, batch.inputs).item(), "count": batch.learnt, "right": right}

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        count = max(1, sums["count"])
        return {"loss": sums["loss"] / count, "token_accuracy": sums["right"] / count}

    def verify(self, model: torch.nn.Module) -> float:
        batch = self.aside.batch(range(min(_ROWS, len(self.aside))), self.padding)
        model.eval()
        with torch.no_grad():
            ours, theirs = (logits(each, batch) for each in (model, self.read(self.folder).eval()))
        return float((ours - theirs).abs().max())

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.figures(self, ended)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, figures, console)


def _batch(pairs: PairBatch) -> Batch:
    learnt = int((pairs.targets_BT != IGNORED).sum())
    return Batch(pairs, learnt, learnt + int(pairs.mask_BS.sum()))


def logits(model: Any, pairs: PairBatch) -> torch.Tensor:
    """(B, T, vocabulary) float32: of each token of the targets, given those before it and the source."""
    found: torch.Tensor = model(
        input_ids=pairs.sources_BS,
        attention_mask=pairs.mask_BS,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(pairs.targets_BT),
        use_cache=False,
    ).logits
    return found.float()


def _nats(logits_btv: torch.Tensor, pairs: PairBatch, smoothing: float = 0.0) -> torch.Tensor:
    """The sum over the targets' tokens of the cross-entropy; with label smoothing (Szegedy and others 2016,
    https://arxiv.org/abs/1512.00567, section 7).
    """
    return F.cross_entropy(
        logits_btv.flatten(0, 1), pairs.targets_BT.flatten(), ignore_index=IGNORED, label_smoothing=smoothing,
        reduction="sum",
    )  # fmt: skip
