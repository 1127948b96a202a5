"""Rows of a table as a client sends them, in the form of the Hugging Face API's tabular regression."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from headwater_recipes.common.serving import JSON, BadInput

MOST = 100_000
"""Rows of one request."""


class ServedTable:
    """What most ``serving.Served`` of a table share: a recipe's adds ``read`` and ``answer``.

    ``names``: of the columns that the model was trained on, in their order.
    """

    task = "tabular-regression"

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def inputs(self, body: bytes, content_type: str) -> torch.Tensor:
        """(N, F) float64. Takes ``{"data": {column: [values]}}``, columns in any order, or a list of rows.

        Raises ``BadInput``: 400, a column that is missing, unknown or of another length, a value that is no finite
        number; 413, more than ``MOST`` rows; 415, no JSON.
        """
        columns = ", ".join(f'"{name}": [1.5]' for name in self.names)
        form = (
            f'this model takes {{"inputs": {{"data": {{{columns}}}}}}}, or a list of rows of {len(self.names)} numbers'
        )
        if content_type != JSON:
            raise BadInput(form, 415)
        given = json.loads(body)
        if isinstance(given, dict):
            table = given.get("data")
            if not isinstance(table, dict) or set(table) != set(self.names):
                raise BadInput(form)
            given = [list(row) for row in self._rows(table, form)]
        if not isinstance(given, list) or not given:
            raise BadInput(form)
        if len(given) > MOST:
            raise BadInput(f"{len(given):,} rows; at most {MOST:,} in a request. Nothing was answered", 413)
        return torch.from_numpy(self._checked(given, form))

    def _rows(self, table: dict[str, Any], form: str) -> Any:
        held = [table[name] for name in self.names]
        if not all(isinstance(column, list) for column in held) or len({len(column) for column in held}) != 1:
            raise BadInput(f"{form}; columns must be lists of the same length. Nothing was answered")
        return zip(*held, strict=True)

    def _checked(self, rows: list[Any], form: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, list) or len(row) != len(self.names):
                raise BadInput(f"row {number}: {form}; nothing was answered")
            if not all(type(value) in (int, float) and abs(value) < 1e300 for value in row):
                raise BadInput(f"row {number} holds something that is no finite number; nothing was answered")
        return np.array(rows, np.float64).reshape(len(rows), len(self.names))
