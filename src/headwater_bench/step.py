"""``headwater bench step``: a language model's training step under ``Bulk``, beside the same step without company.

Two worker processes with one thread each take turns, in phases of a few steps with a barrier before each: no
synchronisation (each its own fused AdamW, both at the same time), Headwater, and DDP over Gloo.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from typing import Any

from headwater.launch import Launcher
from headwater_bench.child import Child
from headwater_bench.cluster import worker_environment
from headwater_bench.options import Options, Transport
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import Measure, interleave, median_ratio
from headwater_bench.trainer import KINDS

ROUNDS = 10
PHASE = 10
WORLD = 2
BATCHES = (1, 4)
LENGTH = 128
MODEL = "headwater_recipes.lm.model:config"
SIZE = "12m"


def trainers(stack: contextlib.ExitStack, launcher: Launcher, transport: Transport, **arguments: Any) -> list[Child]:
    """The workers of a cluster, which end with ``stack``. ``arguments``: of each ``StepTrainer``."""
    store = stack.enter_context(tempfile.TemporaryDirectory()) + "/gloo"
    return [
        stack.enter_context(
            Child(
                "trainer",
                environment=worker_environment(launcher, rank, WORLD, transport) | {"GLOO_SOCKET_IFNAME": "lo"},
                rank=rank,
                world=WORLD,
                store=store,
                **arguments,
            )
        )
        for rank in range(WORLD)
    ]


def measure(options: Options, model: str = MODEL, size: str = SIZE) -> list[Figure]:
    """The figures of every batch size."""
    found = []
    with contextlib.ExitStack() as stack:
        options.note("step: starting the servers and two workers with three copies of the model each")
        launcher = stack.enter_context(Launcher(options.servers, advertise=False))
        transport = options.transport or "local"
        workers = trainers(stack, launcher, transport, model=model, size=size)
        parameters = workers[0].ask("parameters")
        found.append(figure("step", "the model's parameters", parameters / 1e6, "millions"))
        for batch in BATCHES:
            options.note(f"step: batch {batch}")
            measures = {kind: _phase(workers, kind, batch) for kind in KINDS}
            found += step_figures(batch, interleave(measures, options.rounds_or(ROUNDS), warmup=1))
    return found


def _phase(workers: list[Child], kind: str, batch: int) -> Measure:
    """Seconds per step of a phase: the mean of the workers'."""

    def run() -> float:
        for worker in workers:
            worker.tell("phase", kind=kind, steps=PHASE, batch=batch, length=LENGTH)
        return statistics.fmean([worker.answer() for worker in workers])

    return run


def step_figures(batch: int, seconds: dict[str, list[float]]) -> list[Figure]:
    """Figures from seconds per step of every kind of ``trainer.KINDS``, by round."""
    name = f"batch {batch}"
    ours, ddp, none = seconds["headwater"], seconds["ddp"], seconds["none"]
    alone = statistics.median(none) * 1e3
    return [
        figure("step", f"{name} step", statistics.median(ours) * 1e3, "ms", alone),
        figure("step", f"{name} step / no synchronisation", median_ratio(ours, none), "×", 1.0),
        figure(
            "step", f"{name} fresh values when step() returns / overlap", median_ratio(ours, seconds["overlap"]), "×"
        ),
        figure("step", f"{name} clip_grad_norm_ by the script / without", median_ratio(seconds["clip"], ours), "×"),
        figure("step", f"{name} DDP over Gloo step", statistics.median(ddp) * 1e3, "ms", alone),
        figure("step", f"{name} DDP over Gloo / no synchronisation", median_ratio(ddp, none), "×", 1.0),
    ]
