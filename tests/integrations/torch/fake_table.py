"""A client whose server is a dictionary: it notes every call, and values arrive only when they are waited for.

With it a test sees what a real cluster hides by being fast: a parameter that is read before it was waited for
holds its old value here. The optimizer is plain SGD, whatever the spec says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from headwater.client import StepResult, Ticket
from headwater.client.naming import Names
from headwater.errors import HeadwaterError
from headwater.types import DenseSpec
from headwater.wire.tensors import DTYPES

Call = tuple[str, tuple[str, ...]]


class FakeTable:
    """One worker's table; ``calls`` is its journal, ``server`` the values that a wait would bring."""

    live = False

    def __init__(self, spec: DenseSpec, values: Mapping[str, torch.Tensor]) -> None:
        self.spec = spec
        self.calls: list[Call] = []
        self.groups: list[object] = []
        self.failures = 0
        self.late = False  # whether steps stay without an answer
        self.fails: HeadwaterError | None = None  # what the next push raises
        self.by_bytes = False  # whether a push takes what the memory holds then, or the step what it holds at its end
        self.wrote: dict[str, torch.Tensor] = {}  # what steps brought of the script's writes
        self.gradients = _flat(spec)
        self.values = _flat(spec)
        self.server = {p.name: values.get(p.name, torch.full(p.shape, 0.5, dtype=DTYPES[p.dtype])).clone()
                       for p in spec.parameters}  # fmt: skip
        self._pushed: dict[str, torch.Tensor] = {}
        self._arrived: dict[str, torch.Tensor] = {}
        self._clock = 0
        self.digest = 0
        self.renewals: list[Callable[[], None]] = []
        self.wait()
        self.calls.clear()

    def when_renewed(self, act: Callable[[], None]) -> Callable[[], None]:
        self.renewals.append(act)
        return lambda: self.renewals.remove(act)

    @property
    def clock(self) -> int:
        return self._clock

    @property
    def pushes(self) -> list[tuple[str, ...]]:
        return [names for call, names in self.calls if call == "push"]

    @property
    def waits(self) -> list[tuple[str, ...]]:
        return [names for call, names in self.calls if call == "wait"]

    def push(self, names: Sequence[str], groups: object = None, *, anew: bool = False) -> None:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        if anew:
            self._pushed = {}
        assert self.by_bytes or not self._pushed.keys() & set(names), "the same gradient was pushed twice in a step"
        self.calls.append(("anew" if anew else "push", tuple(names)))
        self.groups.append(groups)
        self._pushed.update({name: self.gradients[name].clone() for name in names})

    def step(
        self,
        groups: object = None,
        skip: bool = False,
        *,
        merged: bool = False,
        based: int = 0,
        writes: Mapping[str, torch.Tensor] | None = None,
    ) -> Ticket:
        self.calls.append(("skip" if skip else "step", ()))
        self.groups.append(groups)
        self._clock += 1
        self.wrote = dict(writes or {})
        self.server.update({name: value.clone() for name, value in self.wrote.items()})
        for name, gradient in self._pushed.items():
            if not skip:
                self.server[name] -= 0.25 * (gradient if self.by_bytes else self.gradients[name])
        self._pushed = {}
        result = StepResult(self._clock, not skip, None, 0, self._clock)
        late = self.late
        return Ticket(lambda: not (late and self.late), lambda timeout: result)

    def wait(self, names: Iterable[str] | None = None, timeout: float | None = None) -> None:
        names = tuple(self.server if names is None else names)
        self.calls.append(("wait", names))
        for name in names:
            self.values[name].copy_(self.server[name])
            self._arrived[name] = self.server[name].clone()

    def written(self) -> list[str]:
        return [name for name, value in self.values.items() if not torch.equal(value, self._arrived[name])]

    def gradient_runs(self, names: Sequence[str]) -> list[torch.Tensor]:
        return [self.gradients[name].view(-1) for name in names]

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        self.server.update({name: value.clone() for name, value in values.items()})
        self.wait()

    def settle(self) -> None:
        pass

    def refresh(self) -> None:
        pass


class FakeClient:
    """``world`` of one."""

    rank, world, members, alone = 0, 1, 1, True

    def __init__(self) -> None:
        self.tables: dict[str, FakeTable] = {}
        self.closed = False
        self.names = Names()

    def table(self, spec: DenseSpec, values: Mapping[str, torch.Tensor] | None = None, claim: str = "any") -> FakeTable:
        self.tables[spec.name] = FakeTable(spec, values or {})
        return self.tables[spec.name]

    def close(self) -> None:
        self.closed = True


def _flat(spec: DenseSpec) -> dict[str, torch.Tensor]:
    """Each with memory of its own."""
    return {p.name: torch.zeros(p.shape, dtype=DTYPES[p.dtype]) for p in spec.parameters}
