"""The ceiling of ``bench dense`` and ``bench many``: the same torch.optim fused step alone, in its own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
}
"""What the benches run: the class and its hyperparameters, the same on either side of a pair."""


class KernelAlone:
    """Parameters of the given element counts, float32, and one fused torch.optim optimizer per name.

    The number of threads is the process's ``OMP_NUM_THREADS``.
    """

    def __init__(self, sizes: Sequence[int], optimizers: Sequence[str]) -> None:
        self._optimizers = {name: _fused(name, sizes) for name in optimizers}

    def step(self, optimizer: str, times: int = 1) -> list[float]:
        """Seconds of each of ``times`` steps."""
        chosen = self._optimizers[optimizer]
        return [timed_step(chosen) for _ in range(times)]


def timed_step(optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def _fused(name: str, sizes: Sequence[int]) -> torch.optim.Optimizer:
    kind, hyper = OPTIMIZERS[name]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    chosen: torch.optim.Optimizer = kind(parameters, fused=True, **hyper)
    chosen.step()  # the slots are allocated by the first step
    return chosen
