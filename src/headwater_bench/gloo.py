"""The baseline of ``bench dense``: an all-reduce over Gloo between two processes on the loopback."""

from __future__ import annotations

import datetime as dt
import time

import torch
import torch.distributed as dist

from headwater_bench.child import Child


def join(rank: int, world: int, store: str, timeout: float = 120.0) -> None:
    """Become a rank of a Gloo group that meets in the file ``store``."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=dt.timedelta(seconds=timeout),
    )


class GlooRank:
    """The child's side: one rank with one float32 tensor of ``size`` bytes."""

    def __init__(self, rank: int, world: int, store: str, size: int) -> None:
        torch.set_num_threads(1)
        join(rank, world, store)
        self._tensor = torch.zeros(size // 4)

    def all_reduce(self, times: int) -> list[float]:
        """Seconds of each of ``times`` all-reduces, counted from when both ranks have arrived."""
        return [self._once() for _ in range(times)]

    def _once(self) -> float:
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(self._tensor)
        return time.perf_counter() - start


class GlooPair:
    """Two ranks. ``folder`` is a temporary folder that they meet in."""

    def __init__(self, folder: str, size: int, world: int = 2) -> None:
        # Gloo looks the machine's own name up and may take an outer interface; the loopback is the fair one.
        environment = {"GLOO_SOCKET_IFNAME": "lo"}
        self._ranks = [
            Child("gloo", environment=environment, rank=rank, world=world, store=f"{folder}/gloo", size=size)
            for rank in range(world)
        ]

    def all_reduce(self, times: int) -> list[float]:
        """Seconds of each all-reduce: the slower rank's."""
        for rank in self._ranks:
            rank.tell("all_reduce", times=times)
        return [max(pair) for pair in zip(*(rank.answer() for rank in self._ranks), strict=True)]

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
