"""The launching process of a run: prepare the folder, start and watch the processes, write the report."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

import headwater
from headwater import launch
from headwater.errors import DataError, HeadwaterError
from headwater_recipes.lm import checkpoint, corpus, display, finish, reports, settings, tokenizer
from headwater_recipes.lm.board import Board
from headwater_recipes.lm.settings import Settings, State
from headwater_recipes.lm.windows import Windows

_STATUS_EVERY = 1.0
_PATIENCE = 60.0
"""Seconds that the workers get after Ctrl-C to end their step and save."""
_SAME = 1e-4
"""Logits of the saved model may differ by this much from those in training: another order of summation."""


def prepare(wanted: Settings, run: Path | None, console: Console) -> Path:
    """Make the run folder: tokenizer, token arrays and settings.

    Raises:
        DataError: the corpus cannot be used, or the folder holds something. UsageError: a setting that cannot work.
    """
    settings.check(wanted)
    folder_free = run is None or not run.exists() or (run.is_dir() and not any(run.iterdir()))
    if not folder_free:
        checkpoint.new_folder(run)  # says what is wrong, before any work is done
    begun = time.monotonic()
    texts = corpus.from_paths([Path(p) for p in wanted.data]) if wanted.data else corpus.standard_library()
    made = tokenizer.train(texts, wanted.vocabulary)
    arrays = tokenizer.Arrays(
        tokenizer.encode(made, texts.training), tokenizer.encode(made, texts.validation), tokenizer.byte_lengths(made)
    )
    Windows(arrays.training, wanted.seq, wanted.batch, 0, wanted.workers, wanted.seed)  # raises if there are too few
    folder = checkpoint.new_folder(run)
    tokenizer.save(folder, made, arrays)
    checkpoint.write_json(folder / "trainer.json", State(seed=wanted.seed, settings=wanted))
    source = "given" if wanted.data else "the standard library"
    skipped = f", {texts.skipped} binary files skipped" if texts.skipped else ""
    console.print(
        f"corpus: {source}, {len(texts.training)} files to train on, {len(texts.validation)} held out{skipped}; "
        f"{texts.nbytes / 1e6:.1f} MB in {(len(arrays.training) + len(arrays.validation)) / 1e6:.2f} M tokens of "
        f"{len(arrays.lengths)} ({time.monotonic() - begun:.1f} s)",
        soft_wrap=True,
        highlight=False,
    )
    return folder


def resume(run: Path | None, changes: dict[str, Any]) -> Path:
    """Make a run's folder ready to go on from its newest checkpoint (or from the start), with changed settings.

    Raises:
        DataError: nothing to go on from, a setting that is fixed, or a run that has reached its end.
    """
    folder = checkpoint.find_folder(run, begun=True)
    state = checkpoint.read_state(checkpoint.newest(folder) or folder)
    for name in settings.FIXED:
        if name in changes and changes[name] != getattr(state.settings, name):
            raise DataError(
                f"{folder} was begun with {name}={getattr(state.settings, name)!r}, which cannot change on the way. "
                f"Nothing was changed; leave the option out, or start a new run."
            )
    if "steps" in changes:
        changes = {"minutes": None, **changes}
    elif "minutes" in changes:
        changes = {"steps": None, **changes}
    wanted = msgspec.structs.replace(state.settings, **changes)
    settings.check(wanted)
    if _over(state, wanted):
        raise DataError(
            f"{folder} has reached its end (step {state.step}, {state.elapsed / 60:.1f} minutes). Nothing was changed; "
            f"to train on, give a greater total: --steps or --minutes."
        )
    start = State(seed=wanted.seed, settings=wanted)  # progress stands in the checkpoint
    checkpoint.write_json(folder / "trainer.json", start)
    finish.write_rows(folder, finish.read_rows(folder, upto=state.step))
    return folder


def _over(state: State, wanted: Settings) -> bool:
    if wanted.steps is not None:
        return state.step >= wanted.steps
    return state.elapsed >= 60 * (wanted.minutes or settings.MINUTES)


class Job:
    """One launch of a run whose folder is ready.

    ``restore``: a snapshot of the cluster to begin with.
    """

    def __init__(self, folder: Path, console: Console, restore: Path | None = None) -> None:
        self.folder, self.console, self.restore = folder, console, restore
        self.settings = checkpoint.read_state(folder).settings
        self.board = Board(self.settings.workers, finish.read_rows(folder))
        self.display: display.Display | None = None
        self._metrics = folder / "metrics.jsonl"
        (folder / "plan.json").unlink(missing_ok=True)  # an earlier launch's, with its stop

    def run(self) -> int:
        """Train; returns the exit code."""
        s = self.settings
        self.launcher = launcher = launch.Launcher(
            s.servers,
            on_line=self._line,
            on_note=self._note,
            patience=_PATIENCE,
            restore=self.restore,
            **settings.cluster(s),
        )
        try:
            with launcher.signals(), launcher:
                self.display = display.make(self.console)
                command = [sys.executable, "-m", "headwater_recipes.lm.worker", str(self.folder)]
                launcher.start_workers(command, s.workers)
                self._watch(launcher)
                outcome = launcher.outcome
        finally:
            if self.display is not None:
                self.display.close()
        if self._trained():
            self._report()
            return 0
        return self._explain(outcome)

    def _trained(self) -> bool:
        return self.board.final is not None and len(self.board.finished) == self.settings.workers

    def _watch(self, launcher: launch.Launcher) -> None:
        assert self.display is not None
        with contextlib.ExitStack() as stack:
            reader, cluster, asked = self._reader(launcher, stack), None, 0.0
            while launcher.poll(0.25):
                if reader is not None and time.monotonic() - asked >= _STATUS_EVERY:
                    asked = time.monotonic()
                    with contextlib.suppress(HeadwaterError):
                        cluster = reader.status()
                self.display.update(self.board, cluster)
            self.display.update(self.board, cluster)

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
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": text}) + "\n")

    def _line(self, process: launch.Process, stream: str, line: str) -> None:
        report = reports.hear(line) if process.role == "worker" and stream == "stdout" else None
        if report is None:
            # A worker that Ctrl-C met while it was still importing has nothing to say that the user does not know.
            if self.display is not None and not self.launcher.outcome.interrupted:
                self.display.note(f"{process.name}: {line}")
            return
        row = self.board.hear(report)
        if row is not None:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    # ---- the end -----------------------------------------------------------------------------------

    def _report(self) -> None:
        s, say = self.settings, self._say
        found = finish.summary(self.folder, self.board, s.seq)
        finish.plot(self.folder, self.board.rows, found["unigram_loss"])
        say("")
        say(
            f"trained {found['step']} steps in {display.clock(found['training_seconds'])}; "
            f"on {found['validation_tokens']:,} held-out tokens:"
        )
        for name, beside in (("validation", ""), ("unigram", "   (the baseline: no context)")):
            bits, loss = found[f"{name}_bits_per_byte"], found[f"{name}_loss"]
            say(f"  {name:<12} {bits:.3f} bits per byte   loss {loss:.3f}{beside}")
        difference = found["largest_logit_difference_of_saved_model"]
        verdict = "gives the same logits" if difference <= _SAME else "DOES NOT give the same logits"
        say(f"  AutoModelForCausalLM.from_pretrained {verdict} (largest difference {difference:.1e})")
        say("")
        say(finish.sample(self.folder, finish.prompt_of(self.folder, s.data), s.seed))
        say("")
        say(f"{self.folder}: model.safetensors, config.json, tokenizer.json, metrics.jsonl, loss.png, report.json")
        say(f'go on writing: headwater generate --run {self.folder} --prompt "import os"')

    def _explain(self, outcome: launch.Outcome) -> int:
        """A run that did not come to its end."""
        found = checkpoint.newest(self.folder)
        rows = self.board.rows
        if rows:
            finish.plot(self.folder, rows)
        if outcome.code == 0 or outcome.interrupted:
            self._say("stopped" if outcome.interrupted else "the workers ended before the run did")
        else:
            self._say(f"the run failed: {outcome.message}")
        if found is not None:
            self._say(f"step {int(found.name)} is saved in {self.folder}")
        else:
            self._say(f"no step is saved yet; {self.folder} holds the text as tokens")
        self._say(f"go on: headwater train lm --run {self.folder} --resume")
        return outcome.code or 1

    def _say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)
