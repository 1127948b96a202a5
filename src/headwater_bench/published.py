"""Who reads what ``bench publish`` publishes, and the table that it is."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

import headwater
from headwater_bench.plain import Raw

TENSOR = 2 << 20
"""Bytes of one tensor: what a layer of a small language model has."""


def spec(model: str, nbytes: int, dtype: str) -> headwater.DenseSpec:
    """A table of about ``nbytes``, in tensors of ``TENSOR`` bytes or one smaller one; under SGD, so without slots."""
    count, each = max(1, nbytes // TENSOR), min(nbytes, TENSOR)
    shape = (each // headwater.ParameterSpec("", (1,), dtype).nbytes // 256, 256)
    parameters = tuple(headwater.ParameterSpec(f"p{i:03}", shape, dtype) for i in range(count))
    return headwater.DenseSpec(
        model, parameters, headwater.OptimizerSpec("SGD", ({"lr": 1.0},)), headwater.Bulk(), nonfinite="allow"
    )


class Module(torch.nn.Module):
    """A module whose parameters are those of a table; its forward costs next to nothing."""

    def __init__(self, table: headwater.DenseSpec) -> None:
        super().__init__()
        for p in table.parameters:
            empty = torch.empty(p.shape, dtype=getattr(torch, p.dtype))
            self.register_parameter(p.name, torch.nn.Parameter(empty, requires_grad=False))

    def forward(self) -> Any:
        return self.get_parameter("p000")[0, 0].item()


class Reading:
    """A process that reads the versions of one model; all but copies out of them with one thread."""

    def __init__(self, model: str, nbytes: int, dtype: str) -> None:
        self._threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(1)
        self._model, self._dtype = model, dtype
        self._table = spec(model, nbytes, dtype)
        self._reader: Any = None
        self._follower: Any = None
        self._module: Any = None
        self._raw: Raw | None = None
        self._warm: dict[str, torch.Tensor] = {}
        self._others: dict[str, torch.Tensor] = {}
        self._copies: tuple[Any, Any] | None = None

    def first(self) -> tuple[float, float]:
        """Seconds to connect, and of the first lease of this process."""
        start = time.perf_counter()
        self._reader = headwater.reader(self._model)
        connected = time.perf_counter() - start
        return connected, self.lease("latest")

    def lease(self, name: str) -> float:
        """Seconds from the call to a tensor, an element of which has been read. The lease ends afterwards."""
        start = time.perf_counter()
        weights = self._reader.lease(name)
        weights["p000"][0, 0].item()
        seconds = time.perf_counter() - start
        weights.release()
        return seconds

    def copy_out(self, name: str) -> tuple[float, float]:
        """Seconds of ``copy_to`` of a version that nobody has looked at yet into warm tensors; and by one thread.

        By a thread for each core, which is what torch takes of itself.
        """
        into = self._into()
        with self._reader.lease(name) as weights:
            torch.set_num_threads(self._threads)
            start = time.perf_counter()
            weights.copy_to(into)
            middle = time.perf_counter()
            torch.set_num_threads(1)
            weights.copy_to(into)
            return middle - start, time.perf_counter() - middle

    def fetch_and_copy(self, name: str) -> float:
        """Seconds of a lease and a copy of all of it into warm tensors."""
        start = time.perf_counter()
        with self._reader.lease(name) as weights:
            weights.copy_to(self._into())
            return time.perf_counter() - start

    def _into(self) -> dict[str, torch.Tensor]:
        if not self._warm:
            self._warm = {p.name: torch.ones(p.shape, dtype=getattr(torch, p.dtype)) for p in self._table.parameters}
        return self._warm

    def copy_tensors(self) -> float:
        """Seconds of copying private tensors of the same sizes into the same warm ones."""
        into = self._into()
        if not self._others:
            self._others = {name: torch.ones_like(tensor) for name, tensor in into.items()}
        start = time.perf_counter()
        for name, tensor in into.items():
            np.copyto(tensor.view(torch.uint8).numpy(), self._others[name].view(torch.uint8).numpy())
        return time.perf_counter() - start

    def memcpy(self) -> float:
        """Seconds of one plain copy of as many bytes between warm buffers, here."""
        nbytes = sum(p.nbytes for p in self._table.parameters)
        if self._copies is None:
            self._copies = np.ones(nbytes, dtype=np.uint8), np.ones(nbytes, dtype=np.uint8)
        start = time.perf_counter()
        np.copyto(*self._copies)
        return time.perf_counter() - start

    def raw(self) -> float:
        """Seconds in which as many bytes come over a bare socket."""
        if self._raw is None:
            self._raw = Raw(sum(p.nbytes for p in self._table.parameters))
        return self._raw.receive()

    def follow(self) -> None:
        """Keep a module current from now on."""
        self._module = Module(self._table)
        self._follower = self._reader.follow(self._module)

    def swap(self, number: int) -> tuple[float, float]:
        """Forwards until one is answered by version ``number``: seconds of the pause, and of the synchronisation."""
        while self._module.version.number != number:
            self._module()
            time.sleep(1e-3)
        found = self._follower.statistics()
        return found.pause, found.sync

    def unfollow(self) -> None:
        self._follower.close()
