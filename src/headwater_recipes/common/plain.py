"""A run once more without servers, to compare it with: ``python -m headwater_recipes.common.plain MODULE:TASK RUN``.

The same batches in the same order, in one process that plays every rank (``--threads``), or with ``--ddp`` in as many
processes as the run had workers, under ``DistributedDataParallel`` over Gloo. What comes of it is printed as JSON: the
figures that a report of it has, units per second of training, and how far the model is from the run's: nothing at all
with one thread, as a worker has, if nobody's updates were late (``Bulk``) and nothing stopped it on the way.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import headwater
from headwater.errors import UsageError
from headwater_recipes.common import checkpoint, metrics
from headwater_recipes.common.schedule import Schedule, factor, of, recorded
from headwater_recipes.common.settings import Training
from headwater_recipes.common.task import Ended, Task, add
from headwater_recipes.common.trainer import takes_bfloat16

WARM = 3
"""Steps at the beginning that rates leave out."""


class Plain:
    """``ranks``: one task for each rank that this process plays. ``begun``: a folder with the model's first values.
    ``exact``: clip as the servers do, and not as a plain script does, which is quicker.
    """

    def __init__(
        self, kind: type[Task[Any]], folder: Path, ranks: Sequence[int], steps: int | None, *, begun: Path, exact: bool
    ) -> None:
        self.folder, self.clip = folder, clip if exact else torch.nn.utils.clip_grad_norm_
        settings: Training = checkpoint.read_state(folder, kind.recipe.settings).settings
        self.settings = settings
        self.steps = steps or _taken(folder)
        self.world = settings.workers
        self.tasks = [kind(settings, folder, rank, self.world) for rank in ranks]
        self.model = kind(settings, begun, ranks[0], self.world).build()
        if any(p.is_meta for p in self.model.parameters()):
            self.model = drawn(self.tasks[0], self.model)
        self.optimizer = torch.optim.AdamW(
            self.tasks[0].groups(self.model), lr=settings.lr, betas=settings.betas, fused=True
        )
        schedules = recorded(folder) or [Schedule(0, 0.0, 1 / self.steps, self.steps)]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: factor(of(schedules, step).at(step), step, settings.warmup)
        )
        self.bfloat16 = takes_bfloat16(settings)

    def precision(self) -> torch.autocast:
        """As the workers' matrix products."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)

    def train(self, act: Callable[[int], int]) -> float:
        """Units per second; ``act(step)`` leaves the step's gradient and returns the units that it saw."""
        self.model.train()
        begun, seen = time.monotonic(), 0
        for step in range(self.steps):
            if step == min(WARM, self.steps - 1):
                begun, seen = time.monotonic(), 0
            seen += act(step)
            self.clip(self.model.parameters(), self.settings.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return seen / (time.monotonic() - begun)

    def alone(self, step: int) -> int:
        """Every rank's gradient in turns, and their mean in the order of ranks, as servers under ``Bulk`` make it; of
        running statistics too, which every rank goes on with from the same.
        """
        seen, total = 0, dict[torch.nn.Parameter, torch.Tensor]()
        running = {b: (b.clone(), torch.zeros_like(b)) for b in self.model.buffers() if b.is_floating_point()}
        for task in self.tasks:
            for buffer, (before, _) in running.items():
                buffer.copy_(before)
            seen += self.backward(self.model, task, step)
            for buffer, (_, found) in running.items():
                found += buffer
            for p in self.model.parameters():
                if p.grad is not None:
                    total[p] = total[p] + p.grad if p in total else p.grad
                    p.grad = None
        for p, gradient in total.items():
            p.grad = gradient / self.world
        for buffer, (_, found) in running.items():
            buffer.copy_(found / self.world)
        return seen

    def backward(self, model: torch.nn.Module, task: Task[Any], step: int) -> int:
        """One rank's gradient. Returns the units that it saw."""
        batches = task.batches(step)
        learnt = sum(batch.learnt for batch in batches)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last or not isinstance(model, DistributedDataParallel) else _no_sync(model):
                with self.precision():
                    loss = task.loss(model, batch) / learnt
                loss.backward()  # type: ignore[no-untyped-call]
        return sum(batch.seen for batch in batches)

    def figures(self, seconds: float) -> dict[str, Any]:
        """What ``report.json`` would say of this model, measured as the workers measure theirs at the end of a run."""
        self.model.eval()
        with torch.no_grad(), self.precision():
            sums = add(task.measure(self.model, batch) for task in self.tasks for batch in task.held_out(whole=True))
        first = self.tasks[0]
        ended = Ended(self.steps, seconds, sums, first.metrics(sums), metrics.read_rows(self.folder), None)
        with tempfile.TemporaryDirectory() as place:  # a recipe may draw, and read the model from its folder
            folder = Path(place) / self.folder.name
            shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "*.png"))
            first.write(self.model, folder)
            return type(first)(self.settings, folder).figures(ended)

    def difference(self) -> float:
        """The largest between this model's parameters and running statistics, and the run's."""
        theirs = self.tasks[0].read(self.folder).state_dict()
        found = [(value, theirs[name]) for name, value in self.model.state_dict().items() if value.is_floating_point()]
        return max(float((mine - other).abs().max()) for mine, other in found if mine.numel())


def drawn(task: Task[Any], model: torch.nn.Module) -> torch.nn.Module:
    """A model with the first values that servers draw: they do not depend on how many these are, so one in this process
    is enough. What the optimizer has made of ``model`` is left behind.
    """
    settings = task.settings
    with headwater.connect("inproc://plain") as client, tempfile.TemporaryDirectory() as place:
        headwater.Optimizer(
            model, torch.optim.AdamW, params=task.groups(model), lr=settings.lr, client=client,
            init=task.first_values(), seed=settings.seed, name=checkpoint.TABLE,
        )  # fmt: skip
        task.write(model, Path(place))
        return task.read(Path(place))


def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> None:
    """As ``torch.nn.utils.clip_grad_norm_``, with the norm of the servers: of a sum that is not rounded on the way
    (here in float64), so that it does not depend on how the parameters lie on them.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    if (factor := max_norm / (norm + 1e-6)) < 1:
        for gradient in gradients:
            gradient.mul_(factor)


class _Distributed(DistributedDataParallel):
    """A task may ask a model for more than its forward: that of the module is found."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def get_buffer(self, target: str) -> torch.Tensor:
        """The module's."""
        return self.module.get_buffer(target)  # type: ignore[no-any-return]


def _no_sync(model: DistributedDataParallel) -> AbstractContextManager[None]:
    return model.no_sync()


def _taken(folder: Path) -> int:
    report = folder / "report.json"
    if not report.is_file():
        raise UsageError(f"{folder} holds no report.json: the run did not come to its end; give --steps")
    return int(json.loads(report.read_text(encoding="utf-8"))["step"])


def in_one_process(
    kind: type[Task[Any]], folder: Path, threads: int, steps: int | None, *, figures: bool = True
) -> dict[str, Any]:
    """Train as one process that plays all ranks. ``threads``: of torch; with 1 the sums are in the workers' order."""
    torch.set_num_threads(threads)
    settings = checkpoint.read_state(folder, kind.recipe.settings).settings
    with tempfile.TemporaryDirectory() as place:
        begun = Path(place) if figures else folder
        if figures:  # the run's folder may hold the trained model where the first values were
            kind.prepare(settings, Console(quiet=True))(begun)
        plain = Plain(kind, folder, range(settings.workers), steps, begun=begun, exact=figures)
    start = time.monotonic()
    rate = plain.train(plain.alone)
    seconds = round(time.monotonic() - start, 1)
    found: dict[str, Any] = {
        "units_per_second": rate,
        "threads": threads,
        "steps": plain.steps,
        "training_seconds": seconds,
    }
    if figures:
        found |= {"figures": plain.figures(seconds), "largest_difference": plain.difference()}
    return found


def under_ddp(kind: type[Task[Any]], folder: Path, rank: int, store: str, steps: int | None) -> dict[str, Any]:
    """One rank of a run under ``DistributedDataParallel`` over Gloo, with one thread."""
    torch.set_num_threads(1)
    plain = Plain(kind, folder, [rank], steps, begun=folder, exact=False)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=plain.world)
    plain.backward(plain.model, plain.tasks[0], 0)
    unused = any(p.grad is None for p in plain.model.parameters() if p.requires_grad)
    plain.optimizer.zero_grad()
    model = _Distributed(plain.model, find_unused_parameters=unused)
    rate = plain.train(lambda step: plain.backward(model, plain.tasks[0], step))
    distributed.barrier()
    return {"units_per_second": rate * plain.world, "steps": plain.steps}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", help="MODULE:TASK, as a recipe names it")
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="default: as many as the run has taken")
    parser.add_argument("--rate", action="store_true", help="units per second, and no figures")
    parser.add_argument("--ddp", action="store_true", help="the same, under DistributedDataParallel")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    kind: type[Task[Any]] = pkgutil.resolve_name(asked.task)
    if not asked.ddp:
        print(json.dumps(in_one_process(kind, asked.run, asked.threads, asked.steps, figures=not asked.rate)))
    elif asked.rank is not None:
        found = under_ddp(kind, asked.run, asked.rank, asked.store, asked.steps)
        if asked.rank == 0:
            print(json.dumps(found), flush=True)
        os._exit(0)  # Gloo's end may wait for a rank that has ended before
    else:
        _start_ranks(checkpoint.read_state(asked.run, kind.recipe.settings).settings.workers)


def _start_ranks(world: int) -> None:
    """This command once for each rank; ends with the first code that is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "headwater_recipes.common.plain", *sys.argv[1:], "--store", f"{folder}/store"]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world)]
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.1)
        for rank in ranks:  # one that failed is waited for by the others in vain
            rank.terminate()
        codes = [rank.wait() for rank in ranks]
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
