"""A row of coefficients, in the columns' own units; inside they are learnt in units in which all columns are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from headwater_recipes.common import checkpoint
from headwater_recipes.tables.table import Array, Numbers


class Regression(torch.nn.Module):
    """y = βx + c.

    Attributes:
        weight: (F,) float32, coefficients of x once its columns have mean 0 and variance 1, for a y that has too.
        bias: () float32.
        mean, scale: (F,) float64, buffers: of the columns, over the rows that are trained on.
        target: (2,) float64, a buffer: mean and standard deviation of y over these rows.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(features))
        self.bias = torch.nn.Parameter(torch.zeros(()))
        for name, size in (("mean", features), ("scale", features), ("target", 2)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) float64 in the columns' own units → (N,) float32, in standard deviations of y from its mean."""
        return torch.mv(((x - self.mean) / self.scale).float(), self.weight) + self.bias

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) → (N,), both float64 and in their own units."""
        return self.forward(x).double() * self.target[1] + self.target[0]

    @property
    def beta(self) -> Array:
        """(F,) in the columns' own units."""
        found: Array = (self.weight.detach().double() * self.target[1] / self.scale).numpy()
        return found


def build(training: Numbers) -> Regression:
    """All coefficients 0: the mean of y."""
    made = Regression(training.x.shape[1])
    made.mean.copy_(torch.from_numpy(training.x.mean(0)))
    made.scale.copy_(torch.from_numpy(training.x.std(0)))
    made.target.copy_(torch.tensor([training.y.mean(), training.y.std()]))
    return made


def read(folder: Path, features: int) -> Regression:
    """The model of a run folder. Raises ``DataError``: it is not whole."""
    return checkpoint.load_model(Regression(features), folder)


def closed_form(training: Numbers) -> tuple[Array, float, Array]:
    """Ordinary least squares: β (F,), the constant, and the standard errors of β (F,).

    Where columns depend on each other it is the shortest solution, and standard errors are those of its pseudoinverse.
    """
    design = np.column_stack([training.x, np.ones(len(training.y))])
    found, _, rank, _ = np.linalg.lstsq(design, training.y, rcond=None)
    left = training.y - design @ found
    variance = left @ left / max(1, len(training.y) - rank)
    inverse = np.linalg.pinv(design.T @ design, hermitian=True)
    errors: Array = np.sqrt(variance * np.diag(inverse)).astype(np.float64)
    beta: Array = found[:-1].astype(np.float64)
    return beta, float(found[-1]), errors[:-1]
