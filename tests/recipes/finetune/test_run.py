"""Whole runs on a tiny model: with real processes, and a worker in this process."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import headwater
from headwater.errors import DataError, UsageError
from headwater_recipes.common import checkpoint, job, metrics, reports, schedule
from headwater_recipes.common.trainer import Trainer
from headwater_recipes.finetune import answers, model
from headwater_recipes.finetune.settings import RECIPE, FinetuneSettings
from tests.patience import PATIENCE
from tests.recipes.finetuning import TINY, write_chats, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and chats."""
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "model")
    write_chats(folder / "chats.jsonl")
    return folder


def _settings(place: Path, **changes: Any) -> FinetuneSettings:
    return FinetuneSettings(model=str(place / "model"), data=(str(place / "chats.jsonl"),), **{**TINY, **changes})


def _prepare(place: Path, run: Path, **changes: Any) -> Path:
    return job.prepare(RECIPE, _settings(place, **changes), run, Console(quiet=True))


def test_two_workers_and_two_servers_train_on_and_go_on(place: Path, tmp_path: Path) -> None:
    settings = _settings(place, workers=2, servers=2, accumulate=2, publish_every=4)
    out = io.StringIO()
    console = Console(file=out, width=150)
    run = job.prepare(RECIPE, settings, tmp_path / "run", console)
    assert job.Job(RECIPE, run, console).run() == 0, out.getvalue()
    text = out.getvalue()
    assert "chats.jsonl, 5" in text
    assert "before," in text
    assert "Which colour has thing" in text
    assert "Traceback" not in text
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["step"] == 6
    assert report["held_out_loss"] < report["held_out_loss_before"] - 0.5
    assert json.loads((run / "headwater.json").read_text(encoding="utf-8")) == {"model": "model"}
    said = answers.read(run)
    assert [each.held_out for each in said] == [False] * 3 + [True] * 3
    assert all(each.before != each.after for each in said)
    kinds = [row["kind"] for row in metrics.read_rows(run)]
    assert kinds == ["validation", "step", "step", "step", "final"]
    loaded = AutoModelForCausalLM.from_pretrained(run)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 2, 3]])).logits).all()

    job.resume(RECIPE, run, {"steps": 8})
    out = io.StringIO()
    assert job.Job(RECIPE, run, Console(file=out, width=150)).run() == 0, out.getvalue()
    assert f"{report['held_out_loss_before']:.3f} before" in out.getvalue()
    with pytest.raises(DataError, match="lora=0, which cannot change"):
        job.resume(RECIPE, run, {"lora": 4})


def _train(run: Path) -> dict[str, torch.Size]:
    """In this process; the shapes of what the table held."""
    with headwater.connect("inproc://", rank=0, world=1, servers=2) as ps:
        worker = Trainer(RECIPE, run, ps)
        shapes = {name: value.shape for name, value in ps.tables[checkpoint.TABLE].values.items()}
        worker.run()
        worker.optimizer.close()
    return shapes


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's, in the test
def test_an_adapter_is_all_that_is_trained(place: Path, tmp_path: Path) -> None:
    run = _prepare(place, tmp_path / "run", lora=4, lora_targets="q_proj,v_proj", steps=3, save_every=2)
    fresh = load_file(run / "adapter_model.safetensors")
    pretrained = load_file(run / "base" / "model.safetensors")
    shapes = _train(run)
    assert shapes
    assert all(".lora_" in name for name in shapes)
    trained = load_file(run / "adapter_model.safetensors")
    assert trained.keys() == fresh.keys()
    assert [name for name in trained if torch.equal(trained[name], fresh[name])] == []
    assert all(
        torch.equal(value, pretrained[name]) for name, value in load_file(place / "model/model.safetensors").items()
    )
    # As a server of answers builds it: the names are the table's.
    served: Any = PeftModel.from_pretrained(model.read(run / "base"), str(run), is_trainable=True)
    assert {name: p.shape for name, p in served.named_parameters() if p.requires_grad} == shapes
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = served.eval()(input_ids=ids).logits
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(run)(input_ids=ids).logits, expected, atol=1e-5)
        assert not torch.allclose(model.read(run / "base")(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(place: Path, tmp_path: Path, lora: int) -> None:
    whole, parts = (_prepare(place, tmp_path / name, lora=lora, steps=4) for name in ("whole", "parts"))
    _train(whole)
    state = checkpoint.read_state(parts, FinetuneSettings)
    half = msgspec.structs.replace(state.settings, steps=4, save_every=2)
    checkpoint.begin(RECIPE, parts, half)
    with headwater.connect("inproc://", rank=0, world=1, servers=1) as ps:
        worker = Trainer(RECIPE, parts, ps)
        worker.stopping = True  # after two steps
        worker.run()
        worker.optimizer.close()
    (parts / schedule.NAME).unlink()
    _train(parts)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    expected, found = load_file(whole / name), load_file(parts / name)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


class _Recorder:
    """Stands for what ``publish`` returns."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def wait(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, headwater.ClusterError("a server died")])
def test_versions_are_published_as_it_goes(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
) -> None:
    said: list[tuple[str, dict[str, str]]] = []

    def publish(_: Any, name: str, metadata: Mapping[str, str], step: int) -> _Recorder:
        said.append((name, dict(metadata)))
        assert name == f"step-{step}"
        return _Recorder(error)

    monkeypatch.setattr(headwater.Optimizer, "publish", publish, raising=False)
    _train(_prepare(place, tmp_path / "run", publish_every=2, steps=5))
    assert [name for name, _ in said] == ["step-0", "step-2", "step-4", "step-5"]
    assert said[0][1] == {"run": "run", "recipe": "finetune"}
    out, err = capsys.readouterr()
    heard = [report for line in out.splitlines() if (report := reports.hear(line)) is not None]
    published = [report.name for report in heard if isinstance(report, reports.Published)]
    assert published == ([] if error else ["step-0", "step-2", "step-4", "step-5"])
    assert err.count("was not published, and training goes on: a server died") == (4 if error else 0)


def test_two_workers_learn_what_one_with_twice_the_batches_learns(
    place: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the bit: each worker takes the mean over its own tokens."""
    read, lock = model.read, threading.Lock()

    def one_by_one(folder: Path, seq: int) -> Any:  # transformers does not load in two threads at once
        with lock:
            return read(folder, seq)

    monkeypatch.setattr(model, "read", one_by_one)
    one = _prepare(place, tmp_path / "one", accumulate=2, steps=2)
    two = _prepare(place, tmp_path / "two", workers=2, steps=2)
    _train(one)
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with headwater.connect(f"inproc://{request.node.name}", rank=rank, world=2, timeout=PATIENCE) as ps:
                worker = Trainer(RECIPE, two, ps)
                worker.run()
                worker.optimizer.close()
        except BaseException as error:  # noqa: BLE001 - the test's own thread shall raise it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    expected, found = (load_file(run / "model.safetensors") for run in (one, two))
    before = load_file(place / "model" / "model.safetensors")
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in before])
    apart = torch.cat([(expected[name] - found[name]).flatten() for name in before])
    assert apart.norm() < 0.2 * moved.norm()


def test_batches_of_a_step_count_by_their_tokens(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that two of four are one of eight."""
    said = []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        run = _prepare(place, tmp_path / str(batch), batch=batch, accumulate=accumulate, steps=2, log_every=1)
        capsys.readouterr()
        _train(run)
        heard = [found for line in capsys.readouterr().out.splitlines() if (found := reports.hear(line)) is not None]
        said.append([(each.loss, each.grad_norm) for each in heard if isinstance(each, reports.Stepped)])
    for other in said[1:]:
        for (loss, norm), (expected, expected_norm) in zip(other, said[0], strict=True):
            assert loss == pytest.approx(expected, rel=1e-4)
            assert norm == pytest.approx(expected_norm, rel=1e-3)


def test_nothing_is_made_of_what_cannot_be_used(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError, match="questions of more than 4 tokens"):
        _prepare(place, run, seq=4)
    with pytest.raises(UsageError, match="--lora-targets nothing"):
        _prepare(place, run, lora=2, lora_targets="nothing")
    with pytest.raises(DataError, match="not empty"):
        _prepare(place, place)
    for changes, says in (
        ({"accumulate": 0}, "--accumulate 0"),
        ({"lora": -1}, "--lora"),
        ({"lora_alpha": 2.0}, "--lora-alpha and --lora-targets"),
        ({"publish_every": -1}, "--publish-every"),
    ):
        with pytest.raises(UsageError, match=says):
            _settings(place, **changes).check()
    assert FinetuneSettings.of({"lora": 8}).lr > FinetuneSettings.of({}).lr
    assert FinetuneSettings.of({"lora": 8, "lr": 1e-5}).lr == 1e-5
