"""Plain files that other programs load: the model's values, and the state of the plain torch optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headwater.errors import DataError, UsageError
from headwater.integrations.torch.export import load_optimizer_state
from headwater.server.snapshots import restore
from headwater.server.snapshots.export import export
from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec
from tests.server.snapshots import scene
from tests.server.snapshots.test_restore import MATRIX, OPTIMIZERS
from tests.server.tables.dense.tools import Sharded, gradients, reference, table

CASES = [case for case in OPTIMIZERS + MATRIX if case[0] != "Assign"]


def out_of(root: Path, **tables: Sharded) -> list[Path]:
    scene.take(root / "snapshots", dict(enumerate(tables.values())))
    with restore.newest(root / "snapshots").snapshot as snapshot:
        return export(snapshot, root / "out")


@pytest.mark.parametrize(("name", "hyper"), CASES)
@pytest.mark.parametrize("steps", [0, 2])
def test_the_plain_torch_optimizer_goes_on(name: str, hyper: dict[str, float], steps: int, tmp_path: Path) -> None:
    shapes = [(5, 7), (100, 30)] if name == "Muon" else [(5, 7), (300,), (40, 1000), (3,)]
    spec = table(name, shapes, groups=[hyper, {**hyper, "lr": 0.05}])
    served, stepper = scene.filled(spec, 3), scene.Stepper()
    for _ in range(steps):
        stepper.step(served)
    names = {path.name for path in out_of(tmp_path, t=served)}
    assert names == {"model.safetensors", "optimizer.safetensors", "optimizer.json"}

    values = load_file(tmp_path / "out" / "model.safetensors")
    assert values.keys() == {p.name for p in spec.parameters}
    plain = [torch.nn.Parameter(values[p.name]) for p in spec.parameters]
    optimizer = reference(spec, plain, foreach=False) if name != "Muon" else reference(spec, plain)
    saved = load_optimizer_state(tmp_path / "out")
    assert [g.keys() for g in saved["param_groups"]] == [g.keys() for g in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in served.shards[0].groups]

    state = scene.states(served)
    for index, parameter in enumerate(plain):
        mine = {slot: tensor for (p, slot), tensor in state.items() if p == index}
        assert optimizer.state[parameter].keys() == mine.keys()
        for slot, tensor in mine.items():
            assert torch.equal(optimizer.state[parameter][slot].reshape(-1), tensor.reshape(-1)), slot
            if tensor.numel() == parameter.numel() > 1:
                assert optimizer.state[parameter][slot].shape == parameter.shape


def test_it_trains_on_to_the_same_bits(tmp_path: Path) -> None:
    spec = table("AdamW", [(33,), (4, 1000)], groups=[{"lr": 0.01, "fused": True}])
    served, generator = scene.filled(spec, 2), torch.Generator().manual_seed(0)
    served.step([gradients(spec, generator)])
    out_of(tmp_path, t=served)
    values = load_file(tmp_path / "out" / "model.safetensors")
    plain = [values[p.name] for p in spec.parameters]
    optimizer = reference(spec, plain)
    optimizer.load_state_dict(load_optimizer_state(tmp_path / "out"))
    made = gradients(spec, generator)
    served.step([made])
    for value, gradient in zip(plain, made.values(), strict=True):
        value.grad = gradient
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, served.values(), strict=True))


def _named(name: str, optimizer: str, *parameters: str) -> Sharded:
    specs = tuple(ParameterSpec(p, (4,)) for p in parameters)
    return scene.filled(DenseSpec(name, specs, OptimizerSpec(optimizer, ({},)), Bulk()), 2)


def test_a_model_and_its_buffers_are_one_file(tmp_path: Path) -> None:
    out_of(tmp_path, a=_named("model", "AdamW", "w", "b"), b=_named("model.buffers", "Assign", "mean"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"w", "b", "mean"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "optimizer.json",
        "optimizer.safetensors",
    ]
    assert load_optimizer_state(tmp_path / "out")["state"] == {}


def test_two_optimizers_have_two_folders(tmp_path: Path) -> None:
    written = out_of(tmp_path, a=_named("../x", "AdamW", "w"), b=_named("y", "SGD", "v"))
    found = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert found == {
        "model.safetensors",
        ".._x/optimizer.safetensors",
        ".._x/optimizer.json",
        "y/optimizer.safetensors",
        "y/optimizer.json",
    }


def test_tables_with_parameters_of_one_name_have_two_models(tmp_path: Path) -> None:
    written = out_of(tmp_path, a=_named("x", "AdamW", "w"), b=_named("y", "Assign", "w"))
    found = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert found == {"x/model.safetensors", "y/model.safetensors", "optimizer.safetensors", "optimizer.json"}


def test_another_order_of_parameters(tmp_path: Path) -> None:
    served, stepper = _named("t", "AdamW", "a", "b", "c"), scene.Stepper()
    stepper.step(served)
    out_of(tmp_path, t=served)
    plain = load_optimizer_state(tmp_path / "out")["state"]
    turned = load_optimizer_state(tmp_path / "out", ["c", "a", "b"])["state"]
    for new, old in enumerate((2, 0, 1)):
        assert torch.equal(turned[new]["exp_avg"], plain[old]["exp_avg"])
    with pytest.raises(UsageError, match="the same names"):
        load_optimizer_state(tmp_path / "out", [["a"], ["b", "c"]])


def test_files_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    out_of(tmp_path, t=_named("t", "AdamW", "a"))
    (tmp_path / "out" / "optimizer.json").write_text("{}")
    for folder in (tmp_path / "out", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            load_optimizer_state(folder)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="is not empty; nothing was written"):
        out_of(tmp_path, t=_named("t", "AdamW", "a"))
    (tmp_path / "file").touch()
    with restore.newest(tmp_path / "snapshots").snapshot as snapshot, pytest.raises(UsageError, match="exists"):
        export(snapshot, tmp_path / "file")
