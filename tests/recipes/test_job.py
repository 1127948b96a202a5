"""The launching process: one run with real servers and workers, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from headwater.errors import DataError
from headwater_recipes.lm import checkpoint, finish, job
from headwater_recipes.lm.settings import Settings, State
from tests.recipes.conftest import TINY, write_corpus


def test_two_workers_and_two_servers_train_a_model_that_transformers_loads(run: Path) -> None:
    state = checkpoint.read_state(run)
    settings = msgspec.structs.replace(state.settings, workers=2, servers=2, steps=20, log_every=5)
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))
    out = io.StringIO()
    assert job.Job(run, Console(file=out)).run() == 0, out.getvalue()
    text = out.getvalue()
    assert "bits per byte" in text
    assert "AutoModelForCausalLM.from_pretrained gives the same logits" in text
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 20
    assert report["validation_bits_per_byte"] < 8
    assert [row["step"] for row in finish.read_rows(run)] == [5, 10, 15, 20, 20]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "sample.txt").read_text(encoding="utf-8").strip()
    loaded = AutoModelForCausalLM.from_pretrained(run)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    with pytest.raises(DataError, match="has reached its end"):
        job.resume(run, {})
    job.resume(run, {"steps": 30})
    assert checkpoint.read_state(run).settings.steps == 30


def _checkpoint(run: Path, settings: Settings, step: int = 10, elapsed: float = 30.0) -> None:
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    checkpoint.write_json(folder / "trainer.json", State(step=step, elapsed=elapsed, settings=settings))


def test_going_on_changes_what_may_change_and_forgets_what_was_not_saved(tmp_path: Path) -> None:
    _checkpoint(tmp_path, Settings(minutes=1.0))
    rows = [{"kind": "step", "step": step, "loss": 1.0} for step in (5, 10, 15)]
    finish.write_rows(tmp_path, rows)
    job.resume(tmp_path, {"lr": 5e-4, "steps": 40})
    settings = checkpoint.read_state(tmp_path).settings
    assert (settings.lr, settings.steps, settings.minutes) == (5e-4, 40, None)
    assert finish.read_rows(tmp_path) == rows[:2]
    with pytest.raises(DataError, match="seq=128, which cannot change"):
        job.resume(tmp_path, {"seq": 64})
    with pytest.raises(DataError, match="has reached its end"):
        job.resume(tmp_path, {"minutes": 0.4})


def test_nothing_is_made_when_the_text_cannot_be_used(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    quiet = Console(quiet=True)
    with pytest.raises(DataError, match="too few for windows"):
        job.prepare(Settings(data=(str(corpus),), **{**TINY, "seq": 9999}), tmp_path / "run", quiet)
    with pytest.raises(DataError, match="no such file"):
        job.prepare(Settings(data=(str(tmp_path / "none"),), **TINY), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="not empty"):
        job.prepare(Settings(data=(str(corpus),), **TINY), corpus, quiet)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st', encoding="utf-8")
    assert finish.read_rows(tmp_path) == [{"kind": "step", "step": 1}]
