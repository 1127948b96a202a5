"""What ``bench memory`` calls a bare interpreter, and nothing else in it. Run by path; prints ``VmRSS`` in bytes.

It has imported what a server imports, torch included, and has run one AdamW step on 1,024 elements as a server runs
it, so that the libraries' own pools exist. It is no server: no socket, no table, no client.
"""

from __future__ import annotations

from pathlib import Path

import torch

import headwater.server.__main__  # noqa: F401  (what a server imports)
from headwater.server.tables.base import Contribution
from headwater.server.tables.dense import DenseShard
from headwater.types import DenseSpec, OptimizerSpec, ParameterSpec, Segment

ELEMENTS = 1024


def run_one_kernel() -> None:
    """One AdamW step on a shard of ``ELEMENTS`` float32 elements."""
    size = 4 * ELEMENTS
    spec = DenseSpec("bare", (ParameterSpec("p", (ELEMENTS,)),), OptimizerSpec("AdamW", ({"lr": 1e-3},)))
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    shard = DenseShard(spec, [Segment(0, 0, ELEMENTS, 0, size)], size, memory[start : start + size])
    shard.step([Contribution(torch.zeros(size, dtype=torch.uint8), ((0, size),))])


def resident() -> int:
    """``VmRSS`` of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


if __name__ == "__main__":
    run_one_kernel()
    print(resident())
