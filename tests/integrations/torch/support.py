"""Workers as threads of one in-process cluster, each with a client and a model of its own."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

import headwater
from headwater.client import Client
from tests.patience import PATIENCE

T = TypeVar("T")
_names = itertools.count()
_seeding = threading.Lock()  # torch has one generator for all threads


def workers(count: int, life: Callable[[Client], T], servers: int = 1) -> list[T]:
    """What ``life`` returned on each rank; the first error is raised."""
    address = f"inproc://integrations-{next(_names)}"

    def run(rank: int) -> T:
        with headwater.connect(address, rank=rank, world=count, servers=servers, timeout=PATIENCE) as client:
            return life(client)

    with ThreadPoolExecutor(count) as pool:
        return [life.result(PATIENCE) for life in [pool.submit(run, rank) for rank in range(count)]]


class Zoo(nn.Module):
    """Tied, frozen, odd-sized, large, functional and now and then unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 130)
        self.wide = nn.Linear(130, 131)  # more than one chunk: split over servers
        self.sometimes = nn.Linear(131, 131, bias=False)
        self.down = nn.Linear(131, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor, detour: bool) -> torch.Tensor:
        x = self.frozen(self.norm(self.embedding(ids)))
        x = self.wide(torch.tanh(self.up(x)))
        if detour:
            x = x + self.sometimes(x)
        out: torch.Tensor = self.head(self.down(x * self.scale))
        return out

    def loss(self, rank: int, step: int) -> torch.Tensor:
        """Of a micro-batch that depends on (rank, step); ``sometimes`` is used by some ranks in some steps."""
        generator = torch.Generator().manual_seed(100 * step + rank)
        ids = torch.randint(11, (3, 5), generator=generator)
        target = torch.randint(11, (15,), generator=generator)
        return functional.cross_entropy(self(ids, detour=(step + rank) % 3 == 1).flatten(0, 1), target)


def zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    """Always the same."""
    with _seeding, torch.random.fork_rng():
        torch.manual_seed(1)
        return Zoo().to(dtype)


def digest(model: nn.Module) -> str:
    """SHA-256 of all parameters."""
    parts = (p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(b"".join(parts)).hexdigest()
