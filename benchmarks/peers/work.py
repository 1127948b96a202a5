"""The work that every peer does, and how it is timed. Only the standard library: each peer has its own environment.

*dense*: 64 MB of float32 gradients go from one worker to where the parameters are, one optimizer step is applied,
and the worker has the fresh 64 MB. *small*: the same with 1 KB. What a library needs beyond that (copies,
serialisation, scheduling) is its own time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

DENSE_BYTES = 64 * 2**20
SMALL_BYTES = 1024
ITEM_BYTES = 4
SGD = {"lr": 0.1}
ADAMW = {"lr": 1e-3, "weight_decay": 0.01}
GRADIENT = 1e-3
WARM_UP = 3


def options() -> argparse.Namespace:
    """``--rounds`` of dense work and ``--small-rounds`` of small work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small-rounds", type=int, default=500)
    return parser.parse_args()


def timed(once: Callable[[], object], rounds: int, warmup: int = WARM_UP) -> list[float]:
    """Seconds of each of ``rounds`` calls, after ``warmup`` that do not count."""
    found = []
    for turn in range(warmup + rounds):
        start = time.perf_counter()
        once()
        if turn >= warmup:
            found.append(time.perf_counter() - start)
    return found


def check(value: float, steps: int) -> None:
    """After ``steps`` steps of plain SGD from zero every element has this value, or the work was not done."""
    expected = -SGD["lr"] * GRADIENT * steps
    if abs(value - expected) > abs(expected) * 1e-3:
        raise SystemExit(f"after {steps} steps a parameter is {value}, not {expected}: the work was not done")


def answer(peer: str, version: str, rows: dict[str, dict[str, list[float]]]) -> None:
    """Print the peer's measurements as one JSON line: seconds by row and work (``SGD``, ``AdamW``, ``small``)."""
    print(json.dumps({"peer": peer, "version": version, "rows": rows}), flush=True)
