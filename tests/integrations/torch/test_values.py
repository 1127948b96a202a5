"""Values arrive before they are used: who waits for what, and when."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import headwater
from headwater.errors import ParameterModified, UsageError
from headwater.integrations.torch.values import _Inert
from tests.integrations.torch.fake_table import FakeClient, FakeTable
from tests.integrations.torch.test_gradients import backward, chain, optimizer


def test_parameters_are_the_tables_memory() -> None:
    model = chain()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, table = optimizer(model)
    for name, p in model.named_parameters():
        assert p.data_ptr() == table.values[name].data_ptr()
        assert torch.equal(p, before[name])


def test_each_module_waits_for_its_own_parameters_once() -> None:
    model = chain()
    opt, table = optimizer(model, overlap=True)
    backward(model)
    assert table.waits == []
    opt.step()
    assert table.waits == []  # step() returns at once
    backward(model)
    backward_waits = [("0.weight", "0.bias"), ("1.weight", "1.bias"), ("2.weight", "2.bias")]
    assert table.waits == backward_waits


def test_training_equals_torch_though_values_arrive_late() -> None:
    model, reference = chain(), chain()
    opt, _ = optimizer(model, overlap=True)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for _ in range(3):
        for m, o in ((model, opt), (reference, plain)):
            functional.tanh(m(torch.ones(2, 4))).sum().backward()
            o.step()
            o.zero_grad()
    opt.synchronize()
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())


class Attention(nn.Module):
    """Reads its projection's weight without calling the projection, as ``nn.MultiheadAttention`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.loose = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)[None]
        return functional.linear(self.attention(x, x, x)[0], self.loose.weight)


def test_parameters_of_modules_that_are_not_called_are_waited_for_above() -> None:
    model = Attention()
    opt, table = optimizer(model, overlap=True)
    for _ in range(2):
        backward(model)
        opt.step()
        opt.zero_grad()
    assert table.waits == [
        ("loose.weight",),
        ("first.weight", "first.bias"),
        ("attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"),
    ]


def test_a_model_whose_parts_are_called_alone() -> None:
    model = Attention()
    opt, table = optimizer(model, overlap=True)
    for _ in range(2):
        model.first(functional.linear(torch.ones(1, 4), model.loose.weight)).sum().backward()
        opt.step()
        opt.zero_grad()
    assert "loose.weight" in table.waits[0]  # too late for this call, which the graph's versions catch


def test_a_forward_before_the_optimizer_was_there() -> None:
    model = Attention()
    loss = model(torch.ones(1, 4)).sum()
    opt, table = optimizer(model, overlap=True)
    loss.backward()  # the model's own values became the table's: the graph is as good as it was
    opt.step()
    model.attention(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    assert set(table.waits[0]) == set(table.values)


def test_evaluation_waits_for_everything_at_the_root() -> None:
    model = chain()
    opt, table = optimizer(model, overlap=True)
    backward(model)
    opt.step()
    with torch.inference_mode():
        model(torch.ones(1, 4))
    assert len(table.waits) == 1
    assert set(table.waits[0]) == set(table.values)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, suppressed as it thinks
def test_a_compiled_model_waits_without_being_compiled_again() -> None:
    model, reference = chain(), chain()
    opt, _ = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    compiled = torch.compile(model, backend="eager")
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            functional.tanh(compiled(torch.ones(2, 4))).sum().backward()
        functional.tanh(reference(torch.ones(2, 4))).sum().backward()
        for o in (opt, plain):
            o.step()
            o.zero_grad()
    opt.synchronize()
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())


def test_the_wait_comes_before_other_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[float] = []
    model[0].register_forward_pre_hook(lambda module, _: seen.append(module.bias.sum().item()))
    opt, table = optimizer(model, overlap=True)
    backward(model)
    opt.step()
    model(torch.ones(1, 4))
    assert seen[1] == table.server["0.bias"].sum().item() != seen[0]


def test_a_graph_from_before_the_step_refuses_to_run_backward() -> None:
    model = chain()
    opt, _ = optimizer(model, overlap=True)
    old = model(torch.ones(1, 4, requires_grad=True)).sum()
    backward(model)
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_without_overlap_values_are_there_when_step_returns() -> None:
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    opt.step()
    assert all(torch.equal(p, table.server[n]) for n, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


LOOKS: dict[str, Any] = {
    "operation": lambda p: p + 0,
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "numpy": lambda p: torch.from_numpy(p.detach().numpy()),
    "list": lambda p: torch.tensor(p.tolist()),
    "iteration": lambda p: torch.stack(list(p)),
    "index": lambda p: torch.stack([p[i] for i in range(len(p))]),
    "foreach": lambda p: torch._foreach_mul([p], 1.0)[0],
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "saved": lambda p: _saved(p),
    "functional": lambda p: torch.func.functional_call(_Echo(p), {"held": p}, ()),
    "other model": lambda p: _Echo(p)(),
}


class _Echo(nn.Module):
    """Another model that shares a parameter."""

    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()
        self.held = held

    def forward(self) -> torch.Tensor:
        return self.held * 1


def _saved(parameter: torch.Tensor) -> Any:
    buffer = io.BytesIO()
    torch.serialization.save(parameter, buffer)
    buffer.seek(0)
    return torch.serialization.load(buffer)


@pytest.mark.parametrize("look", LOOKS)
def test_with_overlap_whoever_looks_at_a_parameter_waits_for_it(look: str) -> None:
    model = chain()
    opt, table = optimizer(model, overlap=True)
    for _ in range(2):
        backward(model)
        opt.step()
        opt.zero_grad()
        assert not torch.equal(table.values["1.weight"], table.server["1.weight"]), "they are still on their way"
        found = LOOKS[look](model[1].weight)
        assert torch.equal(found, table.server["1.weight"])
        assert type(model[1].weight) is nn.Parameter
        assert type(found) in (torch.Tensor, nn.Parameter)


def test_with_overlap_a_write_comes_after_the_values() -> None:
    model, reference = chain(), chain()
    opt, _ = optimizer(model, overlap=True)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for _ in range(3):
        for m, o in ((model, opt), (reference, plain)):
            backward(m)
            o.step()
            o.zero_grad()
            with torch.no_grad():
                m[1].weight.clamp_(-0.1, 0.1)
            m[2].bias.data.mul_(0.5)
    opt.synchronize()
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_overlap_is_given_up_where_code_is_compiled() -> None:
    model = chain()
    opt, table = optimizer(model, overlap=True)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert all(torch.equal(p, table.server[n]) for n, p in model.named_parameters())


def test_state_dict_and_loading_wait_for_everything() -> None:
    model = chain()
    opt, table = optimizer(model, overlap=True)
    backward(model)
    opt.step()
    state = model.state_dict()
    assert all(torch.equal(state[n], table.server[n]) for n in table.server)


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


def _through_data(model: nn.Module) -> None:
    model.get_parameter("1.weight").data.mul_(0.5)


def _through_numpy(model: nn.Module) -> None:
    model.get_parameter("1.weight").detach().numpy()[0] = 0.25


def _replaced(model: nn.Module) -> None:
    weight = model.get_parameter("1.weight")
    weight.data = weight.detach() * 2


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.75 for name, value in model.state_dict().items()})


def _assigned(model: nn.Module) -> None:
    torch.nn.init.constant_(model.get_parameter("2.bias"), 0.5)


WRITES = [_in_place, _through_data, _through_numpy, _replaced, _loaded, _assigned]


@pytest.mark.parametrize("when", ["before forward", "before step"])
@pytest.mark.parametrize("write", WRITES)
def test_what_a_script_writes_into_parameters_is_what_the_next_step_starts_from(write: Any, when: str) -> None:
    model, reference = chain(), chain()
    opt, table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for step in range(4):
        for m, o in ((model, opt), (reference, plain)):
            if step % 2 and when == "before forward":
                write(m)
            backward(m)
            if step % 2 and when == "before step":
                write(m)
            o.step()
            o.zero_grad()
        assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())
        assert all(torch.equal(p, table.server[n]) for n, p in model.named_parameters())


def test_a_write_that_changes_nothing_sends_nothing() -> None:
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    with torch.no_grad():
        model[1].weight.mul_(1.0)
    opt.step()
    assert table.wrote == {}


def _converted(model: nn.Module) -> None:
    model.double()


def _resized(model: nn.Module) -> None:
    weight = model.get_parameter("1.weight")
    weight.data = torch.zeros(2, 4)


def _shared(model: nn.Module) -> None:
    model.share_memory()


@pytest.mark.parametrize(
    ("move", "says"), [(_converted, "before the optimizer is made"), (_resized, "shape"), (_shared, "headwater run")]
)
def test_a_model_that_is_another_one_now_stops_the_step(move: Any, says: str) -> None:
    model = chain()
    opt, table = optimizer(model)
    move(model)
    with pytest.raises(ParameterModified, match=says):
        opt.step()
    assert "step" not in [call for call, _ in table.calls]


def test_a_copied_model_is_free_of_the_optimizer() -> None:
    model = chain()
    opt, table = optimizer(model, overlap=True)
    twin = copy.deepcopy(model)
    backward(model)
    opt.step()
    calls = len(table.calls)
    twin(torch.ones(1, 4)).sum().backward()
    twin.state_dict()
    twin.load_state_dict(twin.state_dict())
    assert len(table.calls) == calls
    assert type(next(iter(twin[0]._forward_pre_hooks.values()))) is _Inert
    assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()


def test_a_closed_optimizer_leaves_an_ordinary_model() -> None:
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    opt.step()
    opt.close()
    opt.close()
    assert all(torch.equal(p, table.server[n]) for n, p in model.named_parameters())
    assert all(p.data_ptr() != table.values[n].data_ptr() for n, p in model.named_parameters())
    assert all(p.grad.data_ptr() != table.gradients[n].data_ptr() for n, p in model.named_parameters())  # type: ignore[union-attr]
    hooks = [model._state_dict_pre_hooks, model._load_state_dict_pre_hooks]
    assert not any([*hooks, *(module._forward_pre_hooks for module in model.modules())])
    table.calls.clear()
    model.zero_grad()
    backward(model)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    plain.step()
    assert table.calls == []
    for act in (opt.step, opt.state_dict, opt.skip_step, opt.assign, lambda: opt.load_state_dict({})):
        with pytest.raises(UsageError, match="is closed"):
            act()


def test_two_optimizers_may_train_the_same_parameters_in_turns() -> None:
    """Adam first and LBFGS after it, or an optimizer that is bound to the name of another."""
    model, reference = chain(), chain()
    mine = [optimizer(model)[0] for _ in range(2)]
    plain = [torch.optim.SGD(reference.parameters(), lr=0.25) for _ in range(2)]
    for turn in (0, 1, 1, 0):
        for m, o in ((model, mine), (reference, plain)):
            functional.tanh(m(torch.ones(2, 4))).sum().backward()
            o[turn].step()
            o[turn].zero_grad()
        assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())
    for opt in mine:
        opt.close()
        assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())


def test_two_optimizers_may_share_a_model() -> None:
    model = chain()
    first, a = optimizer(model, params=list(model[0].parameters()), name="model", overlap=True)
    client: Any = FakeClient()
    second = headwater.Optimizer(
        model, torch.optim.SGD, lr=0.25, params=list(model[1].parameters()), name="second", client=client, overlap=True
    )
    b: FakeTable = client.tables["second"]
    b.calls.clear()
    for _ in range(2):
        backward(model)
        first.step()
        second.step()
        model.zero_grad()
    assert a.waits == [("0.weight", "0.bias")]
    assert b.waits == [("1.weight", "1.bias")]


def test_other_devices_copy_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forced on the CPU: the parameters then keep their own memory, as on a GPU.
    monkeypatch.setattr("headwater.integrations.torch.parameters.shares_memory", lambda _: False)
    model, reference = chain(), chain()
    opt, _ = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    own = [p.data_ptr() for p in model.parameters()]
    for _ in range(3):
        for m, o in ((model, opt), (reference, plain)):
            backward(m)
            o.step()
            o.zero_grad()
    opt.synchronize()
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())
    assert [p.data_ptr() for p in model.parameters()] == own
    backward(model)
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())


@pytest.mark.parametrize("write", [w for w in WRITES if w is not _replaced])
def test_on_other_devices_writes_become_the_state_too(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    monkeypatch.setattr("headwater.integrations.torch.parameters.shares_memory", lambda _: False)
    test_what_a_script_writes_into_parameters_is_what_the_next_step_starts_from(write, "before step")


def test_after_a_rest_other_devices_have_the_values_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.integrations.torch.parameters.shares_memory", lambda _: False)
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    opt.step()
    opt.synchronize()
    with torch.no_grad():
        for name, value in table.values.items():
            value.fill_(3.0)
            table._arrived[name] = value.clone()
        model[1].bias.fill_(7.0)
    for renewed in table.renewals:
        renewed()
    assert {n: p.unique().tolist() for n, p in model.named_parameters()} == {
        n: [7.0] if n == "1.bias" else [3.0] for n, _ in model.named_parameters()
    }
    opt.step()
    assert table.wrote.keys() == {"1.bias"}
    opt.close()
    assert not table.renewals


def test_an_optimizer_is_not_copied_or_pickled() -> None:
    opt, _ = optimizer(chain())
    with pytest.raises(UsageError, match=r"Save state_dict\(\) instead"):
        copy.deepcopy(opt)
    with pytest.raises(UsageError, match=r"Save state_dict\(\) instead"):
        torch.serialization.save(opt, io.BytesIO())


def test_arguments_are_checked() -> None:
    for arguments, says in (
        ({"bucket_bytes": 0}, "bucket_bytes=0"),
        ({"nonfinite": "warn"}, "nonfinite='warn'"),
        ({"buffers": "sum"}, "buffers='sum'"),
    ):
        with pytest.raises(UsageError, match=says):
            optimizer(chain(), **arguments)


def test_a_step_without_gradients_leaves_graphs_as_good_as_they_were() -> None:
    model, reference = chain(), chain()
    opt, _table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for m, o in ((model, opt), (reference, plain)):
        loss = m(torch.ones(2, 4)).square().sum()
        o.step()  # nobody has a gradient
        loss.backward()
        o.step()
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())
    loss = model(torch.ones(2, 4)).square().sum()
    model[0].weight.grad = None
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
