"""A task whose output is one of several classes of a text: what recipes of such tasks share.

Metrics are those of scikit-learn, from counts: a validation is done by several ranks, whose counts add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from headwater import pretrained
from headwater_recipes.common.task import Batch, Sums, Task
from headwater_recipes.text import classified, encoder
from headwater_recipes.text.classified import ClassifiedTexts, TextBatch
from headwater_recipes.text.padded import Order
from headwater_recipes.text.settings import ClassifyingTraining

AnyClassifying = TypeVar("AnyClassifying", bound=ClassifyingTraining)

PERIODIC = 256
"""Held-out texts of a periodic validation; the final one takes all."""
_ROWS = 32


class Classifying(Task[AnyClassifying]):
    """A run folder holds the model with its first values, its tokenizer, and the texts as tokens."""

    def __init__(self, settings: AnyClassifying, folder: Path, rank: int = 0, world: int = 1) -> None:
        super().__init__(settings, folder, rank, world)
        pretrained.quiet()
        self.texts = classified.load(folder, "training")
        self.aside = classified.load(folder, "held_out")
        self.padding = 0
        self.order = Order(self.texts.lengths, settings.batch, 1, rank, world, settings.seed)

    def batches(self, step: int) -> Sequence[Batch]:
        s = self.settings
        # What dropout leaves out in the pass that follows hangs on the step too, not on what was drawn before.
        torch.manual_seed(int(np.random.SeedSequence([s.seed, step, self.rank]).generate_state(1, np.uint64)[0] >> 1))
        return [_batch(self.texts.batch(chosen, self.padding)) for chosen in self.order.chosen(step)]

    def held_out(self, whole: bool) -> Iterable[Batch]:
        count = len(self.aside) if whole else min(PERIODIC, len(self.aside))
        for chosen in in_batches(self.aside, count, self.rank, self.world):
            yield _batch(self.aside.batch(chosen, self.padding))

    def build(self) -> torch.nn.Module:
        return self.read(self.folder)

    def read(self, folder: Path) -> torch.nn.Module:
        model = encoder.read(folder)
        self.padding = int(model.config.pad_token_id)
        return model  # type: ignore[no-any-return]

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(logits(model, batch.inputs), batch.inputs.labels_B, reduction="sum")

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        found = logits(model, batch.inputs)
        truth = batch.inputs.labels_B
        pairs = zip(truth.tolist(), found.argmax(-1).tolist(), strict=True)
        sums: dict[str, int | float] = {
            "loss": F.cross_entropy(found, truth, reduction="sum").item(),
            "count": batch.learnt,
        }
        for true, said in pairs:
            name = f"{true}>{said}"
            sums[name] = sums.get(name, 0) + 1
        return sums

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        score = score_of(confusion(sums))
        return {"loss": sums["loss"] / max(1, sums["count"]), **score._asdict()}

    def verify(self, model: torch.nn.Module) -> float:
        batch = self.aside.batch(range(min(_ROWS, len(self.aside))), self.padding)
        model.eval()
        with torch.no_grad():
            ours, theirs = (self.logits(each, batch) for each in (model, self.read(self.folder).eval()))
        return float((ours - theirs).abs().max())

    def logits(self, model: torch.nn.Module, batch: TextBatch) -> torch.Tensor:
        """(B, …) that the saved model must give too."""
        return logits(model, batch)

    def said(self, model: torch.nn.Module) -> npt.NDArray[np.float32]:
        """(N, C) logits of all held-out texts, in float32."""
        return all_logits(model.eval(), self.aside, self.padding)


class ClassScore(NamedTuple):
    """Shares of 1, as scikit-learn's ``accuracy_score`` and ``f1_score(average="macro")``."""

    accuracy: float
    macro_f1: float


def confusion(sums: Sums) -> npt.NDArray[np.int64]:
    """(C, C) counts that ``measure`` added up: row the true class, column what was said; C of what occurs."""
    found = {tuple(map(int, name.split(">"))): int(count) for name, count in sums.items() if ">" in name}
    side = 1 + max((max(pair) for pair in found), default=0)
    counts = np.zeros((side, side), np.int64)
    for (true, said), count in found.items():
        counts[true, said] = count
    return counts


def score_of(counts: npt.NDArray[np.int64]) -> ClassScore:
    """The metrics of a confusion matrix."""
    from sklearn.metrics import accuracy_score, f1_score

    truth, said = np.nonzero(counts)
    weight = counts[truth, said]
    if not len(weight):
        return ClassScore(0.0, 0.0)
    f1 = f1_score(truth, said, average="macro", sample_weight=weight, zero_division=0)
    return ClassScore(float(accuracy_score(truth, said, sample_weight=weight)), float(f1))


def logits(model: Any, batch: TextBatch) -> torch.Tensor:
    """(B, C) float32."""
    kinds = {"token_type_ids": batch.kinds_BT} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
    found: torch.Tensor = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **kinds).logits
    return found.float()


def all_logits(model: torch.nn.Module, texts: ClassifiedTexts, padding: int) -> npt.NDArray[np.float32]:
    """(N, C) logits of all texts."""
    found: npt.NDArray[np.float32] | None = None
    with torch.no_grad():
        for chosen in in_batches(texts, len(texts)):
            part = logits(model, texts.batch(chosen, padding)).numpy()
            if found is None:
                found = np.zeros((len(texts), part.shape[1]), np.float32)
            found[chosen] = part
    assert found is not None
    return found


def in_batches(texts: ClassifiedTexts, count: int, rank: int = 0, world: int = 1) -> Iterable[list[int]]:
    """A rank's share of the first ``count`` texts, those of like length together."""
    by_length = np.argsort(texts.lengths[:count], kind="stable")[rank::world].tolist()
    for first in range(0, len(by_length), _ROWS):
        yield by_length[first : first + _ROWS]


def of_loss(figures: Mapping[str, Any]) -> tuple[str, float]:
    """For ``Task.baseline``: the loss of who knows no more than how often each class occurs."""
    return "frequencies of the classes", float(figures["baseline"]["majority"]["loss"])


def _batch(texts: TextBatch) -> Batch:
    return Batch(texts, len(texts.labels_B), len(texts.labels_B))
