"""Gradients leave during backward: which, when, and what stops them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.errors import GradientModified, LinkBroken, NonFiniteGradient, UsageError
from headwater.integrations.torch.lazy import LazyGradient
from tests.integrations.torch.fake_table import FakeClient, FakeTable


def chain(width: int = 4, layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def optimizer(model: nn.Module, **rest: Any) -> tuple[headwater.Optimizer, FakeTable]:
    client: Any = FakeClient()
    opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.25, client=client, **rest)
    table = client.tables["model"]
    table.calls.clear()
    return opt, table


def backward(model: nn.Module, width: int = 4) -> None:
    model(torch.ones(2, width)).square().sum().backward()


def test_buckets_leave_while_backward_runs() -> None:
    model = chain()
    _, table = optimizer(model, bucket_bytes=80)  # one layer of 4x4 + 4 floats
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(list(table.pushes)))
    backward(model)
    assert seen[0][:2] == [("2.bias", "2.weight"), ("1.bias", "1.weight")]
    assert {name for names in table.pushes for name in names} == dict(model.named_parameters()).keys()


def test_a_gradient_moves_into_the_table_and_the_parameter_holds_it() -> None:
    model = chain()
    reference = chain()
    _, table = optimizer(model)
    backward(model)
    backward(reference)
    for name, p in model.named_parameters():
        assert torch.equal(table.gradients[name], reference.get_parameter(name).grad)  # type: ignore[arg-type]
        assert type(p.grad) is LazyGradient
        assert torch.equal(p.grad, table.gradients[name])
        assert type(p.grad) is torch.Tensor, "whoever looks has a tensor of his own"


def test_without_zero_grad_gradients_add_up_as_in_torch() -> None:
    model, reference = chain(), chain()
    opt, _table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for _ in range(3):
        for m, o in ((model, opt), (reference, plain)):
            backward(m)
            o.step()
    opt.synchronize()
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_zeroed_gradients_are_new_tensors(by: str) -> None:
    # The servers may still read the old memory.
    model = chain()
    opt, table = optimizer(model, overlap=True)
    backward(model)
    opt.step()
    sent = {name: gradient.clone() for name, gradient in table.gradients.items()}
    (opt if by == "optimizer" else model).zero_grad(set_to_none=False)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert not p.grad.any()
        assert torch.equal(table.gradients[name], sent[name])


def test_buckets_follow_the_order_in_which_gradients_became_ready() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.unused = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.first(x))
            return out

    model = Backwards()
    opt, _table = optimizer(model, bucket_bytes=64)
    assert opt._core.gradients.out.buckets == [("unused.weight",), ("first.weight",), ("last.weight",)]
    for _ in range(2):
        backward(model)
        opt.step()
    assert opt._core.gradients.out.buckets == [("last.weight",), ("first.weight",), ("unused.weight",)]


def test_a_parameter_without_gradient_takes_no_part() -> None:
    model = chain()
    opt, table = optimizer(model)
    model[0](torch.ones(1, 4)).sum().backward()
    assert table.pushes == []  # the bucket waits for the others
    opt.step()
    assert table.pushes == [("0.weight", "0.bias")]


def test_hooks_are_free_of_calls_until_a_bucket_is_full() -> None:
    model = chain()
    opt, table = optimizer(model)
    for _ in range(2):
        backward(model)
        opt.step()
        opt.zero_grad()
    table.calls.clear()
    backward(model)
    assert [call for call, _ in table.calls] == ["push"]


def test_hyperparameters_travel_when_they_change() -> None:
    model = chain()
    opt, table = optimizer(model)
    for lr in (0.25, 0.25, 0.125):
        opt.param_groups[0]["lr"] = lr
        backward(model)
        opt.step()
        opt.zero_grad()
    assert [groups and groups[0]["lr"] for groups in table.groups] == [0.25, None, None, None, 0.125, None]  # type: ignore[index]


def test_a_schedule_that_leaves_the_rails_is_refused_here() -> None:
    model = chain()
    opt, table = optimizer(model)
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(headwater.UnknownOptimizer, match="lr=nan"):
        backward(model)
    assert table.pushes == []


def test_no_sync_accumulates_and_the_next_backward_sends_the_sum() -> None:
    model, reference = chain(), chain()
    opt, table = optimizer(model)
    with opt.no_sync():
        backward(model)
        backward(model)
    assert table.calls == []
    backward(model)
    for _ in range(3):
        backward(reference)
    assert len(table.pushes) == 1
    assert all(torch.equal(table.gradients[n], p.grad) for n, p in reference.named_parameters())  # type: ignore[arg-type]


def test_gradients_gathered_under_no_sync_may_be_changed_and_leave_at_step() -> None:
    model = chain()
    opt, table = optimizer(model)
    with opt.no_sync(), opt.no_sync():
        backward(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    opt.step()
    assert len(table.pushes) == 1
    total = torch.stack([g.norm() for g in table.gradients.values()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("by_bytes", [False, True])
def test_several_backwards_add_up_and_from_the_second_step_on_only_the_last_leaves(by_bytes: bool) -> None:
    model, reference = chain(), chain()
    opt, table = optimizer(model)
    table.by_bytes = by_bytes
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    pushes = []
    for _ in range(3):
        table.calls.clear()
        for _ in range(3):
            backward(model)
            backward(reference)
            pushes.append(len(table.pushes))
        for o in (opt, plain):
            o.step()
            o.zero_grad()
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())
    assert pushes == [1, 1, 1, 0, 0, 1, 0, 0, 1]


def test_fewer_backwards_than_before_leave_at_step() -> None:
    model, reference = chain(), chain()
    opt, _table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for count in (3, 1, 2):
        for _ in range(count):
            backward(model)
            backward(reference)
        for o in (opt, plain):
            o.step()
            o.zero_grad()
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())


def _clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def _scale(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.data.mul_(0.5)  # type: ignore[union-attr]


def _numpy(model: nn.Module) -> None:
    model.get_parameter("0.bias").grad.numpy()[:] = 3  # type: ignore[union-attr]


def _replace(model: nn.Module) -> None:
    model.get_parameter("1.weight").grad = torch.zeros(4, 4).add_(1)  # as often written to as what left


def _forget_one(model: nn.Module) -> None:
    model.get_parameter("1.weight").grad = None


def _forget(model: nn.Module) -> None:
    model.zero_grad()


def _again(model: nn.Module) -> None:
    model.zero_grad()
    backward(model)


@pytest.mark.parametrize("by_bytes", [False, True])
@pytest.mark.parametrize("change", [_clip, _scale, _numpy, _replace, _forget_one, _forget, _again])
def test_what_the_gradient_is_at_step_counts_whatever_has_left(change: Any, by_bytes: bool) -> None:
    model, reference = chain(), chain()
    opt, table = optimizer(model, bucket_bytes=1)
    table.by_bytes = by_bytes
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for changes in (False, True, False, True):  # what was learnt from a step must not spoil the next
        for m, o in ((model, opt), (reference, plain)):
            backward(m)
            if changes:
                change(m)
            o.step()
            o.zero_grad()
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())


def test_gradients_that_a_script_keeps_stay_what_they_are() -> None:
    """LazyGradient surgery: the gradients of two losses side by side."""
    model, reference = chain(), chain()
    opt, _table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    found = []
    for m, o in ((model, opt), (reference, plain)):
        backward(m)
        first = [p.grad for p in m.parameters()]
        o.zero_grad()
        m(torch.arange(4.0)).sum().backward()
        second = [p.grad for p in m.parameters()]
        for p, a, b in zip(m.parameters(), first, second, strict=True):
            p.grad = a - b  # type: ignore[operator]
        o.step()
        found.append([torch.stack([a.sum(), b.sum()]) for a, b in zip(first, second, strict=True)])  # type: ignore[union-attr]
    assert all(map(torch.equal, *found))
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())


def test_buffers_that_a_script_gives_as_gradients_are_added_to_in_place() -> None:
    model, reference = chain(), chain()
    opt, _table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    flats = []
    for m in (model, reference):
        flats.append(flat := torch.zeros(sum(p.numel() for p in m.parameters())))
        for p, part in zip(m.parameters(), flat.split([p.numel() for p in m.parameters()]), strict=True):
            p.grad = part.view_as(p)
    for _ in range(3):
        for m, o, flat in zip((model, reference), (opt, plain), flats, strict=True):
            flat.zero_()
            backward(m)
            flat.mul_(0.5)
            o.step()
    assert torch.equal(*flats)
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())


def test_once_looked_at_gradients_stay_autograds_own_until_the_step() -> None:
    model = chain()
    opt, table = optimizer(model)
    for _ in range(2):
        backward(model)
        _clip(model)
        opt.step()
        opt.zero_grad()
    table.calls.clear()
    backward(model)
    assert type(model.get_parameter("0.weight").grad) is torch.Tensor
    assert table.pushes == []
    opt.step()
    assert len(table.pushes) == 1


def test_gradient_memory_is_not_written_while_it_is_in_flight() -> None:
    model = chain()
    opt, table = optimizer(model, bucket_bytes=1, overlap=True)
    old = (model[0].bias + 1).sum()  # saves no values, so its backward may run after the step
    backward(model)
    opt.step()
    opt.zero_grad()
    sent = table.gradients["0.bias"].clone()
    waited: list[bool] = []
    wait = table.wait
    table.wait = lambda *rest: (waited.append(torch.equal(table.gradients["0.bias"], sent)), wait(*rest))  # type: ignore[method-assign]
    old.backward()
    assert waited == [True]
    assert torch.equal(table.gradients["0.bias"], torch.ones(4))


def test_a_gradient_that_is_added_to_in_flight_is_noticed() -> None:
    model = chain()
    opt, _ = optimizer(model, overlap=True)
    old = (model[0].bias + 1).sum()
    backward(model)
    opt.step()
    with pytest.raises(GradientModified, match="may have been reading it"):
        old.backward()


def test_without_overlap_nothing_is_in_flight() -> None:
    model, reference = chain(), chain()
    opt, _ = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for m, o in ((model, opt), (reference, plain)):
        old = (m[0].bias + 1).sum()
        backward(m)
        o.step()
        old.backward()
        o.step()
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_a_gradient_that_is_not_finite_does_not_leave(bad: float, bucket_bytes: int) -> None:
    model = chain()
    opt, table = optimizer(model, bucket_bytes=bucket_bytes)
    model[1].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), bad))
    backward(model)
    assert not any("1.weight" in names for names in table.pushes)
    with pytest.raises(NonFiniteGradient, match=r"'1.weight' on rank 0 holds NaN or Inf"):
        opt.step()
    assert "step" not in [call for call, _ in table.calls]


def test_a_partial_bucket_is_checked_too() -> None:
    model = chain()
    opt, _table = optimizer(model)
    (model[0](torch.ones(1, 4)).sum() * float("nan")).backward()
    with pytest.raises(NonFiniteGradient, match=r"'0.weight'"):
        opt.step()


def test_skip_passes_over_the_step_and_goes_on() -> None:
    model = chain()
    opt, table = optimizer(model, nonfinite="skip", bucket_bytes=1)
    handle = model[1].weight.register_hook(lambda g: g * float("nan"))
    backward(model)
    opt.step()
    opt.zero_grad()
    handle.remove()
    assert ("1.weight",) not in table.pushes
    backward(model)
    opt.step()
    assert [call for call, _ in table.calls if call in ("step", "skip")] == ["skip", "step"]


def test_allow_sends_it() -> None:
    model = chain()
    opt, table = optimizer(model, nonfinite="allow")
    (model(torch.ones(1, 4)).sum() * float("nan")).backward()
    opt.step()
    assert table.gradients["0.weight"].isnan().all()


def test_a_stale_gradient_beside_a_good_one_is_not_its_fault() -> None:
    # The check reads neighbours in one go; only what leaves counts.
    model = chain(layers=2)
    opt, table = optimizer(model, bucket_bytes=1)
    table.gradients["0.bias"].fill_(float("nan"))
    backward(model)
    opt.step()
    assert opt.last_step is not None
    assert opt.last_step.applied


def test_a_push_that_failed_is_not_taken_for_sent() -> None:
    model = chain()
    opt, table = optimizer(model)
    table.fails = LinkBroken("the connection ended")
    with pytest.raises(LinkBroken):
        backward(model)
    assert table.calls == []
    opt.step()
    assert len(table.pushes) == 1


def test_a_sparse_gradient_is_made_dense_where_that_is_the_same() -> None:
    model, reference = (nn.Embedding(4, 2, sparse=True) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    opt, _table = optimizer(model)
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for m, o in ((model, opt), (reference, plain)):
        m(torch.tensor([1, 1, 3])).sum().backward()
        o.step()
    assert torch.equal(model.weight, reference.weight)


def test_elsewhere_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    client: Any = FakeClient()
    opt = headwater.Optimizer(model, torch.optim.Adam, client=client)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"gradient of 'weight' is sparse"):
        opt.step()


def test_create_graph_does_not_tie_the_table_to_the_graph() -> None:
    model = chain()
    _opt, table = optimizer(model)
    with pytest.warns(UserWarning, match="create_graph=True"):
        model(torch.ones(1, 4)).square().sum().backward(create_graph=True)
    assert not any(g.requires_grad for g in table.gradients.values())


def test_the_last_step_is_the_last_that_was_answered() -> None:
    model = chain()
    opt, table = optimizer(model)
    assert opt.last_step is None
    for late in (False, True):
        table.late = late
        backward(model)
        opt.step()
        opt.zero_grad()
    assert opt.last_step is not None
    assert opt.last_step.clock == 1
    table.late = False
    assert opt.last_step.clock == 2


def test_a_closure_is_called_once_before_the_step() -> None:
    model = chain()
    opt, table = optimizer(model)

    def closure() -> torch.Tensor:
        loss: torch.Tensor = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert torch.equal(loss, loss)
    assert [call for call, _ in table.calls] == ["push", "step", "wait"]
