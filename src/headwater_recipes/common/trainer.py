"""The training loop of a worker process, whatever its task is.

Only the optimizer's line knows of servers. Rank and cluster come from the environment (docs/environment.md), settings
from the run folder. After SIGINT, SIGTERM or SIGHUP, whichever worker gets it, all stop at the same step: the one that
rank 0 chose. Then they save.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple

import msgspec
import torch

import headwater
from headwater_recipes.common import checkpoint, reports, schedule
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.schedule import Pace, Schedule, ScheduleFile, factor
from headwater_recipes.common.settings import AnySettings, State, Training, parse_sync
from headwater_recipes.common.task import Batch, Task, add

_GLANCE = 1.0
"""Seconds after which the figures between two rows are said again."""
_END = "end"
"""Where all meet twice, having trained and having validated. It is one name: who took the place of one that died comes
for the first time when the others may be there for the second, and nobody waits for who has left.
"""


class Step(NamedTuple):
    """``loss``: the mean over what was learnt from; ``seen``: units that went through the model."""

    loss: float
    seen: int


class Trainer(Generic[AnySettings]):
    """One rank's training. ``ps`` is its client; ``folder`` a run folder that ``job.prepare`` made."""

    def __init__(self, recipe: Recipe[AnySettings], folder: Path, ps: headwater.Client) -> None:
        self.recipe, self.folder, self.ps = recipe, folder, ps
        self.stopping = False
        self._published: tuple[reports.Published, Any] | None = None
        found = checkpoint.newest(folder)
        asked = checkpoint.read_state(folder, recipe.settings)
        self.start = asked if found is None else checkpoint.read_state(found, recipe.settings)
        self.settings = s = asked.settings
        self.begun, self._clock = 0.0, 0
        self.late = self._takes_a_place()
        if self.late:  # values and state are those of the servers
            found = None
        self.bfloat16 = takes_bfloat16(s)
        self.task: Task[AnySettings] = recipe.load()(s, folder, ps.rank, ps.world)
        self.model = self.task.build() if found is None else self.task.read(found)
        self.optimizer = self._optimizer(None if found else self.task.first_values())
        if found is not None:
            self.optimizer.load_state_dict(checkpoint.load_optimizer(found))
            for group in self.optimizer.param_groups:
                group["initial_lr"] = s.lr
        # Nobody pushes while another still writes state. Who comes late writes none, and the others have been there.
        met = not self.late and self._meet("ready")
        self.members = ps.members
        clock = ps.tables[checkpoint.TABLE].clock
        self._clock = self._clock if self.late else clock
        self.step = self.start.step + clock - self._clock
        if s.elastic and not self.late and (ps.rank == 0 or not met):
            self._say_begun()
        self._schedule()

    def _takes_a_place(self) -> bool:
        """Whether this worker comes instead of one of this launch that died. ``start`` is where the launch began then,
        however many checkpoints there are since.
        """
        path = self.folder / schedule.BEGUN
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not path.is_file():
            return False
        said = msgspec.json.decode(path.read_bytes(), type=schedule.Begun)
        self.start = msgspec.structs.replace(self.start, step=said.step, progress=said.progress, elapsed=said.elapsed)
        self.begun, self._clock = said.monotonic, said.clock
        return True

    def _say_begun(self) -> None:
        """For who takes a worker's place from now on."""
        said = schedule.Begun(self.start.step, self.start.progress, self.start.elapsed, self._clock, time.monotonic())
        beside = self.folder / f"{schedule.BEGUN}.{self.ps.rank}.new"  # several may say so at once
        beside.write_bytes(msgspec.json.encode(said))
        beside.replace(self.folder / schedule.BEGUN)

    def _meet(self, place: str) -> bool:
        """A barrier; whether all were there. In an elastic run those who are left go on without one that died."""
        try:
            self.ps.barrier(place)
        except headwater.WorkerLost:
            if not self.settings.elastic:
                raise
            return False
        return True

    def _optimizer(self, first_values: Mapping[str, Any] | None) -> headwater.Optimizer:
        s = self.settings
        return headwater.Optimizer(
            self.model,
            torch.optim.AdamW,
            params=self.task.groups(self.model),
            lr=s.lr,
            betas=s.betas,
            sync=parse_sync(s.sync),
            max_grad_norm=s.max_grad_norm,
            init=first_values,
            seed=s.seed,
            client=self.ps,
            name=checkpoint.TABLE,
        )

    def _schedule(self) -> None:
        s, start, budget = self.settings, self.start, self.settings.budget
        if s.steps is not None:
            first = Schedule(start.step, start.step / s.steps, 1 / s.steps, s.steps)
        else:
            assert budget is not None
            over = start.step if start.elapsed >= budget else None  # all that is left is to judge it
            first = Schedule(start.step, min(1.0, start.elapsed / budget), 0.0, over)
        self.pace = Pace(first, budget)
        self.schedules = ScheduleFile(self.folder, first)
        if self.ps.rank == 0 and not self.late:
            self.schedules.record(first)
        if self.late:
            self.pace = Pace(self.schedules.at(self.step), budget)
        base = self.step
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda taken: factor(self.schedules.at(base + taken).at(base + taken), base + taken, s.warmup),
        )

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier parts of the run included."""
        return self.start.elapsed + time.monotonic() - self.begun

    def run(self) -> None:
        """Train until the schedule says stop, then save, verify and validate."""
        if not self.late:
            self.begun = time.monotonic()
        size = sum(p.numel() for p in self.model.parameters())
        precision = "bfloat16" if self.bfloat16 else "float32"
        reports.say(reports.Started(self.ps.rank, self.step, size, precision))
        if not self.late:
            self._begin()
        self.meter = Meter(self.ps, time.monotonic())
        self.model.train()
        while not (held := self._followed()).over(self.step):
            taken = self._learn(self.task.batches(self.step))
            if self._step():
                self._after_step(taken)
        self._finish("stopped" if held.asked else "done")

    def _begin(self) -> None:
        """Before the first step of a launch."""
        if self.task.validates_first and self.start.step == 0:
            self._doing("validating before the first step")
            self.validate(whole=True)
        if self.settings.publish_every:
            self._publish()
        self.begun = time.monotonic()
        if self.ps.rank == 0 and self.settings.elastic:
            self._say_begun()

    def _step(self) -> bool:
        """Take a step; False if it was not taken, as another worker died in it: it is to be learnt for once more."""
        try:
            self.optimizer.step()
        except headwater.WorkerLost:
            if not self.settings.elastic:
                raise
            self.optimizer.zero_grad()
            return False
        if not self.settings.elastic and self.ps.members != self.members:
            # The others' step is taken without it, and none that is saved may be of fewer samples than the run's.
            raise headwater.WorkerLost(f"a worker is gone: step {self.step + 1} is not of all, and is not saved")
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return True

    def _learn(self, batches: Sequence[Batch]) -> Step:
        """Forward and backward; the mean over all that the step learns from, however it lies in its batches."""
        learnt, mean = sum(batch.learnt for batch in batches), 0.0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.optimizer.no_sync():
                with self._precision():
                    loss = self.task.loss(self.model, batch) / learnt
                loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.item()
        return Step(mean, sum(batch.seen for batch in batches))

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)

    def _followed(self) -> Schedule:
        """What holds for this step: the schedule, which rank 0 makes."""
        if self.ps.rank == 0:
            self.stopping = self.stopping or self.schedules.stop_asked
            decided = self.pace.decide(self.step, self.elapsed, self.stopping)
            if decided is not None:
                self.schedules.publish(decided)
        elif self.stopping:
            self.schedules.ask_to_stop()
        return self.schedules.at(self.step)

    def _after_step(self, taken: Step) -> None:
        s = self.settings
        self.meter.add(taken)
        self._settle()  # a step later the servers have copied it: nothing is waited for
        if s.publish_every and self.step % s.publish_every == 0:
            self._publish()
        if self.step % s.log_every == 0:
            self._report(reports.Stepped)
        elif self.step == self.start.step + 1 or time.monotonic() - self.meter.said >= _GLANCE:
            self._report(reports.Glanced)
        if self.step % s.validate_every == 0:
            self.validate(whole=False)
        if self.step % s.save_every == 0 and self.ps.rank == 0:
            try:
                self._save()
            except headwater.DiskFull as error:  # there may be room again by the next time
                print(f"step {self.step} is not saved, and training goes on: {error}", file=sys.stderr)

    def _publish(self) -> None:
        """Rank 0 names the state after the step just taken; readers find it as ``latest`` too."""
        if self.ps.rank == 0:
            name = f"step-{self.step}"
            said = {"run": self.folder.name, "recipe": self.recipe.name}
            # The run's step: the tables' clock begins anew when a run goes on in another cluster.
            publication = self.optimizer.publish(name, metadata=said, step=self.step)
            self._published = reports.Published(self.step, name), publication

    def _settle(self) -> None:
        """Say what became of the last publication. One that failed is a pity, and no reason to stop training."""
        if self._published is None:
            return
        (report, publication), self._published = self._published, None
        try:
            publication.wait()
        except headwater.HeadwaterError as error:
            print(f"version {report.name} was not published, and training goes on: {error}", file=sys.stderr)
        else:
            reports.say(report)

    def _report(self, kind: type[reports.Stepped | reports.Glanced]) -> None:
        last = self.optimizer.last_step
        progress, lr = self.schedules.at(self.step).at(self.step), float(self.scheduler.get_last_lr()[0])
        if kind is reports.Glanced and self.settings.budget:  # before there is a schedule by the clock
            progress = max(progress, min(1.0, self.elapsed / self.settings.budget))
        self.meter.report(kind, self.step, lr, last.grad_norm if last else None, self.elapsed, progress)

    def _doing(self, what: str) -> None:
        """Let the user know why no step is taken."""
        reports.say(reports.Doing(self.ps.rank, what))

    def validate(self, whole: bool, final: bool = False) -> None:
        """This rank's share; the launcher adds them up."""
        self.optimizer.synchronize()
        elapsed = self.elapsed
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._precision():
            sums = add(self.task.measure(self.model, batch) for batch in self.task.held_out(whole))
        self.model.train(was_training)
        reports.say(reports.Validated(self.ps.rank, self.step, elapsed, sums, final))

    def _save(self) -> None:
        """Under ``Stale`` and ``Async`` the others go on meanwhile: values and state may be some pushes apart."""
        s = self.settings
        progress = self.schedules.at(self.step).at(self.step)
        state = State(step=self.step, elapsed=self.elapsed, progress=progress, seed=s.seed, settings=s)
        checkpoint.save(self.folder, self.model, self.optimizer.state_dict(), state, self.task.write)
        reports.say(reports.Saved(self.step))

    def _finish(self, reason: Literal["done", "stopped"]) -> None:
        """``reason``: the schedule's, the same for all. Who is told to stop when the end is reached stops there."""
        elapsed, s = self.elapsed, self.settings
        self.optimizer.synchronize()
        if s.publish_every and self.step % s.publish_every:
            self._publish()
        self._settle()
        self._doing("waiting for the other workers")
        table = self.ps.tables[checkpoint.TABLE]
        self._meet(_END)
        table.pull().wait()  # under Stale and Async: what the others pushed last
        difference = None
        if self.ps.rank == 0:
            self._doing("saving")
            self._save()
            difference = self.task.verify(self.model) if reason == "done" else None
        if reason == "done":
            self._doing("validating on all held-out data")
            self.validate(whole=True, final=True)
        self._meet(_END)
        reports.say(reports.Finished(self.ps.rank, self.step, elapsed, reason, difference))


class Meter:
    """Means and rates between two reports. ``said``: when there was the last."""

    def __init__(self, ps: headwater.Client, now: float) -> None:
        self._ps = ps
        self._losses: list[float] = []
        self._seen = 0
        self._since = self.said = now
        self._pushed = self._pulled = 0

    def add(self, taken: Step) -> None:
        """A step."""
        self._losses.append(taken.loss)
        self._seen += taken.seen

    def report(
        self,
        kind: type[reports.Stepped | reports.Glanced],
        step: int,
        lr: float,
        norm: float | None,
        elapsed: float,
        progress: float,
    ) -> None:
        """Say what happened since the last ``Stepped``."""
        self.said = now = time.monotonic()
        seen = self._ps.statistics()
        seconds = max(now - self._since, 1e-9)
        reports.say(
            kind(
                self._ps.rank,
                step,
                sum(self._losses) / max(1, len(self._losses)),
                lr,
                self._seen / seconds,
                (seen.pushed_bytes - self._pushed) / seconds,
                (seen.pulled_bytes - self._pulled) / seconds,
                seen.staleness_last,
                norm,
                elapsed,
                progress,
            )
        )
        if kind is reports.Glanced:
            return
        self._losses, self._seen, self._since = [], 0, now
        self._pushed, self._pulled = seen.pushed_bytes, seen.pulled_bytes


def main(recipe: Recipe[Any], folder: Path) -> None:
    """Train in the run folder, as the rank that the environment says."""
    interrupted = False
    worker: Trainer[Any] | None = None

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        if worker is not None:
            worker.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # who is in a hurry sends SIGKILL
        signal.signal(number, interrupt)
    with headwater.connect() as ps:
        reports.say(reports.Doing(ps.rank, "loading the model"))
        worker = Trainer(recipe, folder, ps)
        worker.stopping = interrupted
        try:
            worker.run()
        except headwater.DiskFull as error:
            sys.exit(f"headwater.errors.DiskFull: {error}")
        worker.optimizer.close()


def takes_bfloat16(settings: Training) -> bool:
    """Whether the matrix products of a run are made in bfloat16 on this machine."""
    return settings.precision == "bfloat16" or (settings.precision == "auto" and fast_bfloat16())


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones (AMX, AVX-512 or Arm BF16)."""
    flags: set[str] = set()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags.update(value.split())
                break
    return not flags.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})
