"""Values arrive before they are used: forward pre-hooks wait for just what their module needs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headwater import interrupts
from headwater.errors import WorkerLost
from headwater.integrations.torch_leaves import Held, Leaf

if TYPE_CHECKING:
    from headwater.integrations.torch_buffers import Buffers


# torch.compiler.disable would import the compiler here and now.
_untraceable: Any = torch._disable_dynamo  # type: ignore[attr-defined]  # noqa: SLF001


class _Inert:
    """What becomes of a hook in a copied model."""

    def __call__(self, *_args: Any) -> None:
        pass


class _Hook:
    """Copying or pickling a model copies its hooks; a copy of ours does nothing: that model has its own tensors."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Inert, ()


class Arrival(_Hook):
    """The forward pre-hook of one module. ``seen``: the step whose values it has waited for."""

    __slots__ = ("arrivals", "leaves", "path", "seen")

    def __init__(self, arrivals: Arrivals, path: str, leaves: Sequence[Leaf]) -> None:
        self.arrivals = arrivals
        self.path = path
        self.leaves = list(leaves)
        self.seen = -1

    def __call__(self, _module: torch.nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            self._untraced()
        elif self.seen != self.arrivals.held.clock:
            self.arrivals.arrive(self)

    @_untraceable  # type: ignore[untyped-decorator]
    def _untraced(self) -> None:
        """Inside ``torch.compile``: a step's number must not become a constant of the compiled graph."""
        if self.seen != self.arrivals.held.clock:
            self.arrivals.arrive(self)


class WholeState(_Hook):
    """The hook before a model's ``state_dict`` is read or loaded: the model must hold what the servers do."""

    __slots__ = ("arrivals",)

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals

    def __call__(self, *_args: Any) -> None:
        self.arrivals.wait_all()


class Arrivals:
    """The way in of one optimizer's values.

    Every module waits for its own parameters. Those of a module that the first forward did not call, but
    whose parameters others use (attention reads its projection's weight so), are waited for by the nearest
    module above it that was called; failing that, by whichever module is called first.
    """

    def __init__(self, model: torch.nn.Module, held: Held, buffers: Buffers) -> None:
        self.held = held
        self._buffers = buffers
        self._called: dict[str, Arrival] | None = {}  # in the first forward, by path in the order of use
        self._strays: list[Leaf] = []  # waited for by the first module called after a step
        self._strays_seen = -1
        by_id = {id(leaf.parameter): leaf for leaf in held.leaves}
        self._hooks: dict[str, Arrival] = {}
        self._handles: list[Any] = []
        for path, module in model.named_modules():
            leaves = [by_id[id(p)] for p in module.parameters(recurse=False) if id(p) in by_id]
            if leaves or not path or buffers.owns(module):
                hook = self._hooks[path] = Arrival(self, path, leaves)
                # First of all hooks: weight_norm and others read parameters in hooks of their own.
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        whole: Any = WholeState(self)
        self._handles.append(model.register_state_dict_pre_hook(whole))  # type: ignore[no-untyped-call]
        self._handles.append(model.register_load_state_dict_pre_hook(whole))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @interrupts.deferred
    def arrive(self, hook: Arrival) -> None:
        """A module with ``hook`` is about to run for the first time since a step."""
        held = self.held
        if self._called is not None:
            self._called.setdefault(hook.path, hook)
        if not hook.path and not torch.is_grad_enabled():
            self.wait_all()  # evaluation may take other ways through the model, and has no backward to overlap
        needed = hook.leaves if self._strays_seen == held.clock else hook.leaves + self._strays
        pending = [leaf for leaf in dict.fromkeys(needed) if leaf.fresh != held.clock]
        self._wait(pending)
        self._strays_seen = hook.seen = held.clock

    @interrupts.deferred
    def wait_all(self) -> None:
        """Wait for all parameters and buffers."""
        self._wait([leaf for leaf in self.held.leaves if leaf.fresh != self.held.clock])

    def _wait(self, leaves: Sequence[Leaf]) -> None:
        """Wait for these leaves, and for the buffers if a step of them is under way."""
        try:
            if leaves:
                self.held.wait(leaves)
            self._buffers.arrive()
        except WorkerLost:
            for settle in (self.held.table.settle, self._buffers.arrive):
                with contextlib.suppress(WorkerLost):  # one step of two tables was lost; to hear it once is enough
                    settle()
            raise

    def next_step(self) -> None:
        """After the first step: settle who waits for parameters of modules that were not called."""
        if not self._called:
            if self._called is not None:
                self._strays = list(self.held.leaves)
            return
        self._strays = []
        for path, hook in self._hooks.items():
            if path not in self._called:
                user = _nearest(path, self._called)
                (self._strays if user is None else user.leaves).extend(hook.leaves)
        self._called = None


def _nearest(path: str, called: Mapping[str, Arrival]) -> Arrival | None:
    """The called module nearest above ``path``."""
    while path:
        path = path.rpartition(".")[0]
        if path in called:
            return called[path]
    return None
