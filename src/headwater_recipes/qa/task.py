"""What is trained: an encoder with a head, on questions and their passages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from headwater_recipes.common.task import Batch, Ended, Sums
from headwater_recipes.qa import data, report, spans
from headwater_recipes.qa.settings import RECIPE, QaSettings
from headwater_recipes.text import encoder
from headwater_recipes.text.classifying import Classifying, of_loss


class QuestionAnswering(Classifying[QaSettings]):
    """Yes or no, as two classes; of a folder whose answers are spans it is ``Spans`` that is made."""

    recipe = RECIPE

    def __new__(cls, settings: QaSettings, folder: Path, rank: int = 0, world: int = 1) -> Self:
        del settings, rank, world
        return super().__new__(Spans if (folder / data.SPANS).exists() else cls)  # type: ignore[return-value]

    @classmethod
    def prepare(cls, settings: QaSettings, console: Console) -> Callable[[Path], None]:
        return data.prepare(settings, console)

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        """``accuracy`` of spans: the share of windows whose both ends are told right."""
        if "right" in sums:
            count = max(1, sums["count"])
            return {"loss": sums["loss"] / count, "accuracy": sums["right"] / count}
        return super().metrics(sums)

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.of_classes(self, ended)

    def baseline(self, figures: Mapping[str, Any]) -> tuple[str, float] | None:
        return of_loss(figures)

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        report.tell(self.folder, figures, console)


class Spans(QuestionAnswering):
    """The first and the last token of the answer."""

    def read(self, folder: Path) -> torch.nn.Module:
        model = encoder.read(folder, encoder.SPANS)
        self.padding = int(model.config.pad_token_id)
        return model  # type: ignore[no-any-return]

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return spans.loss(model, batch.inputs)

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        nats, right = spans.right(model, batch.inputs)
        return {"loss": nats, "right": right, "count": batch.learnt}

    def logits(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        found = torch.cat(spans.logits(model, batch), 1)
        return found.masked_fill(found == -torch.inf, 0)  # where there is no token, the same in both

    def figures(self, ended: Ended) -> dict[str, Any]:
        return report.of_spans(self, ended)

    def baseline(self, figures: Mapping[str, Any]) -> None:
        del figures
