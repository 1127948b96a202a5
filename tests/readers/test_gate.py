"""Calls of modules of every kind, each inside something of ours, and only those of the module that was asked for."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from headwater.errors import UsageError
from headwater.readers import gate

X = torch.ones(1, 2)


class Keeper:
    """``inside``: how deep; ``calls``: so far. Each outermost call of ``net`` finds its weights doubled before it."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.closed = False
        self.inside = self.calls = 0
        self._net = net

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.calls += 1
        if not self.inside:
            for parameter in self._net.parameters():
                parameter.data = 2 * parameter.data
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Static(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Reused(torch.nn.Linear):
    """Calls itself once."""

    deep = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.deep:
            return super().forward(x)
        self.deep = True
        try:
            return self(x) + 1  # type: ignore[no-any-return]
        finally:
            self.deep = False


def own_forward() -> torch.nn.Module:
    net = torch.nn.Linear(2, 1)
    net.forward = lambda x: 3 * x  # type: ignore[method-assign, assignment]
    return net


KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": lambda: torch.nn.Linear(2, 1),
    "static": Static,
    "reused": lambda: Reused(2, 1),
    "own forward": own_forward,
    "scripted": lambda: torch.jit.script(torch.nn.Linear(2, 1)),
    "traced": lambda: torch.jit.trace(torch.nn.Linear(2, 1), X),  # type: ignore[no-any-return]
    "graph": lambda: torch.fx.symbolic_trace(torch.nn.Linear(2, 1)),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # scripting and tracing are on their way out of torch
def test_a_call_is_what_it_was_with_the_values_of_its_moment(kind: str) -> None:
    net = KINDS[kind]()
    wanted, plain = copy.deepcopy(net), type(net)
    keeper = Keeper(net)
    gate.put(net, keeper)
    for calls in (1, 2):
        for parameter in wanted.parameters():
            parameter.data = 2 * parameter.data
        assert torch.equal(net(X), wanted(X))
        assert keeper.calls == calls * (2 if kind == "reused" else 1)
    assert isinstance(net, plain)
    assert type(net).__name__ == plain.__name__
    keeper.closed = True
    gate.take_away(net)
    assert type(net) is plain
    net(X)
    assert keeper.inside == 0
    assert keeper.calls == 2 * (2 if kind == "reused" else 1)


def test_what_a_modules_own_hooks_make_of_its_parameters_is_of_the_same_moment() -> None:
    """A pre-hook that makes a tensor of a parameter, as some of torch's own do; a hook that looks at it later."""
    net = torch.nn.Linear(2, 1, bias=False)
    made: list[torch.Tensor] = []
    net.register_forward_pre_hook(lambda module, args: made.append(module.weight.detach().clone()))
    net.register_forward_hook(lambda module, args, out: made.append(module.weight.detach().clone()))
    gate.put(net, Keeper(net))
    for _ in range(3):
        net(X)
    assert all(torch.equal(a, b) for a, b in zip(made[::2], made[1::2], strict=True))
    assert torch.equal(made[2], 2 * made[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_is_over(error: type[BaseException]) -> None:
    net = torch.nn.Linear(2, 1)

    def fail(*_: object) -> None:
        raise error("here")

    hook = net.register_forward_pre_hook(fail)
    keeper = Keeper(net)
    gate.put(net, keeper)
    with pytest.raises(error, match="here"):
        net(X)
    assert keeper.inside == 0
    hook.remove()
    net(X)


def replica_of(net: torch.nn.Module) -> torch.nn.Module:
    """As ``DataParallel`` makes it."""
    replica = net._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(1, 2), torch.zeros(1)
    return replica  # type: ignore[no-any-return]


class Given(torch.nn.Linear):
    """Is made from what it was given."""

    def __new__(cls, *_: int) -> Given:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[int, int]:
        return 2, 1


class Reduced(torch.nn.Linear):
    """Says itself how it is made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (2, 1), self.__dict__


class Copied(torch.nn.Linear):
    """Copies itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [torch.nn.Linear, Given, Reduced])
def test_a_copy_is_of_the_plain_class(
    kind: type[torch.nn.Linear], way: Callable[[torch.nn.Module], torch.nn.Module], gates: int
) -> None:
    net = kind(2, 1)
    keepers = [Keeper(net) for _ in range(gates)]
    for keeper in keepers:
        gate.put(net, keeper)
    twin = way(net)
    assert type(twin) is kind
    twin(X)
    assert not any(keeper.calls for keeper in keepers)


@pytest.mark.parametrize(
    ("net", "twin"),
    [
        (torch.nn.Linear(2, 1), lambda net: replica_of(net)),
        (Copied(2, 1), copy.deepcopy),
        (torch.nn.Linear(2, 1), lambda net: type(net)(2, 1)),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1)), copy.deepcopy),
    ],
)
def test_what_has_the_class_and_is_another_module_is_not_kept(
    net: torch.nn.Module, twin: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    """Such as a replica for another device: a call of it that waited for the end of a hold would wait for ever."""
    keeper = Keeper(net)
    gate.put(net, keeper)
    twin(net)(X)
    assert keeper.calls == 0
    net(X)
    assert keeper.calls == 1


def test_a_gate_that_is_under_another_class_lets_calls_through_when_it_is_closed() -> None:
    net = torch.nn.Linear(2, 1)
    keeper = Keeper(net)
    gate.put(net, keeper)
    torch.nn.utils.parametrizations.weight_norm(net)
    net(X)
    keeper.closed = True
    gate.take_away(net)
    net(X)
    assert keeper.calls == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_keepers_of_one_module_go_in_any_order(order: tuple[int, int]) -> None:
    net = torch.nn.Linear(2, 1)
    keepers = [Keeper(net), Keeper(net)]
    for keeper in keepers:
        gate.put(net, keeper)
    net(X)
    assert [keeper.calls for keeper in keepers] == [1, 1]
    for each in order:
        keepers[each].closed = True
        gate.take_away(net)
    assert type(net) is torch.nn.Linear


class Final(torch.nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("nothing is made of this one")


def test_a_class_that_cannot_be_extended_is_refused() -> None:
    net = Final(2, 1)
    with pytest.raises(UsageError, match=r"a Final cannot be followed \(nothing is made of this one\); nothing was"):
        gate.put(net, Keeper(net))
    assert type(net) is Final
    net(X)
