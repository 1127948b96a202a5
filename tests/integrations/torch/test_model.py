"""From a model to a table: names, groups, initial values, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.errors import ShapeMismatch, UnknownOptimizer, UsageError
from headwater.integrations.base.steps import TrainOptions
from headwater.integrations.torch.model import complete_groups, materialise, set_up, specs, trainable
from headwater.types import Bulk, Init

SGD = {"lr": 0.1}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_parameters_are_named_in_registration_order_and_tied_ones_once() -> None:
    model = nn.Sequential(nn.Linear(2, 3), Tied())
    made = set_up(model, torch.optim.SGD, None, (), SGD)
    assert list(made.parameters) == ["0.weight", "0.bias", "1.embedding.weight"]
    assert [p.shape for p in specs(made.parameters, made.groups, None)] == [(3, 2), (3,), (5, 3)]
    assert {p.init for p in specs(made.parameters, made.groups, None)} == {Init("values")}


def test_frozen_parameters_are_in_the_groups_and_not_in_the_table() -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    for params in (None, model.parameters()):
        made = set_up(model, torch.optim.SGD, params, (), SGD)
        assert list(made.parameters) == ["weight", "bias"]
        assert [len(group["params"]) for group in made.groups] == [2], "as in torch, so that states fit"
        assert list(trainable(made.parameters)) == ["weight"]


def test_tensors_beside_the_model_are_named_by_their_place() -> None:
    model, alpha = nn.Linear(2, 3), torch.zeros((), requires_grad=True)
    made = set_up(model, torch.optim.SGD, [alpha, model.bias], (), SGD)
    assert list(made.parameters) == ["bias", "beside.0"]


def test_arguments_by_position_are_the_optimizers() -> None:
    made = set_up(nn.Linear(2, 3), torch.optim.SGD, None, (0.5, 0.9), {"nesterov": True})
    assert (made.groups[0]["lr"], made.groups[0]["momentum"], made.groups[0]["nesterov"]) == (0.5, 0.9, True)
    with pytest.raises(UsageError, match="lr is given by position and by name"):
        set_up(nn.Linear(2, 3), torch.optim.SGD, None, (0.5,), SGD)


def test_compiled_submodules_keep_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), torch.compile(nn.Linear(3, 1), backend="eager"))
    assert list(set_up(model, torch.optim.SGD, None, (), SGD).parameters) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


def test_a_complex_parameter_is_pairs_of_real_numbers() -> None:
    made = set_up(_complex(), torch.optim.SGD, None, (), SGD)
    (spec,) = specs(made.parameters, made.groups, None)
    assert (spec.shape, spec.dtype) == ((2, 2), "float32")


def test_groups_get_torch_defaults_and_keep_their_own() -> None:
    model = nn.Linear(2, 3)
    groups = [{"params": [model.bias], "lr": 0.5, "weight_decay": 0.0}, {"params": [("w", model.weight)]}]
    made = set_up(model, torch.optim.AdamW, groups, (), {"lr": 0.1, "fused": True})
    plain = torch.optim.AdamW([{"params": [model.bias], "lr": 0.5, "weight_decay": 0.0}, {"params": [model.weight]}],
                              lr=0.1, fused=True)  # fmt: skip
    assert [_rest(group) for group in made.groups] == [_rest(group) for group in plain.param_groups]
    assert made.defaults == plain.defaults
    assert [p.group for p in specs(made.parameters, made.groups, None)] == [1, 0]
    sent = TrainOptions("AdamW", Bulk()).spec("model", (), made.groups).optimizer
    assert sent.groups[0]["lr"] == 0.5
    assert sent.groups[1]["betas"] == (0.9, 0.999)
    assert "params" not in sent.groups[0]


def _rest(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def test_no_state_is_allocated_to_find_the_defaults() -> None:
    # Adagrad and others allocate their state in the constructor; on the meta device that costs nothing.
    group = {"params": [nn.Parameter(torch.empty(1 << 40, device="meta"))]}
    assert complete_groups(torch.optim.Adagrad, [group], {"lr": 0.1})[0][0]["initial_accumulator_value"] == 0


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (headwater.init.ones(), ["ones", "ones"]),
        ({"*.weight": headwater.init.zeros(), "*": headwater.init.ones()}, ["zeros", "ones"]),
        ({"*bias": headwater.init.ones()}, ["values", "ones"]),
    ],
)
def test_init_by_glob_first_match_wins(init: Any, expected: list[str]) -> None:
    made = set_up(nn.Sequential(nn.Linear(2, 3)), torch.optim.SGD, None, (), SGD)
    assert [p.init.kind for p in specs(made.parameters, made.groups, init)] == expected


def test_a_meta_parameter_needs_an_init() -> None:
    made = set_up(nn.Linear(2, 3, device="meta"), torch.optim.SGD, None, (), SGD)
    assert [p.init.kind for p in specs(made.parameters, made.groups, headwater.init.zeros())] == ["zeros", "zeros"]
    with pytest.raises(UsageError, match="'bias' is on the meta device"):
        specs(made.parameters, made.groups, {"weight": headwater.init.zeros()})


def test_materialise_keeps_identity_and_shares_memory() -> None:
    memory = [torch.ones(3), torch.zeros(3)]
    parameters = [nn.Parameter(torch.empty(3, device="meta")), nn.Parameter(torch.rand(3))]
    ids = [id(p) for p in parameters]
    materialise(parameters, memory)
    assert [id(p) for p in parameters] == ids
    for p, values in zip(parameters, memory, strict=True):
        assert p.data_ptr() == values.data_ptr()
        assert p.requires_grad
        assert p.is_leaf


def _overlapping() -> nn.Module:
    model = nn.Module()
    shared = torch.zeros(10)
    model.a = nn.Parameter(shared[:6])
    model.b = nn.Parameter(shared[5:])
    return model


def _complex() -> nn.Module:
    model = nn.Module()
    model.c = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


def _float8() -> nn.Module:
    model = nn.Module()
    model.c = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    return model


def test_neighbours_in_one_memory_do_not_overlap() -> None:
    model, shared = nn.Module(), torch.zeros(4, 5)
    model.a, model.b = nn.Parameter(shared[:2]), nn.Parameter(shared[2:].t())
    assert list(trainable(set_up(model, torch.optim.SGD, None, (), SGD).parameters)) == ["a", "b"]


@pytest.mark.parametrize(
    ("model", "params", "says"),
    [
        (nn.Linear(1, 1), ["weight"], "'weight', which is no tensor"),
        (nn.Linear(1, 1), "weight", "must be a list"),
        (nn.Linear(1, 1), [{"lr": 1.0}], "a parameter group is"),
        (nn.Linear(1, 1), [torch.zeros(2, requires_grad=True) * 2], "it is no leaf"),
        (nn.ReLU(), None, "no trainable parameter"),
        (nn.LazyLinear(3), None, "no shape yet"),
        (_overlapping(), None, "'a' and 'b' share memory"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_held_is_refused(model: Any, params: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        trainable(set_up(model, torch.optim.SGD, params, (), SGD).parameters)


def test_a_parameter_given_twice_is_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(UsageError, match="names a parameter twice"):
        set_up(model, torch.optim.SGD, [{"params": [model.bias]}, {"params": model.parameters()}], (), SGD)


def test_a_dtype_that_no_table_holds_is_named() -> None:
    made = set_up(_float8(), torch.optim.SGD, None, (), SGD)
    with pytest.raises(ShapeMismatch, match=r"parameter 'c': a table cannot hold torch\.float8_e4m3fn"):
        specs(made.parameters, made.groups, None)


@pytest.mark.parametrize(
    ("optimizer", "hyper", "says"),
    [
        (torch.optim.SGD, {"lr": -1.0}, r"torch\.optim\.SGD refuses its arguments: Invalid learning rate"),
        (torch.optim.SGD, {"learning_rate": 1.0}, "refuses its arguments"),
        (torch.optim.AdamW, {"lr": 0.1, "capturable": True}, "cannot run on a server"),
        (torch.optim.Muon, {"lr": 0.1}, "refuses its arguments: Muon only supports 2D"),
    ],
)
def test_optimizers_come_from_the_closed_list(optimizer: Any, hyper: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownOptimizer, match=says):
        set_up(nn.Linear(2, 2), optimizer, None, (), hyper)


@pytest.mark.parametrize(
    "optimizer", [type("Homemade", (torch.optim.SGD,), {}), type("SGD", (torch.optim.SGD,), {}), torch.optim.LBFGS]
)
def test_other_optimizers_run_at_the_worker(optimizer: Any) -> None:
    model = nn.Linear(2, 2)
    made = set_up(model, optimizer, None, (), SGD)
    assert type(made.inner) is optimizer
    assert made.groups is made.inner.param_groups
    assert set_up(model, torch.optim.SGD, None, (), SGD).inner is None
