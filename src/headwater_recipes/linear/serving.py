"""``headwater serve`` of a run: rows of a table in, y of each out, as the Hugging Face API does tabular regression."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from headwater_recipes.common.serving import check_names
from headwater_recipes.linear.model import Regression, read
from headwater_recipes.tables.serving import ServedTable


class ServedRegression(ServedTable):
    """Of a run of ``headwater train linear``."""

    @classmethod
    def read(cls, folder: Path) -> tuple[Regression, ServedRegression]:
        """See ``Served.read``."""
        names = msgspec.json.decode((folder / "columns.json").read_bytes())["names"]
        return read(folder, len(names)).eval(), cls(names)

    def answer(self, model: torch.nn.Module, inputs: torch.Tensor, parameters: Mapping[str, Any]) -> list[float]:
        """y of each row, in its own unit."""
        check_names(parameters, ())
        assert isinstance(model, Regression)
        found: list[float] = model.predict(inputs).tolist()
        return found
