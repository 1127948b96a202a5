"""Ray: the parameters live in an actor; gradients and values travel through the object store (shared memory).

The gradient is put into the store (one copy), the actor maps it without copying, runs torch's fused step, and
returns its parameters (one copy into the store), which the worker maps without copying.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import ray
import torch
import work


@ray.remote
class Server:
    """One float32 tensor of ``size`` bytes and its optimizer."""

    def __init__(self, kind: str, hyper: dict[str, float], size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._parameter = torch.nn.Parameter(torch.zeros(size // work.ITEM_BYTES))
        self._optimizer = getattr(torch.optim, kind)([self._parameter], fused=True, **hyper)

    def push_pull(self, gradient: np.ndarray) -> np.ndarray:
        # Ray's arrays are read-only and torch warns of it; the fused step only reads the gradient.
        self._parameter.grad = torch.frombuffer(memoryview(gradient).toreadonly(), dtype=torch.float32)
        self._optimizer.step()
        return self._parameter.detach().numpy()


def dense(kind: str, hyper: dict[str, float], size: int, rounds: int) -> list[float]:
    server = Server.remote(kind, hyper, size, os.cpu_count() or 1)
    gradient = np.full(size // work.ITEM_BYTES, work.GRADIENT, dtype=np.float32)

    def once() -> np.ndarray:
        return ray.get(server.push_pull.remote(gradient))

    found = work.timed(once, rounds)
    if kind == "SGD":
        work.check(once()[-1], rounds + work.WARM_UP + 1)
    ray.kill(server)
    return found


def main() -> None:
    options = work.options()
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2 * 2**30,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).resolve().parent)}},
    )
    rows = {
        "Ray actor": {
            "SGD": dense("SGD", work.SGD, work.DENSE_BYTES, options.rounds),
            "AdamW": dense("AdamW", work.ADAMW, work.DENSE_BYTES, options.rounds),
            "small": dense("SGD", work.SGD, work.SMALL_BYTES, options.small_rounds),
        }
    }
    ray.shutdown()
    work.answer("Ray", f"ray {ray.__version__}", rows)


if __name__ == "__main__":
    main()
