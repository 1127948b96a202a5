"""Gradients leave during backward: which, when, and what stops them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import headwater
from headwater.errors import GradientModified, LinkBroken, NonFiniteGradient, UsageError
from headwater.integrations.torch_departures import _runs
from tests.integrations.fake import FakeClient, FakeTable


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
        assert p.grad is table.gradients[name]
        assert torch.equal(p.grad, reference.get_parameter(name).grad)


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


def test_zeroed_gradients_are_new_tensors() -> None:
    # The servers may still read the old memory.
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    opt.step()
    sent = {name: gradient.clone() for name, gradient in table.gradients.items()}
    opt.zero_grad(set_to_none=False)
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
    assert opt._departures.buckets == [("unused.weight",), ("first.weight",), ("last.weight",)]
    for _ in range(2):
        backward(model)
        opt.step()
    assert opt._departures.buckets == [("last.weight",), ("first.weight",), ("unused.weight",)]


def test_a_parameter_without_gradient_takes_no_part() -> None:
    model = chain()
    opt, table = optimizer(model)
    model[0](torch.ones(1, 4)).sum().backward()
    assert table.pushes == []  # the bucket waits for the others
    opt.step()
    assert table.pushes == [("0.bias", "0.weight")]


def test_hooks_are_free_of_calls_until_a_bucket_is_full() -> None:
    model = chain()
    opt, table = optimizer(model)
    for _ in range(2):
        backward(model)
        opt.step()
        opt.zero_grad()
    opt.synchronize()
    table.calls.clear()
    backward(model)
    assert [call for call, _ in table.calls] == ["push"]


def test_neighbours_are_checked_in_one_go() -> None:
    opt, table = optimizer(chain())
    (bucket,) = opt._departures._buckets
    (run,) = bucket.runs
    table.gradients["0.weight"].fill_(1)
    table.gradients["2.bias"].fill_(2)
    assert run.sum() == 16 + 8


@pytest.mark.parametrize(
    ("spans", "count"),
    [
        ([(0, 0, 16), (0, 16, 32)], 1),
        ([(0, 0, 5), (0, 16, 20)], 1),
        ([(0, 0, 16), (0, 4096, 4112)], 2),
        ([(0, 0, 16), (1, 0, 16)], 2),
        ([(0, 8176, 8192), (1, 0, 16)], 2),
    ],
)
def test_runs_stay_in_one_memory_and_leap_only_over_padding(spans: list[tuple[int, int, int]], count: int) -> None:
    raw = bytearray(2 * 4 * 8192)
    memories = [torch.frombuffer(raw, dtype=torch.float32, count=8192, offset=4 * 8192 * i) for i in range(2)]
    leaves: Any = [SimpleNamespace(gradient=memories[which][start:stop].data) for which, start, stop in spans]
    runs = _runs(leaves)
    assert len(runs) == count
    for leaf in leaves:
        leaf.gradient.fill_(1)
    assert sum(run.sum().item() for run in runs) == sum(stop - start for _, start, stop in spans)


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


def test_a_second_backward_is_refused_with_a_way_on() -> None:
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    with pytest.raises(GradientModified, match=r"'2.bias' on rank 0.*opt\.no_sync\(\).*opt\.skip_step\(\)"):
        backward(model)
    with pytest.raises(GradientModified, match="second backward"):
        opt.step()
    before = {n: v.clone() for n, v in table.server.items()}
    opt.skip_step()
    assert table.calls[-1][0] == "skip"
    opt.zero_grad()
    backward(model)
    opt.step()
    assert all(not torch.equal(table.server[n], before[n]) for n in before)


def _clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def _replace(model: nn.Module) -> None:
    model.get_parameter("1.weight").grad = torch.zeros(4, 4).add_(1)  # as often written to as what left


def _forget(model: nn.Module) -> None:
    model.zero_grad()


@pytest.mark.parametrize("change", [_clip, _replace, _forget])
def test_a_gradient_that_changed_after_it_left_stops_the_step(change: Any) -> None:
    model = chain()
    opt, table = optimizer(model)
    backward(model)
    change(model)
    with pytest.raises(GradientModified, match=r"max_grad_norm=.*scale the loss.*zero_grad\(\) after step\(\)"):
        opt.step()
    assert all(call == "push" for call, _ in table.calls)


def test_gradient_memory_is_not_written_while_it_is_in_flight() -> None:
    model = chain()
    opt, table = optimizer(model, bucket_bytes=1)
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


def test_a_gradient_that_was_zeroed_in_flight_is_noticed() -> None:
    model = chain()
    opt, _ = optimizer(model)
    backward(model)
    opt.step()
    model.zero_grad(set_to_none=False)
    with pytest.raises(GradientModified, match="may have been reading it"):
        model(torch.ones(1, 4))
    model(torch.ones(1, 4))  # said once; the values are here


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_a_gradient_that_is_not_finite_does_not_leave(bad: float, bucket_bytes: int) -> None:
    model = chain()
    opt, table = optimizer(model, bucket_bytes=bucket_bytes)
    model[1].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), bad))
    with pytest.raises(NonFiniteGradient, match=r"'1.weight' on rank 0 holds NaN or Inf"):
        backward(model)
    assert not any("1.weight" in names for names in table.pushes)
    with pytest.raises(NonFiniteGradient):
        opt.step()
    assert "step" not in [call for call, _ in table.calls]


def test_a_partial_bucket_is_checked_too() -> None:
    model = chain()
    opt, _table = optimizer(model)
    (model[0](torch.ones(1, 4)).sum() * float("nan")).backward()
    with pytest.raises(NonFiniteGradient, match=r"'0.bias'"):
        opt.step()


def test_skip_passes_over_the_step_and_goes_on() -> None:
    model = chain()
    opt, table = optimizer(model, nonfinite="skip", bucket_bytes=1)
    handle = model[1].weight.register_hook(lambda g: g * float("nan"))
    backward(model)
    opt.step()
    opt.zero_grad()
    handle.remove()
    assert table.pushes == [("2.bias",), ("2.weight",), ("1.bias",)]  # nothing leaves once the step is lost
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
    with pytest.raises(LinkBroken):
        opt.step()
    assert table.calls == []


def test_a_parameter_unfrozen_later_is_noticed() -> None:
    model = chain()
    model[0].bias.requires_grad_(False)
    opt, _table = optimizer(model)
    backward(model)
    opt.step()
    opt.zero_grad()
    model[0].bias.requires_grad_(True)
    backward(model)
    with pytest.raises(UsageError, match=r"'0\.bias' was frozen"):
        opt.step()


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer(model)
    with pytest.raises(UsageError, match=r"gradient of 'weight' is sparse"):
        model(torch.tensor([1])).sum().backward()


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
    assert [call for call, _ in table.calls] == ["push", "step"]
