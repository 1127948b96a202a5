"""The closed list: torch's own defaults, and what is refused."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from headwater.errors import UnknownOptimizer
from headwater.types import Bulk, DenseSpec, OptimizerSpec, ParameterSpec
from headwater.wire.optimizers import KNOWN, check, checked, complete, select
from tests.server.tables.dense.tools import table

TORCH = [name for name in KNOWN if hasattr(torch.optim, name)]
MEANINGLESS = {"params", "foreach", "capturable", "differentiable"}


@pytest.mark.parametrize("name", TORCH)
def test_defaults_are_those_of_the_signature(name: str) -> None:
    parameters = inspect.signature(getattr(torch.optim, name)).parameters
    expected = {key: p.default for key, p in parameters.items() if key not in MEANINGLESS}
    if name == "Adafactor":
        assert expected["eps"] == (None, 0.001)
        expected["eps"] = (0.001,)
    assert dict(KNOWN[name].defaults) == expected


@pytest.mark.parametrize("name", TORCH)
def test_defaults_and_groups_of_torch_are_accepted(name: str) -> None:
    defaults = complete(name, {})
    optimizer = getattr(torch.optim, name)([torch.zeros(2, 2)])
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # adds initial_lr
    assert complete(name, group) == defaults
    assert complete(name, select(name, optimizer.param_groups[0])) == defaults


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("SGD", {"lr": -0.1}),
        ("SGD", {"lr": float("nan")}),
        ("SGD", {"lr": True}),
        ("SGD", {"lr": "0.1"}),
        ("SGD", {"lr": None}),
        ("SGD", {"momentum": -1}),
        ("SGD", {"nesterov": True}),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ("SGD", {"maximize": 1}),
        ("SGD", {"differentiable": True}),
        ("SGD", {"fused": 1}),
        ("AdamW", {"betas": (0.9, 1.0)}),
        ("AdamW", {"betas": (0.9,)}),
        ("AdamW", {"betas": 0.9}),
        ("AdamW", {"eps": -1e-8}),
        ("AdamW", {"weight_decay": float("inf")}),
        ("AdamW", {"capturable": True}),
        ("AdamW", {"decoupled_weight_decay": False}),
        ("AdamW", {"amsgrad": None}),
        ("AdamW", {"beta": (0.9, 0.99)}),
        ("RMSprop", {"fused": True}),
        ("RMSprop", {"alpha": -1}),
        ("Adadelta", {"rho": 1.5}),
        ("Rprop", {"etas": (0.5, 0.9)}),
        ("Rprop", {"step_sizes": (1.0,)}),
        ("ASGD", {"t0": 0}),
        ("Adafactor", {"beta2_decay": 0.8}),
        ("Adafactor", {"d": 0.5}),
        ("Adafactor", {"eps": (None, -1.0)}),
        ("Adafactor", {"eps": 1e-3}),
        ("Muon", {"ns_steps": 1.5}),
        ("Muon", {"ns_coefficients": (1.0, 2.0)}),
        ("Muon", {"adjust_lr_fn": "mine"}),
        ("Assign", {"lr": 0.1}),
        ("Lion", {}),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, hyper: dict[str, Any]) -> None:
    with pytest.raises(UnknownOptimizer) as caught:
        complete(name, hyper)
    assert name in str(caught.value)


def test_messages_suggest_the_nearest_name() -> None:
    with pytest.raises(UnknownOptimizer, match=r"Did you mean AdamW\?"):
        check(table("adamw"))
    with pytest.raises(UnknownOptimizer, match=r"no hyperparameter 'momentun'. Did you mean momentum\?"):
        complete("SGD", {"momentun": 0.9})


def test_values_are_made_plain() -> None:
    assert complete("AdamW", {"lr": torch.tensor(0.5), "betas": [0.5, torch.tensor(0.25)]})["betas"] == (0.5, 0.25)
    assert complete("Adafactor", {"eps": (None, 0.01)})["eps"] == (0.01,)
    assert complete("Adafactor", {"eps": (0.1, 0.01)})["eps"] == (0.1, 0.01)
    assert checked("SGD", {"foreach": True, "differentiable": False}) == {}
    assert select("SGD", {"lr": 0.1, "params": [], "initial_lr": 1.0, "foreach": True}) == {"lr": 0.1}
    with pytest.raises(UnknownOptimizer, match="capturable"):
        complete("AdamW", select("AdamW", {"capturable": True}))


def test_check_completes_the_groups() -> None:
    spec = check(table("AdamW", groups=[{"lr": 0.1}, {}]))
    assert [group["lr"] for group in spec.groups] == [0.1, 0.001]
    assert check(DenseSpec("t", (), spec)) == spec


@pytest.mark.parametrize(
    ("name", "parameter", "says"),
    [
        ("Muon", ParameterSpec("bias", (3,)), "'bias'.*2-D"),
        ("SGD", ParameterSpec("ids", (3,), "int64"), "'ids' is int64.*Assign"),
        ("SGD", ParameterSpec("w", (3,), group=1), "'w' is in group 1"),
    ],
)
def test_check_names_the_parameter(name: str, parameter: ParameterSpec, says: str) -> None:
    with pytest.raises(UnknownOptimizer, match=says):
        check(DenseSpec("t", (parameter,), OptimizerSpec(name, ({},))))


def test_buffers_have_no_gradient_to_clip() -> None:
    with pytest.raises(UnknownOptimizer, match="max_grad_norm"):
        check(table("Assign", sync=Bulk(), max_grad_norm=1.0))


def test_light_to_import() -> None:
    code = (
        "import sys, headwater.wire.optimizers, headwater.wire.exact; assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
