"""The launching process of a run: make the folder ready, start and watch the processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any, Generic, cast

import msgspec
from rich.console import Console

import headwater
from headwater import launch
from headwater.errors import DataError, DiskFull, HeadwaterError
from headwater_recipes.common import checkpoint, claim, display, metrics, reports, schedule, settings
from headwater_recipes.common.board import Board
from headwater_recipes.common.options import fields
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.settings import AnySettings, State
from headwater_recipes.common.stages import say, stage
from headwater_recipes.common.task import Ended

REPORT = "report.json"
"""The figures of a run that has come to its end."""
_STATUS_EVERY = 1.0
RESTARTS = 3
"""How often each worker of an elastic run is started again. One that dies more often would go on to."""


def prepare(recipe: Recipe[AnySettings], wanted: AnySettings, run: Path | None, console: Console) -> Path:
    """Make the folder of a new run, with all that its workers need.

    Raises:
        DataError: the data cannot be used, or the folder holds something. UsageError: a setting that cannot work.
    """
    wanted.check()
    if not checkpoint.free(run):
        checkpoint.new_folder(recipe.name, run)  # raises: says what is wrong, before any work is done
    fill = recipe.load().prepare(wanted, console)
    with checkpoint.making(recipe.name, run) as folder:
        fill(folder)
        checkpoint.begin(recipe, folder, wanted)
    return folder


def resume(recipe: Recipe[AnySettings], run: Path | None, changes: dict[str, Any]) -> Path:
    """Make a run's folder ready to go on from its newest checkpoint (or from the start), with changed settings.

    The folder is this process's from then on, until its ``Job`` has run.

    Raises:
        DataError: nothing to go on from, a setting that is fixed, or a run that has reached its end.
        RunInUse: another process works in it. DiskFull: no room for the settings; they are as they were.
    """
    folder = checkpoint.find_folder(recipe, run, begun=True)
    fresh = claim.claim(folder)
    try:
        checkpoint.sweep(folder)
        _go_on(recipe, folder, changes)
    except BaseException:
        if fresh:
            claim.release(folder)
        raise
    return folder


def _go_on(recipe: Recipe[AnySettings], folder: Path, changes: dict[str, Any]) -> None:
    state = checkpoint.read_state(checkpoint.newest(folder) or folder, recipe.settings)
    for field in fields(recipe.settings):
        began = getattr(state.settings, field.name)
        if field.option.fixed and changes.get(field.name, began) != began:
            raise DataError(
                f"{folder} was begun with {field.name}={began!r}, which cannot change on the way. "
                f"Nothing was changed; leave the option out, or start a new run."
            )
    if "steps" in changes:
        changes = {"minutes": None, **changes}
    elif "minutes" in changes:
        changes = {"steps": None, **changes}
    wanted = msgspec.structs.replace(state.settings, **changes)
    wanted.check()
    if _over(state, wanted) and (folder / REPORT).is_file():  # else it was ended before it was judged
        raise DataError(
            f"{folder} has reached its end (step {state.step}, {state.elapsed / 60:.1f} minutes). Nothing was changed; "
            f"to train on, give a greater total: --steps or --minutes."
        )
    checkpoint.begin(recipe, folder, wanted)  # progress stands in the checkpoint
    metrics.write_rows(folder, metrics.read_rows(folder, upto=state.step))


def _over(state: State[AnySettings], wanted: AnySettings) -> bool:
    if wanted.steps is not None:
        return state.step >= wanted.steps
    return wanted.budget is not None and state.elapsed >= wanted.budget


class Job(Generic[AnySettings]):
    """One launch of a run whose folder is ready.

    ``restore``: a snapshot of the cluster to begin with. ``only_rank0``: of what other workers write nothing is shown.
    Raises ``RunInUse`` if another process works in the folder.
    """

    def __init__(
        self,
        recipe: Recipe[AnySettings],
        folder: Path,
        console: Console,
        restore: Path | None = None,
        *,
        only_rank0: bool = False,
    ) -> None:
        self.recipe, self.folder, self.console, self.restore = recipe, folder, console, restore
        self.only_rank0 = only_rank0
        claim.claim(folder)
        checkpoint.sweep(folder)
        self.settings = checkpoint.read_state(folder, recipe.settings).settings
        self.task = recipe.load()
        self.board = Board(self.task, self.settings.workers, metrics.read_rows(folder))
        self.display: display.Display | None = None
        self._incomplete: set[str] = set()
        console.file = cast("IO[str]", launch.Sturdy(console.file, self._deaf))
        for name in (schedule.NAME, schedule.ASKED, schedule.BEGUN, REPORT):  # an earlier launch's, with its stop
            (folder / name).unlink(missing_ok=True)

    def run(self) -> int:
        """Train; returns the exit code. The folder is free for others then."""
        try:
            return self._run()
        finally:
            claim.release(self.folder)

    def _run(self) -> int:
        s = self.settings
        self.launcher = launcher = launch.Launcher(
            launch.Shape(s.servers, restore=self.restore, **settings.cluster(s)),
            rules=launch.Rules(
                patience=self.recipe.patience, elastic=s.elastic, restart_workers=RESTARTS if s.elastic else 0
            ),
            on_line=self._line,
            on_exit=self._exited,
            on_note=self._note,
            once=True,
            only_rank0=self.only_rank0,
        )
        try:
            with launcher.signals(), contextlib.ExitStack() as cluster:
                with stage(self.console, f"starting {s.servers} server{'' if s.servers == 1 else 's'}"):
                    cluster.enter_context(launcher)
                self.display = display.make(self.console, self.recipe.wording)
                command = [sys.executable, "-m", "headwater_recipes.common.worker", self.recipe.task, str(self.folder)]
                launcher.start_workers(command, s.workers)
                self._watch(launcher)
                outcome = launcher.outcome
        finally:
            if self.display is not None:
                self.display.close()
        if self._trained():
            try:
                self._report()
            except OSError as error:
                told = f"the run came to its end and its model is in {self.folder}; the report is not whole: {error}"
                raise (DiskFull if checkpoint.full(error) else DataError)(told) from None
            return 0
        return self._explain(outcome)

    def _trained(self) -> bool:
        return self.board.final is not None and len(self.board.finished) == self.settings.workers

    def _watch(self, launcher: launch.Launcher) -> None:
        assert self.display is not None
        with contextlib.ExitStack() as stack:
            reader, cluster, asked = self._reader(launcher, stack), None, 0.0
            told = False
            while launcher.poll(0.25):
                if launcher.outcome.interrupted and not told:
                    told = True
                    self.display.note(self._stopping(launcher.outcome.code))
                if reader is not None and time.monotonic() - asked >= _STATUS_EVERY:
                    asked = time.monotonic()
                    with contextlib.suppress(HeadwaterError):
                        cluster = reader.status()
                self.display.update(self.board, cluster)
            self.display.update(self.board, cluster)

    def _stopping(self, code: int) -> str:
        again = "another Ctrl-C" if code == 128 + signal.SIGINT else "another signal"
        if not self.board.started:
            return f"stopping: no step was taken yet, so there is nothing to save; {again} does not wait"
        return f"stopping: the workers end their step and save; {again} does not wait"

    def _reader(self, launcher: launch.Launcher, stack: contextlib.ExitStack) -> headwater.Client | None:
        """A client that only looks."""
        before = {name: os.environ.get(name) for name in launcher.environment()}
        os.environ.update(launcher.environment())
        try:
            return stack.enter_context(headwater.connect(role="reader", timeout=5.0))
        except HeadwaterError:
            return None
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def _note(self, text: str) -> None:
        """What the launcher says: a server died, another took its place."""
        if self.display is not None:
            self.display.note(f"headwater: {text}")
        self._append("events.jsonl", {"time": round(time.time(), 3), "event": text})

    def _exited(self, process: launch.Process) -> None:
        """Of an elastic run: what was said of the steps of a worker that died is all that there will be."""
        if process.role != "worker" or not process.returncode or not self.settings.elastic:
            return
        for row in self.board.lost(process.rank):
            self._append("metrics.jsonl", row)
        if process.restarts >= RESTARTS and not process.signalled:
            self._note(f"{process.name} has died {process.restarts + 1} times; the others are told to save and to end")
            self.launcher.terminate()

    def _deaf(self, error: OSError) -> None:
        """Nobody sees any more what is shown. A closed pipe ends the job as SIGTERM does, anything else does not."""
        if not any(worker.running for worker in self.launcher.workers):
            return
        ends = isinstance(error, BrokenPipeError)
        what = "the workers are told to end their step and save" if ends else "training goes on"
        Console(file=cast("IO[str]", launch.Sturdy("stderr")), highlight=False).print(
            f"headwater: what this command prints is lost from here on ({error.strerror}); {what}", soft_wrap=True
        )
        if ends:
            self.launcher.terminate()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """One more line of a record. Training does not end for the lack of it."""
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            if self.display is not None and name not in self._incomplete:
                self.display.note(f"{name} is incomplete from here on, and training goes on: {error.strerror}")
            self._incomplete.add(name)

    def _line(self, process: launch.Process, stream: str, line: str) -> None:
        report = reports.hear(line) if process.role == "worker" and stream == "stdout" else None
        if report is None:
            # A worker that the signal met while it was still importing has nothing to say that the user does not know.
            shown = process.rank == 0 or process.role != "worker" or not self.only_rank0
            if shown and self.display is not None and not self.launcher.outcome.interrupted:
                self.display.note(f"{process.name}: {line}", whole=True)
            return
        row = self.board.hear(report)
        if row is not None:
            self._append("metrics.jsonl", row)

    # ---- the end -----------------------------------------------------------------------------------

    def _report(self) -> None:
        """The run came to its end: say what came of it."""
        done, sums = self.board.finished[0], self.board.final
        assert sums is not None
        rows = self.board.rows
        ended = Ended(done.step, round(done.elapsed, 1), sums, self.task.metrics(sums), rows, done.difference)
        task = self.task(self.settings, self.folder)
        figures = {"step": ended.step, "training_seconds": ended.seconds, **task.figures(ended)}
        checkpoint.write_json(self.folder / REPORT, figures)
        metrics.plot(self.folder, rows, self.recipe.wording, task.baseline(figures))
        say(self.console, "")
        task.tell(ended, figures, self.console)

    def _explain(self, outcome: launch.Outcome) -> int:
        """A run that did not come to its end."""
        found = checkpoint.newest(self.folder)
        rows = self.board.rows
        if rows:
            with contextlib.suppress(OSError):  # a picture; what went wrong is said below
                metrics.plot(self.folder, rows, self.recipe.wording)
        if outcome.code == 0 or outcome.interrupted:
            say(self.console, "stopped" if outcome.interrupted else "the workers ended before the run did")
        else:
            if not outcome.shown:
                say(self.console, f"--- the last words of {outcome.failed}:\n{outcome.last_words}", whole=True)
            say(self.console, f"the run failed: {outcome.message}")
        if outcome.interrupted and self.board.started and len(self.board.finished) < self.settings.workers:
            say(self.console, "the workers were ended before they had saved their last steps")
        if found is not None:
            say(self.console, f"step {int(found.name)} is saved in {self.folder}")
        else:
            say(self.console, f"no step is saved yet; {self.folder} holds {self.recipe.wording.prepared}")
        say(self.console, f"go on: {self.recipe.typed} --run {self.folder} --resume", whole=True)
        return outcome.code or 1
