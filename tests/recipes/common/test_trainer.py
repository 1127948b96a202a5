"""The training loop, in this process: worker and servers."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import headwater
from headwater_recipes.common import checkpoint, reports, schedule
from headwater_recipes.common.trainer import Trainer
from headwater_recipes.lm.model import generate_text
from headwater_recipes.lm.settings import RECIPE, LmSettings
from tests.patience import PATIENCE


def _change(run: Path, **changes: Any) -> None:
    state = checkpoint.read_state(run, LmSettings)
    settings = msgspec.structs.replace(state.settings, **changes)
    checkpoint.write_json(run / "trainer.json", msgspec.structs.replace(state, settings=settings))


def _train(run: Path, *, stop: bool = False) -> None:
    with headwater.connect("inproc://", rank=0, world=1, servers=2) as ps:
        worker = Trainer(RECIPE, run, ps)
        worker.stopping = stop
        worker.run()
        worker.optimizer.close()


def _said(capsys: pytest.CaptureFixture[str]) -> list[reports.Report]:
    return [said for line in capsys.readouterr().out.splitlines() if (said := reports.hear(line)) is not None]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def test_a_run_says_what_it_does_and_learns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(run, steps=30, log_every=10, validate_every=20, save_every=20)
    _train(run)
    said = _said(capsys)
    steps = [each for each in said if isinstance(each, reports.Stepped)]
    assert [each.step for each in steps] == [10, 20, 30]
    figures = [each for each in said if isinstance(each, reports.Figures)]
    assert isinstance(figures[0], reports.Glanced)
    assert figures[0].step == 1  # nobody waits for ten steps to see one
    assert "saving" in [each.what for each in said if isinstance(each, reports.Doing)]
    assert steps[-1].loss < steps[0].loss - 0.5
    assert steps[-1].grad_norm is not None
    assert [each.final for each in said if isinstance(each, reports.Validated)] == [False, True]
    assert [each.step for each in said if isinstance(each, reports.Saved)] == [20, 30]
    assert isinstance(said[-1], reports.Finished)
    assert said[-1].reason == "done"
    assert said[-1].difference is not None
    assert said[-1].difference < 1e-5


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run: Path) -> None:
    whole = Path(shutil.copytree(run, run.with_name("whole")))
    _train(whole)
    _train(run, stop=True)
    assert checkpoint.read_state(checkpoint.newest(run) or run, LmSettings).step == 2
    (run / schedule.NAME).unlink()
    _train(run)
    assert checkpoint.read_state(checkpoint.newest(run) or run, LmSettings).step == 6
    expected, found = _weights(whole), _weights(run)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_checkpoint_that_has_no_room_does_not_end_the_training(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(run, steps=6, save_every=2)
    whole, tries = checkpoint.save, []

    def save(*given: Any) -> Path:
        tries.append(1)
        if len(tries) == 1:
            raise headwater.DiskFull("no room")
        return whole(*given)

    monkeypatch.setattr(checkpoint, "save", save)
    _train(run)
    heard = capsys.readouterr()
    assert "step 2 is not saved, and training goes on: no room" in heard.err
    said = [each for line in heard.out.splitlines() if (each := reports.hear(line)) is not None]
    assert [each.step for each in said if isinstance(each, reports.Saved)] == [4, 6, 6]
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(headwater.DiskFull("no room")))
    _change(run, steps=8, save_every=100)
    (run / schedule.NAME).unlink(missing_ok=True)
    with pytest.raises(headwater.DiskFull):  # the last one is what the run was for
        _train(run)


def test_any_worker_can_be_told_to_stop(run: Path) -> None:
    _change(run, steps=1000, workers=2)
    (run / "stop").touch()  # as rank 1 does
    _train(run)
    assert checkpoint.read_state(checkpoint.newest(run) or run, LmSettings).step == 2


def test_a_budget_of_time_ends_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(run, steps=None, minutes=1e-6)
    _train(run)
    finished = _said(capsys)[-1]
    assert isinstance(finished, reports.Finished)
    assert finished.step == 2


def test_who_is_told_to_stop_at_the_end_comes_to_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(run, steps=2)  # what is asked at a step takes effect two later
    _train(run, stop=True)
    said = _said(capsys)
    assert [each.final for each in said if isinstance(each, reports.Validated)] == [True]
    assert isinstance(said[-1], reports.Finished)
    assert (said[-1].step, said[-1].reason) == (2, "done")


def test_who_took_the_place_of_rank_0_saves_what_the_others_pushed_last(
    run: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    _change(run, sync="async", workers=2, steps=4, elastic=True)
    address, arrived, order = f"inproc://{request.node.name}", threading.Event(), list[str]()

    def other() -> None:
        with headwater.connect(address, rank=1, world=2, servers=2, timeout=PATIENCE) as ps:
            worker = Trainer(RECIPE, run, ps)
            batches = worker.task.batches

            def last_is_late(step: int) -> Any:
                if step == 3:
                    arrived.wait(PATIENCE)
                    order.append("rank 1 learns")
                return batches(step)

            monkeypatch.setattr(worker.task, "batches", last_is_late)
            worker.run()
            worker.optimizer.close()

    thread = threading.Thread(target=other)
    thread.start()
    with headwater.connect(address, rank=0, world=2, servers=2, timeout=PATIENCE) as ps:
        worker = Trainer(RECIPE, run, ps)
        worker.late = True
        meet, save = worker._meet, worker._save
        monkeypatch.setattr(worker, "_meet", lambda place: (arrived.set(), meet(place))[1])
        monkeypatch.setattr(worker, "_save", lambda: (order.append("rank 0 saves"), save())[1])
        worker.run()
        worker.optimizer.close()
    thread.join()
    assert order == ["rank 1 learns", "rank 0 saves"]


@pytest.mark.parametrize("sync", ["bulk", "stale:0", "stale:1", "async", "async:0", "async:2"])
def test_two_workers_end_together_under_every_policy(
    run: Path, sync: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    _change(run, sync=sync, workers=2, steps=7)
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            address = f"inproc://{request.node.name}"
            with headwater.connect(address, rank=rank, world=2, servers=2, timeout=PATIENCE) as ps:
                worker = Trainer(RECIPE, run, ps)
                worker.run()
                worker.optimizer.close()
        except BaseException as error:  # noqa: BLE001 - the test's own thread shall raise it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    finished = [each for each in _said(capsys) if isinstance(each, reports.Finished)]
    assert sorted((each.rank, each.step, each.reason) for each in finished) == [(0, 7, "done"), (1, 7, "done")]


def test_the_run_generates_the_same_text_for_the_same_seed(run: Path) -> None:
    _train(run)
    first = generate_text(run, "alpha", max_new_tokens=40, seed=1)
    assert first.startswith("alpha")
    assert len(first) > len("alpha")
    assert generate_text(run, "alpha", max_new_tokens=40, seed=1) == first
    assert generate_text(run, "", max_new_tokens=3, temperature=0)
    with pytest.raises(headwater.UsageError, match="max_new_tokens"):
        generate_text(run, "alpha", max_new_tokens=0)


def test_a_step_without_a_worker_that_died_is_not_saved(run: Path) -> None:
    """Of a run that is not elastic: going on with it would not come to what was never interrupted comes to."""
    with headwater.connect("inproc://", rank=0, world=1, servers=1) as ps:
        worker = Trainer(RECIPE, run, ps)
        worker.members -= 1  # as if one had gone since
        with pytest.raises(headwater.WorkerLost, match="step 1 is not of all, and is not saved"):
            worker.run()
        worker.optimizer.close()
    assert checkpoint.newest(run) is None
