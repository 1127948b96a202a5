"""What workers of a chaos run push: tables whose sums are the proof, and what each push adds."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from headwater.types import Async, Bulk, DenseSpec, OptimizerSpec, ParameterSpec, Stale, Sync
from headwater_bench.chaos.ledger import WIDTHS

MODEL = 6  # tensors of 64 KiB: two shards' worth of frames that are cut on the way
WIDE = 16384 // 4

POLICIES: dict[str, Sync] = {"bulk": Bulk("sum"), "stale": Stale(1), "async": Async()}


def model_table() -> DenseSpec:
    """Under Bulk: a model that is trained with AdamW; one process must come to the same bits."""
    tensors = tuple(ParameterSpec(f"w{i}", (WIDE,), "float32") for i in range(MODEL))
    return DenseSpec("model", tensors, OptimizerSpec("AdamW", ({"lr": 0.01},)), Bulk("mean"))


def ballast_table(mode: str) -> DenseSpec:
    """Other policies: large pushes, which are under way when somebody dies. Every element counts them."""
    tensors = tuple(ParameterSpec(f"b{i}", (WIDE * 8,), "float64") for i in range(MODEL // 2))
    return DenseSpec("ballast", tensors, OptimizerSpec("SGD", ({"lr": 1.0},)), POLICIES[mode])


def gradient(rank: int, number: int) -> torch.Tensor:
    """What a worker contributes to the model by its push ``number``: a row per tensor."""
    generator = torch.Generator().manual_seed(rank * 1_000_003 + number)
    return torch.randn(MODEL, WIDE, generator=generator)


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(memoryview(tensor.contiguous().numpy()).cast("B"))  # type: ignore[arg-type]
    return found.hexdigest()[:32]


class Workload(NamedTuple):
    """So many workers under one policy, each with two tables: the ledger's, and one whose pushes are large."""

    mode: str
    workers: int

    def ledger_table(self) -> DenseSpec:
        """The table whose sums are the proof: a row per worker in each page."""
        pages = tuple(ParameterSpec(f"page{i}", (self.workers, width), "float64") for i, width in enumerate(WIDTHS))
        return DenseSpec("ledger", pages, OptimizerSpec("SGD", ({"lr": 1.0},)), POLICIES[self.mode])

    def large_table(self) -> DenseSpec:
        return model_table() if self.mode == "bulk" else ballast_table(self.mode)
