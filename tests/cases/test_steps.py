"""Programs in one process whose steps are other than the plain one: each ends where plain torch does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from tests.cases.support import Make, both_ways, or_says, plainly, values

Values = dict[str, torch.Tensor]


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def _loss(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.randn(8, 4)).square().mean()
    return found


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_accumulation_without_no_sync(kind: type[torch.optim.Optimizer]) -> None:
    def life(make: Make) -> Values:
        model = _net()
        opt = make(model, kind, lr=0.1)
        for rounds in (2, 4, 1, 3):  # the pattern is not always the same
            for _ in range(rounds):
                (_loss(model) / rounds).backward()
            opt.step()
            opt.zero_grad()
        return values(model)

    both_ways(life)


@pytest.mark.parametrize(
    "change",
    [
        lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.01),
        lambda ps: torch.nn.utils.clip_grad_norm_(ps, float("inf")),
        lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.01, foreach=True),
        lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.01),
        lambda ps: [p.grad.mul_(0.5) for p in ps],
        lambda ps: [p.grad.data.mul_(0.5) for p in ps],
        lambda ps: [p.grad.detach().numpy().__imul__(0.5) for p in ps],
        lambda ps: [setattr(p, "grad", p.grad * 2) for p in ps],
        lambda ps: setattr(ps[0], "grad", None),
        lambda ps: torch._foreach_mul_([p.grad for p in ps], 0.25),
        lambda ps: ps[1].grad.zero_(),
    ],
)
def test_gradients_that_change_before_the_step(change: Any) -> None:
    """Through autograd's version counter or past it."""

    def life(make: Make) -> Values:
        model = _net()
        opt = make(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        for step in range(5):
            _loss(model).backward()
            if step != 2:
                change(list(model.parameters()))
            opt.step()
            opt.zero_grad()
        return values(model)

    both_ways(life)


def test_unscaling() -> None:
    """What GradScaler.unscale_ writes is not seen by autograd's version counter."""

    def life(make: Make) -> Values:
        model = nn.Linear(4, 1)
        opt = make(model, torch.optim.SGD, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            loss = _loss(model) * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return values(model) | {"scale": torch.tensor(scaler.get_scale())}

    both_ways(life)


def test_a_gradient_that_another_loss_left_behind_is_forgotten() -> None:
    def life(make: Make) -> Values:
        critic, actor = nn.Linear(4, 1), nn.Linear(4, 4)
        opt_c = make(critic, torch.optim.Adam, lr=1e-3)
        opt_a = make(actor, torch.optim.Adam, lr=1e-3)
        for _ in range(4):
            opt_c.zero_grad()
            critic(torch.randn(8, 4)).mean().backward()
            opt_c.step()
            opt_a.zero_grad()
            critic(actor(torch.randn(8, 4))).mean().backward()
            opt_a.step()
        return values(critic, actor)

    both_ways(life)


def test_a_gradient_that_another_loss_left_behind_and_nobody_forgot_counts() -> None:
    def life(make: Make) -> Values:
        critic, actor = nn.Linear(4, 1), nn.Linear(4, 4)
        opt_c = make(critic, torch.optim.SGD, lr=0.1)
        opt_a = make(actor, torch.optim.SGD, lr=0.1)
        for _ in range(4):
            critic(actor(torch.randn(8, 4))).square().mean().backward()
            opt_a.step()
            opt_a.zero_grad()
            critic(torch.randn(8, 4)).square().mean().backward()
            opt_c.step()
            opt_c.zero_grad()
        return values(critic, actor)

    both_ways(life)


def test_positional_hyperparameters() -> None:
    def life(make: Make) -> Values:
        model = _net()
        if make is plainly:
            opt = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        else:
            opt = make(model, torch.optim.SGD, model.parameters(), 0.1, 0.9)
        for _ in range(3):
            _loss(model).backward()
            opt.step()
            opt.zero_grad()
        return values(model)

    both_ways(life)


def test_the_learning_rate_alone_by_position() -> None:
    with headwater.connect("inproc://cases-positional") as ps:
        model = nn.Linear(4, 1)
        opt = headwater.Optimizer(model, torch.optim.SGD, 0.1, momentum=0.9, client=ps)
        assert opt.param_groups[0]["lr"] == 0.1
        assert opt.param_groups[0]["momentum"] == 0.9


class _Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.add_((average * 0.9 + p.grad * 0.1).sign(), alpha=-group["lr"])
                    average.lerp_(p.grad, 0.01)
        return loss


def test_optimizers_that_the_servers_do_not_know() -> None:
    def life(make: Make) -> Values:
        one, other = _net(), _net()
        x = torch.randn(16, 4)
        lbfgs = make(one, torch.optim.LBFGS, lr=0.5, line_search_fn="strong_wolfe")
        lion = make(other, _Lion, lr=1e-2)
        for _ in range(4):

            def closure() -> torch.Tensor:
                lbfgs.zero_grad()
                loss: torch.Tensor = (one(x) - x[:, :1]).square().mean()
                loss.backward()
                return loss

            lbfgs.step(closure)
            _loss(other).backward()
            lion.step()
            lion.zero_grad()
        return values(one, other)

    both_ways(life)


def test_sparse_gradients_train_or_are_refused_by_name() -> None:
    def life(make: Make) -> Values:
        model = nn.Embedding(10, 3, sparse=True)
        opt = make(model, torch.optim.SparseAdam, lr=0.1)
        for _ in range(3):
            model(torch.tensor([1, 4])).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return values(model)

    with or_says("(?i)sparse"):
        both_ways(life)


def test_a_group_that_is_added_later() -> None:
    def life(make: Make) -> Values:
        body, head = nn.Linear(4, 8), nn.Linear(8, 1)
        model = nn.Sequential(body, head)
        opt = make(model, torch.optim.Adam, head.parameters(), lr=0.1)
        for step in range(6):
            if step == 2:
                opt.add_param_group({"params": body.parameters(), "lr": 0.01})
            _loss(model).backward()
            opt.step()
            opt.zero_grad()
            body.zero_grad()
        return values(model)

    both_ways(life)


def test_a_layer_that_thaws() -> None:
    def life(make: Make) -> Values:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        model[0].requires_grad_(False)
        opt = make(model, torch.optim.AdamW, model.parameters(), lr=0.1)
        for step in range(6):
            model[0].requires_grad_(step >= 2)
            model[1].requires_grad_(step != 4)
            _loss(model).backward()
            opt.step()
            opt.zero_grad()
        saved = opt.state_dict()
        again = make(model, torch.optim.AdamW, model.parameters(), lr=0.1) if make is plainly else opt
        again.load_state_dict(saved)
        _loss(model).backward()
        again.step()
        return values(model)

    both_ways(life)


def test_two_optimizers_and_twins() -> None:
    """Models of the same shapes are two tables; training one leaves the other as it is."""

    def life(make: Make) -> Values:
        q1, q2 = nn.Linear(16, 1), nn.Linear(16, 1)
        o1, o2 = make(q1, torch.optim.SGD, lr=0.1), make(q2, torch.optim.SGD, lr=0.1)
        for step in range(20):
            o1.zero_grad()
            (q1(torch.ones(4, 16)) - 3).square().mean().backward()
            o1.step()
            if step == 10:
                q2(torch.ones(4, 16)).mean().backward()
                o2.step()
        assert q1.weight.data_ptr() != q2.weight.data_ptr()
        return values(q1, q2)

    both_ways(life)


def test_every_fold_begins_with_its_own_fresh_model() -> None:
    def life(make: Make) -> Values:
        found: Values = {}
        for fold in range(3):
            torch.manual_seed(fold)
            model = _net()
            fresh = model[0].weight.detach().clone()
            opt = make(model, torch.optim.SGD, lr=0.1)
            assert torch.equal(model[0].weight, fresh)
            for _ in range(5):
                _loss(model).backward()
                opt.step()
                opt.zero_grad()
            if isinstance(opt, headwater.Optimizer) and fold != 1:
                opt.close()
            found |= {f"{fold}.{name}": value for name, value in values(model).items()}
        return found

    both_ways(life)


@pytest.fixture
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_default_device_is_the_scripts_and_not_ours(on_meta: None) -> None:
    with headwater.connect("inproc://cases-default-device") as ps:
        model = nn.Linear(4, 4, device="cpu")
        opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.1, client=ps)
        before = model.weight.detach().clone()
        for _ in range(2):
            model(torch.ones(2, 4, device="cpu")).sum().backward()
            opt.step()
            opt.zero_grad()
        assert model.weight.device.type == "cpu"
        assert not torch.equal(model.weight, before)
        opt.load_state_dict(opt.state_dict())
        model(torch.ones(2, 4, device="cpu")).sum().backward()
        opt.step()


@pytest.mark.parametrize("order", ["before the forward", "between forward and backward", "after the backward"])
def test_parameters_are_unfrozen_and_frozen_wherever_zero_grad_stands(order: str) -> None:
    """The table grows then, and a graph that was built on the parameters goes on."""

    def life(make: Make) -> Values:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        model[0].requires_grad_(False)
        opt = make(model, torch.optim.AdamW, lr=0.1)
        for step in range(9):
            if step in (3, 6):
                model[0].requires_grad_(step == 3)
                model[2].requires_grad_(step == 6)
            if order == "before the forward":
                opt.zero_grad()
            loss = _loss(model)
            if order == "between forward and backward":
                opt.zero_grad()
            loss.backward()
            opt.step()
            if order == "after the backward":
                opt.zero_grad()
        return values(model)

    both_ways(life)
