"""What every worker process of the run does: ``python -m headwater_recipes.lm.worker RUN``.

A plain PyTorch training loop; only the optimizer's line knows of servers. Rank and cluster come from the environment
(docs/environment.md), settings from the run folder. After SIGINT all workers stop at the same step: the one that
rank 0 chose.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.nn import functional as F

import headwater
from headwater_recipes.lm import checkpoint, evaluate, model, reports, tokenizer
from headwater_recipes.lm.plan import Pace, Plan, PlanFile, factor
from headwater_recipes.lm.settings import MINUTES, State, parse_sync
from headwater_recipes.lm.windows import Windows

PERIODIC = 64
"""Windows of a periodic validation, over all workers; the final one takes the whole held-out text."""


class Worker:
    """One rank's training. ``ps`` is its client; ``folder`` a run folder that ``job.prepare`` made."""

    def __init__(self, folder: Path, ps: headwater.Client) -> None:
        self.folder, self.ps = folder, ps
        self.stopping = False
        found = checkpoint.newest(folder)
        asked = checkpoint.read_state(folder)
        self.start = asked if found is None else checkpoint.read_state(found)
        self.settings = s = asked.settings
        self.step = self.start.step
        self.arrays = tokenizer.load_arrays(folder)
        self.bfloat16 = s.precision == "bfloat16" or (s.precision == "auto" and model.fast_bfloat16())
        self.windows = Windows(self.arrays.training, s.seq, s.batch, ps.rank, ps.world, s.seed)
        self._build(found)
        self._schedule()
        self.begun = time.monotonic()
        self.meter = Meter(ps, self.begun)

    def _build(self, found: Path | None) -> None:
        s = self.settings
        if found is None:
            self.model = model.empty(model.config(s.preset, len(self.arrays.lengths), s.seq))
        else:
            self.model = model.load(found)
        self.optimizer = headwater.Optimizer(
            self.model,
            torch.optim.AdamW,
            params=model.groups(self.model, s.weight_decay),
            lr=s.lr,
            betas=s.betas,
            sync=parse_sync(s.sync),
            max_grad_norm=s.max_grad_norm,
            init=model.initialisers() if found is None else None,
            seed=s.seed,
            client=self.ps,
        )
        if found is not None:
            self.optimizer.load_state_dict(checkpoint.load_optimizer(found))
            for group in self.optimizer.param_groups:
                group["initial_lr"] = s.lr
        self.ps.barrier("ready")  # nobody pushes while another still writes state

    def _schedule(self) -> None:
        s, start = self.settings, self.start
        budget = None
        if s.steps is not None:
            first = Plan(start.step, start.step / s.steps, 1 / s.steps, s.steps)
        else:
            budget = 60 * (s.minutes or MINUTES)
            first = Plan(start.step, min(1.0, start.elapsed / budget), 0.0)
        self.pace = Pace(first, budget)
        self.plans = PlanFile(self.folder, first)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda taken: factor(
                self.plans.at(start.step + taken).at(start.step + taken), start.step + taken, s.warmup
            ),
        )

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier parts of the run included."""
        return self.start.elapsed + time.monotonic() - self.begun

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the plan says stop, then save, verify and validate."""
        size = sum(p.numel() for p in self.model.parameters())
        precision = "bfloat16" if self.bfloat16 else "float32"
        reports.say(reports.Started(self.ps.rank, self.step, size, precision))
        self.model.train()
        while not self._over():
            loss = self._train_step()
            self.step += 1
            self._after_step(loss)
        self._finish()

    def _over(self) -> bool:
        """Follow the plan, which rank 0 makes."""
        if self.ps.rank == 0:
            decided = self.pace.decide(self.step, self.elapsed, self.stopping)
            if decided is not None:
                self.plans.publish(decided)
        stop = self.plans.at(self.step).stop
        return stop is not None and self.step >= stop

    def _train_step(self) -> float:
        inputs_bt, targets_bt = self.windows.batch(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            logits_btv = self.model(input_ids=inputs_bt, use_cache=False).logits
        loss = F.cross_entropy(logits_btv.float().flatten(0, 1), targets_bt.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _after_step(self, loss: float) -> None:
        s = self.settings
        self.meter.add(loss, s.batch * s.seq)
        if self.step % s.log_every == 0:
            self._report()
        if self.step % s.validate_every == 0:
            self._validate(PERIODIC)
        if self.step % s.save_every == 0 and self.ps.rank == 0:
            self._save()

    def _report(self) -> None:
        last = self.optimizer.last_step
        progress = self.plans.at(self.step).at(self.step)
        self.meter.report(
            self.step, float(self.scheduler.get_last_lr()[0]), last.grad_norm if last else None, self.elapsed, progress
        )

    def _validate(self, most: int | None) -> None:
        """This rank's share of the windows; the launcher adds them up."""
        self.optimizer.synchronize()
        length = evaluate.fits(self.arrays, self.settings.seq)
        places = evaluate.starts(self.arrays, length, most)[self.ps.rank :: self.ps.world]
        elapsed = self.elapsed
        found = evaluate.score(self.model, self.arrays, places, length, self.bfloat16)
        reports.say(reports.Validated(self.ps.rank, self.step, elapsed, *found, final=most is None))

    def _save(self) -> Path:
        """Under ``Stale`` and ``Async`` the others go on meanwhile: values and state may be some pushes apart."""
        s = self.settings
        progress = self.plans.at(self.step).at(self.step)
        state = State(step=self.step, elapsed=self.elapsed, progress=progress, seed=s.seed, settings=s)
        path = checkpoint.save(self.folder, self.model, self.optimizer.state_dict(), state)
        reports.say(reports.Saved(self.step))
        return path

    def _finish(self) -> None:
        elapsed = self.elapsed
        self.optimizer.synchronize()
        table = self.ps.tables["model"]
        if isinstance(table.spec.sync, headwater.Async):
            # Under a staleness cap the others wait for every worker that has read and not pushed since. An empty
            # step that reads nothing says that this one is not computing any more.
            table.push_step([], want=False).wait()
        self.ps.barrier("trained")
        table.pull().wait()  # under Stale and Async: what the others pushed last
        difference = None
        if self.ps.rank == 0:
            self._save()
            difference = self._verify()
        if not self.stopping:
            self._validate(None)
        self.ps.barrier("validated")
        reason: Literal["done", "stopped"] = "stopped" if self.stopping else "done"
        reports.say(reports.Finished(self.ps.rank, self.step, elapsed, reason, difference))

    def _verify(self) -> float:
        """The largest difference between this model's logits and those of the model that the run folder holds."""
        saved = cast(Any, model.load(self.folder))
        length = evaluate.fits(self.arrays, self.settings.seq)
        inputs_bt = torch.from_numpy(self.arrays.validation[:length].astype("int64"))[None]
        cast(Any, self.model).eval()
        with torch.no_grad():
            ours = self.model(input_ids=inputs_bt, use_cache=False).logits
            theirs = saved.eval()(input_ids=inputs_bt, use_cache=False).logits
        return float((ours - theirs).abs().max())


class Meter:
    """Means and rates between two reports."""

    def __init__(self, ps: headwater.Client, now: float) -> None:
        self._ps = ps
        self._losses: list[float] = []
        self._tokens = 0
        self._since = now
        self._pushed = self._pulled = 0

    def add(self, loss: float, tokens: int) -> None:
        """A step."""
        self._losses.append(loss)
        self._tokens += tokens

    def report(self, step: int, lr: float, norm: float | None, elapsed: float, progress: float) -> None:
        """Say what happened since the last report."""
        now, seen = time.monotonic(), self._ps.statistics()
        seconds = max(now - self._since, 1e-9)
        reports.say(
            reports.Stepped(
                self._ps.rank,
                step,
                sum(self._losses) / max(1, len(self._losses)),
                lr,
                self._tokens / seconds,
                (seen.pushed_bytes - self._pushed) / seconds,
                (seen.pulled_bytes - self._pulled) / seconds,
                seen.staleness_last,
                norm,
                elapsed,
                progress,
            )
        )
        self._losses, self._tokens, self._since = [], 0, now
        self._pushed, self._pulled = seen.pushed_bytes, seen.pulled_bytes


def main(folder: Path) -> None:
    """Train in the run folder, as the rank that the environment says."""
    interrupted = False
    worker: Worker | None = None

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        if worker is not None:
            worker.stopping = True

    signal.signal(signal.SIGINT, interrupt)
    model.quiet()
    with headwater.connect() as ps:
        worker = Worker(folder, ps)
        worker.stopping = interrupted
        worker.run()
        worker.optimizer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
