"""The launching process: one run with real servers and workers, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from headwater.errors import DataError
from headwater.launch import Process
from headwater_recipes.common import checkpoint, job, metrics
from headwater_recipes.common.settings import State
from headwater_recipes.lm.settings import RECIPE, LmSettings
from tests.recipes.conftest import TINY, write_corpus


class _Impatient(job.Job[LmSettings]):
    """Presses Ctrl-C when the first row of metrics is there."""

    def _line(self, process: Process, stream: str, line: str) -> None:
        before = len(self.board.rows)
        super()._line(process, stream, line)
        if len(self.board.rows) > before == 0:
            signal.raise_signal(signal.SIGINT)


def test_two_workers_and_two_servers_train_stop_and_go_on(run: Path) -> None:
    state = checkpoint.read_state(run, LmSettings)
    settings = msgspec.structs.replace(state.settings, workers=2, servers=2, steps=None, minutes=10.0, log_every=5)
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))
    out = io.StringIO()
    stopped = _Impatient(RECIPE, run, Console(file=out, width=200))
    assert stopped.run() == 130
    assert all(worker.returncode == 0 for worker in stopped.launcher.workers)
    found = checkpoint.newest(run)
    assert found is not None
    step = checkpoint.read_state(found, LmSettings).step
    assert f"stopped\nstep {step} is saved in {run}\n" in out.getvalue()
    assert out.getvalue().count("the workers end their step and save") == 1
    assert "Traceback" not in out.getvalue()

    job.resume(RECIPE, run, {"steps": step + 10})
    out = io.StringIO()
    assert job.Job(RECIPE, run, Console(file=out)).run() == 0, out.getvalue()
    assert "bits per byte" in out.getvalue()
    assert "AutoModelForCausalLM.from_pretrained gives the same logits" in out.getvalue()
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == step + 10
    assert report["largest_logit_difference_of_saved_model"] < 1e-5
    rows = metrics.read_rows(run)
    assert [row["step"] for row in rows] == [*range(5, step + 11, 5), step + 10]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "sample.txt").read_text(encoding="utf-8").strip()
    loaded = AutoModelForCausalLM.from_pretrained(run)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    with pytest.raises(DataError, match="has reached its end"):
        job.resume(RECIPE, run, {})


class _Told(job.Job[LmSettings]):
    """Gets a signal when the first row of metrics is there: alone, or as all processes of it do (Slurm, systemd)."""

    number, everybody, times = signal.SIGTERM, False, 1

    def _line(self, process: Process, stream: str, line: str) -> None:
        before = len(self.board.rows)
        super()._line(process, stream, line)
        if len(self.board.rows) > before == 0:
            others = [self.launcher.coordinator, *self.launcher.servers, *self.launcher.workers]
            if self.everybody:  # and not by the launcher, whose word counts at once
                subprocess.run(["kill", f"-{self.number:d}", *(str(p.pid) for p in others if p)], check=True)
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "everybody"), [(signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_a_run_that_is_told_to_end_saves_its_last_step(run: Path, number: signal.Signals, everybody: bool) -> None:
    _endless(run, workers=2)
    out = io.StringIO()
    told = _Told(RECIPE, run, Console(file=out, width=200))
    told.number, told.everybody = number, everybody
    told.times = 3 if number == signal.SIGHUP else 1  # kernel, shell and session each say it
    assert told.run() == 128 + number
    processes = [told.launcher.coordinator, *told.launcher.servers, *told.launcher.workers]
    assert [process.returncode for process in processes if process] == [0] * 4, [
        process.last_words for process in processes if process
    ]
    found = checkpoint.newest(run)
    assert found is not None
    step = checkpoint.read_state(found, LmSettings).step
    assert step == told.board.finished[0].step == told.board.finished[1].step
    assert f"stopped\nstep {step} is saved in {run}\n" in out.getvalue()
    assert out.getvalue().count("the workers end their step and save; another signal does not wait") == 1
    job.resume(RECIPE, run, {"steps": step + 2})
    assert checkpoint.read_state(run, LmSettings).settings.steps == step + 2


def test_a_second_signal_ends_at_once_and_nothing_is_claimed(run: Path) -> None:
    _endless(run, workers=1)
    out = io.StringIO()
    told = _Told(RECIPE, run, Console(file=out, width=200))
    told.times = 2
    assert told.run() == 143
    assert told.launcher.workers[0].returncode == 128 + signal.SIGKILL
    assert "the workers were ended before they had saved their last steps" in out.getvalue()
    assert "no step is saved yet" in out.getvalue()


def _endless(run: Path, workers: int) -> None:
    state = checkpoint.read_state(run, LmSettings)
    settings = msgspec.structs.replace(state.settings, workers=workers, steps=None, minutes=10.0, log_every=2)
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))


class _Killer(job.Job[LmSettings]):
    """Kills a server with SIGKILL when the first row of metrics is there."""

    def _line(self, process: Process, stream: str, line: str) -> None:
        before = len(self.board.rows)
        super()._line(process, stream, line)
        if len(self.board.rows) > before == 0:
            os.kill(self.launcher.servers[0].pid, signal.SIGKILL)


def test_a_server_is_killed_and_training_goes_on(run: Path) -> None:
    state = checkpoint.read_state(run, LmSettings)
    settings = msgspec.structs.replace(
        state.settings, workers=2, servers=2, replicas=2, steps=60, minutes=None, log_every=5
    )
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))
    out = io.StringIO()
    killer = _Killer(RECIPE, run, Console(file=out, width=200))
    assert killer.run() == 0, out.getvalue()
    assert "was killed by SIGKILL; its shards go on elsewhere" in out.getvalue()
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "was killed by SIGKILL" in events[0]
    steps = [row["step"] for row in metrics.read_rows(run) if row["kind"] == "step"]
    assert steps == list(range(5, 61, 5))
    assert "gives the same logits" in out.getvalue()


def _checkpoint(run: Path, settings: LmSettings, step: int = 10, elapsed: float = 30.0) -> None:
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    checkpoint.write_json(folder / "trainer.json", State(step=step, elapsed=elapsed, settings=settings))


def test_going_on_changes_what_may_change_and_forgets_what_was_not_saved(tmp_path: Path) -> None:
    _checkpoint(tmp_path, LmSettings(minutes=1.0))
    rows = [{"kind": "step", "step": step, "loss": 1.0} for step in (5, 10, 15)]
    metrics.write_rows(tmp_path, rows)
    job.resume(RECIPE, tmp_path, {"lr": 5e-4, "steps": 40})
    settings = checkpoint.read_state(tmp_path, LmSettings).settings
    assert (settings.lr, settings.steps, settings.minutes) == (5e-4, 40, None)
    assert metrics.read_rows(tmp_path) == rows[:2]
    with pytest.raises(DataError, match="seq=128, which cannot change"):
        job.resume(RECIPE, tmp_path, {"seq": 64})
    (tmp_path / job.REPORT).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="has reached its end"):
        job.resume(RECIPE, tmp_path, {"minutes": 0.4})


def test_nothing_is_made_when_the_text_cannot_be_used(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    quiet = Console(quiet=True)
    with pytest.raises(DataError, match="too few for windows"):
        job.prepare(RECIPE, LmSettings(data=(str(corpus),), **{**TINY, "seq": 9999}), tmp_path / "run", quiet)
    with pytest.raises(DataError, match="no such file"):
        job.prepare(RECIPE, LmSettings(data=(str(tmp_path / "none"),), **TINY), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="not empty"):
        job.prepare(RECIPE, LmSettings(data=(str(corpus),), **TINY), corpus, quiet)


def test_a_run_that_ended_before_it_was_judged_is_judged(run: Path) -> None:
    """Say by a second Ctrl-C: its last step is saved, its report is not written."""
    state = checkpoint.read_state(run, LmSettings)
    settings = msgspec.structs.replace(state.settings, workers=2, steps=None, minutes=0.02)
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))
    assert job.Job(RECIPE, run, Console(quiet=True)).run() == 0
    trained = (run / "model.safetensors").read_bytes()
    report = json.loads((run / job.REPORT).read_bytes())
    with pytest.raises(DataError, match="has reached its end"):
        job.resume(RECIPE, run, {})
    (run / job.REPORT).unlink()
    job.resume(RECIPE, run, {})
    assert job.Job(RECIPE, run, Console(quiet=True)).run() == 0
    again = json.loads((run / job.REPORT).read_bytes())
    assert (again["step"], again["validation_loss"]) == (report["step"], report["validation_loss"])
    assert (run / "model.safetensors").read_bytes() == trained


@pytest.mark.parametrize("only_rank0", [False, True])
def test_workers_that_fail_alike_show_one_traceback(run: Path, only_rank0: bool) -> None:
    state = checkpoint.read_state(run, LmSettings)
    settings = msgspec.structs.replace(state.settings, workers=2)
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))
    (run / "tokens" / "training.npy").write_bytes(b"none")
    out = io.StringIO()
    failed = job.Job(RECIPE, run, Console(file=out, width=200), only_rank0=only_rank0)
    assert failed.run() == 1
    text = out.getvalue()
    assert text.count("self.arrays = tokenizer.load_arrays(folder)") == 1, text
    assert "headwater.errors.DataError: " in text
    assert "the run failed: w" in text
    assert "exited with code 1" in text
    assert text.startswith("starting 1 server …\nstarting the workers: they load torch …\n")


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st', encoding="utf-8")
    assert metrics.read_rows(tmp_path) == [{"kind": "step", "step": 1}]
