from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from headwater.errors import DataError, DiskFull
from headwater_recipes.common import checkpoint
from headwater_recipes.common.settings import State
from headwater_recipes.lm import model
from headwater_recipes.lm.settings import RECIPE, LmSettings


def _model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(model.config("tiny", 300, 32))


def _trained() -> tuple[Any, torch.optim.Optimizer]:
    made = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, betas=(0.8, 0.9))
    made(torch.ones(3)).sum().backward()
    optimizer.step()
    return made, optimizer


def _state(step: int) -> State[LmSettings]:
    return State(step=step, elapsed=1.5, progress=0.25, settings=LmSettings(steps=9))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    made = _model()
    _, optimizer = _trained()
    path = checkpoint.save(tmp_path, made, optimizer.state_dict(), _state(3))
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.read_state(path, LmSettings) == _state(3)
    for folder in (tmp_path, path):
        for name, value in model.load(folder).state_dict().items():
            assert torch.equal(value, made.state_dict()[name])
    _, other = _trained()
    other.load_state_dict(checkpoint.load_optimizer(path))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            assert torch.equal(other.state_dict()["state"][index][name], value)
    assert not list(tmp_path.rglob("*.new"))


def test_the_last_two_are_kept_and_an_unfinished_one_does_not_count(tmp_path: Path) -> None:
    made = _model()
    for step in (2, 10, 100):
        checkpoint.save(tmp_path, made, {"state": {}, "param_groups": []}, _state(step))
    (tmp_path / "checkpoints" / "00000200.new").mkdir()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "00000010",
        "00000100",
        "00000200.new",
    ]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "00000100"


@contextlib.contextmanager
def _small_disk(most: int) -> Iterator[None]:
    """No file of more bytes: what a full disk says, said by the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["model", "optimizer", "json"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path, what: str) -> None:
    made, (_, optimizer) = _model(), _trained()
    before = checkpoint.save(tmp_path, made, {"state": {}, "param_groups": []}, _state(1))
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = {"state": {0: {"exp_avg": torch.ones(200_000)}}, "param_groups": []}
    most = {"model": 50_000, "optimizer": 500_000, "json": 10}[what]

    def write(_: Any, folder: Path) -> None:
        if what == "model":
            checkpoint.write_model(made, folder)

    with _small_disk(most), pytest.raises(DiskFull, match=r"newest checkpoint is that of step 1$"):
        checkpoint.save(tmp_path, made, optimizer.state_dict() if what == "json" else state, _state(2), write)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there
    assert checkpoint.newest(tmp_path) == before
    with _small_disk(10), pytest.raises(DiskFull, match="it is as it was"):
        checkpoint.write_json(tmp_path / "headwater.json", {"model": "x" * 100})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there
    checkpoint.save(tmp_path, made, state, _state(2))
    assert not list(tmp_path.rglob("*.new"))


def test_a_disk_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(tmp_path, _model(), {"state": {}, "param_groups": []}, _state(1))
    assert (tmp_path / "model.safetensors").stat().st_nlink == 1


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    fresh = checkpoint.new_folder("lm", tmp_path / "runs" / "a")
    assert fresh.is_dir()
    assert checkpoint.new_folder("lm", fresh) == fresh
    (fresh / "model.safetensors").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match=r"exists and is not empty.*--resume"):
        checkpoint.new_folder("lm", fresh)
    with pytest.raises(DataError, match="exists and is not empty"):
        checkpoint.new_folder("lm", fresh / "model.safetensors")
    assert (fresh / "model.safetensors").read_text(encoding="utf-8") == "precious"


def test_the_newest_run_is_found_and_an_empty_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="holds no run of a model"):
        checkpoint.find_folder(RECIPE, None)
    for name in ("lm-1", "lm-2"):
        (tmp_path / "runs" / name / "checkpoints" / "00000001").mkdir(parents=True)
    (tmp_path / "runs" / "lm-3").mkdir()
    assert checkpoint.find_folder(RECIPE, None) == Path("runs", "lm-2")
    with pytest.raises(DataError, match="no checkpoint"):
        checkpoint.find_folder(RECIPE, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, _model(), _trained()[1].state_dict(), _state(1))
    (path / "trainer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"trainer\.json"):
        checkpoint.read_state(path, LmSettings)
    (path / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="optimizer's state cannot be read"):
        checkpoint.load_optimizer(path)
