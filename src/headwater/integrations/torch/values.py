"""Values arrive before they are used: at the end of a step, or, with ``overlap``, when somebody wants them.

With ``overlap`` forward pre-hooks wait for just what their module needs. Whoever else looks at a parameter meets a
guard: between the step and the arrival its class is one whose every operation waits first.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headwater import interrupts
from headwater.errors import WorkerLost
from headwater.integrations.torch.lazy import DESCRIBES, no_torch_function
from headwater.integrations.torch.parameters import Leaf, Parameters

if TYPE_CHECKING:
    from headwater.integrations.base.values import StepValues
    from headwater.integrations.torch.buffers import Buffers


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


class ForwardHook(_Hook):
    """The forward pre-hook of one module. ``seen``: the step whose values it has waited for."""

    __slots__ = ("leaves", "path", "seen", "values")

    def __init__(self, values: LazyValues, path: str, leaves: Sequence[Leaf]) -> None:
        self.values = values
        self.path = path
        self.leaves = list(leaves)
        self.seen = -1

    def __call__(self, _module: torch.nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            self._untraced()
        elif self.seen != self.values.step.clock:
            self.values.arrive(self)

    @_untraceable  # type: ignore[untyped-decorator]
    def _untraced(self) -> None:
        """Inside ``torch.compile``: a step's number must not become a constant of the compiled graph."""
        if self.seen != self.values.step.clock:
            self.values.arrive(self)


class StateDictHook(_Hook):
    """The hook before a model's ``state_dict`` is read or loaded: the model must hold what the servers do."""

    __slots__ = ("values",)

    def __init__(self, values: LazyValues) -> None:
        self.values = values

    def __call__(self, *_args: Any) -> None:
        self.values.wait_all()


_GRAD: Any = torch.Tensor.grad
_PASSIVE = DESCRIBES | {_GRAD.__set__, _GRAD.__delete__}
"""What neither reads nor writes a parameter's elements."""


class Guard:
    """Lets parameters wait for their values when they are looked at.

    What C++ code does with a list of them, or with a tensor that shares their memory, is not seen: that is the price of
    ``overlap``.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._kinds: dict[type, type] = {}
        self._wait = wait
        self._guarded: dict[int, tuple[torch.Tensor, type]] = {}

    def put(self, parameters: Iterable[torch.Tensor]) -> None:
        """From now on an operation on one of these waits first."""
        for parameter in parameters:
            kind = type(parameter)
            if kind not in self._kinds:
                self._kinds[kind] = _waiting(kind, self._wait)
            self._guarded[id(parameter)] = parameter, kind
            parameter.__class__ = self._kinds[kind]

    def take(self, parameters: Iterable[torch.Tensor]) -> None:
        """Their values are here."""
        for parameter in parameters:
            found = self._guarded.pop(id(parameter), None)
            if found is not None:
                parameter.__class__ = found[1]


def _waiting(kind: type, wait: Callable[[], None]) -> type:
    def function(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PASSIVE:
            wait()
        with no_torch_function():
            return func(*args, **(kwargs or {}))

    def deepcopy(self: Any, memo: Any) -> Any:
        wait()
        return copy.deepcopy(self, memo)

    def reduce(self: Any, protocol: Any) -> Any:
        wait()
        return self.__reduce_ex__(protocol)

    return type(
        kind.__name__, (kind,),
        {
            "__torch_function__": classmethod(function), "__deepcopy__": deepcopy, "__reduce_ex__": reduce,
            "__module__": kind.__module__,
        },
    )  # fmt: skip


def _compiles() -> bool:
    """Whether torch.compile is in use: compiled code does not look for hooks, nor at the class of a parameter."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    backends = getattr(frames, "cached_backends", {}) if frames is not None else {}
    return any(backend is not None for backend in backends.values())


class LazyValues:
    """The way in of one optimizer's values.

    Without ``overlap`` there are no hooks. With it every module waits for its own parameters. Those of a module that
    the first forward did not call, but whose parameters others use (attention reads its projection's weight so), are
    waited for by the nearest module above it that was called; failing that, by whichever module is called first.
    """

    def __init__(
        self, model: torch.nn.Module, held: Parameters, values: StepValues[Leaf], buffers: Buffers, *, overlap: bool
    ) -> None:
        self.held = held
        self.step = values
        self._overlap = overlap
        self._guard = Guard(self.wait_all)
        held.guard = self._guard if overlap else None
        self._buffers = buffers
        self._called: dict[str, ForwardHook] | None = {}  # in the first forward, by path in the order of use
        self._strays: list[Leaf] = []  # waited for by the first module called after a step
        self._strays_seen = -1
        by_id = {id(leaf.parameter): leaf for leaf in held.leaves}
        self._hooks: dict[str, ForwardHook] = {}
        self._handles: list[Any] = []
        if not overlap:
            return
        for path, module in model.named_modules():
            leaves = [by_id[id(p)] for p in module.parameters(recurse=False) if id(p) in by_id]
            if leaves or not path or buffers.owns(module):
                hook = self._hooks[path] = ForwardHook(self, path, leaves)
                # First of all hooks: weight_norm and others read parameters in hooks of their own.
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        whole: Any = StateDictHook(self)
        self._handles.append(model.register_state_dict_pre_hook(whole))  # type: ignore[no-untyped-call]
        self._handles.append(model.register_load_state_dict_pre_hook(whole))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Remove the hooks."""
        self._guard.take(self.held.parameters)
        for handle in self._handles:
            handle.remove()

    @interrupts.deferred
    def arrive(self, hook: ForwardHook) -> None:
        """A module with ``hook`` is about to run for the first time since a step."""
        step = self.step
        if self._called is not None:
            self._called.setdefault(hook.path, hook)
        if not hook.path and not torch.is_grad_enabled():
            self.wait_all()  # evaluation may take other ways through the model, and has no backward to overlap
        needed = hook.leaves if self._strays_seen == step.clock else hook.leaves + self._strays
        pending = [leaf for leaf in dict.fromkeys(needed) if leaf.fresh != step.clock]
        self._wait(pending)
        self._strays_seen = hook.seen = step.clock

    @interrupts.deferred
    def wait_all(self) -> None:
        """Wait for all parameters and buffers."""
        self._wait(self.step.pending())

    def _wait(self, leaves: Sequence[Leaf]) -> None:
        """Wait for these leaves, and for the buffers if a step of them is under way."""
        try:
            if leaves:
                self.step.wait(leaves)
            self._buffers.arrive()
        except WorkerLost:
            for settle in (self.held.table.settle, self._buffers.arrive):
                with contextlib.suppress(WorkerLost):  # one step of two tables was lost; to hear it once is enough
                    settle()
            raise

    def next_step(self) -> bool:
        """A step was sent off. True if its values may arrive later, because whoever looks at them will wait."""
        if not self._overlap or _compiles():
            return False
        self._settle_strays()
        self._guard.put(self.held.parameters)
        return True

    def _settle_strays(self) -> None:
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


def _nearest(path: str, called: Mapping[str, ForwardHook]) -> ForwardHook | None:
    """The called module nearest above ``path``."""
    while path:
        path = path.rpartition(".")[0]
        if path in called:
            return called[path]
    return None
