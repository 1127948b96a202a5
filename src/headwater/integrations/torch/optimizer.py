"""``headwater.Optimizer``: a ``torch.optim.Optimizer`` whose parameters and state live on the servers.

The way of a gradient: autograd's hook (gradients.py) → ``Table.push`` → … → the servers' optimizer;
the way of the values: ``Core.end`` → ``Table.step`` → ``Table.wait`` (values.py).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from headwater import interrupts
from headwater.client import connecting
from headwater.errors import UsageError
from headwater.integrations.base.steps import TrainOptions
from headwater.integrations.torch.buffers import Mode
from headwater.integrations.torch.core import Core
from headwater.integrations.torch.model import Inits, Setup, on_servers, set_up
from headwater.integrations.torch.state import State
from headwater.integrations.torch.worker_optimizer import WorkerOptimizer
from headwater.integrations.torch.wrappers import LateWrapperHook, take_over, unwrapped
from headwater.types import Bulk, Sync

if TYPE_CHECKING:
    from headwater.client import Client, Publication, StepResult

_OPEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_OPEN_LOCK = threading.Lock()


@atexit.register  # after that of ``connecting``, so before it: the clients leave last
def _close_at_exit() -> None:
    """A script that ended well finishes its last steps; one that failed is lost, and the others are told so."""
    if getattr(sys, "last_value", None) is None:
        for optimizer in list(_OPEN):
            optimizer.close()


def _in_child() -> None:
    """A forked child ends for itself: its parent trains on."""
    global _OPEN_LOCK
    _OPEN_LOCK = threading.Lock()
    _OPEN.clear()


os.register_at_fork(after_in_child=_in_child)


class Optimizer(torch.optim.Optimizer):
    """Train ``model`` through the parameter server; the line of a script that changes.

    Gradients leave while ``backward()`` runs, the servers step them with ``optimizer``, and when ``step()`` returns the
    model holds the new values. Under ``Bulk`` the parameters of all workers are, bit for bit, those of one process that
    accumulates every worker's gradients in rank order, divides by their number and calls the same torch optimizer
    (``fused=True`` for Adam and AdamW).

    What a script does between two steps counts, as in plain torch: what ``.grad`` holds at ``step()`` is the gradient
    (with several workers whoever looks at it sees the mean of all, and what the lowest rank makes of it counts), and
    what was written into a parameter is the state that the next step starts from (the lowest rank's).

    Args:
        model: the module to train, or a list or mapping of several. Parameters are known by their names in it; all
            workers give them the same names, shapes and dtypes. Those on the CPU become the table's own memory. Those
            on another device, or not in C order, stay where they are, and are copied to the table and back.
        optimizer: a class of ``torch.optim``. Those of the closed list (``headwater.wire.optimizers.KNOWN``) run on the
            servers; any other at each worker, on the mean gradient.
        params: None for all parameters in one group, or parameters or groups as any torch optimizer takes them, of the
            model or beside it. Frozen ones come into the table when they are unfrozen.
        args: the optimizer's own arguments by position, as behind ``params`` in torch.
        sync: ``Bulk()``, ``Stale(bound)`` or ``Async()``.
        max_grad_norm: clip the aggregate gradient, over all shards, to this 2-norm.
        nonfinite: what a NaN or Inf in a gradient does: ``"error"`` raises in ``step()``, ``"skip"`` passes over the
            step on all workers, ``"allow"`` takes it.
        overlap: ``step()`` returns at once, and each module's forward waits for just the values that it needs. Other
            looks at a parameter wait too, but for those of C++ code and of tensors that share its memory. Under
            ``Stale`` and ``Async`` gradients then leave during ``backward()``, and must not change any more.
        client: from ``headwater.connect``; by default the one that the process has, or one from the environment that
            all its optimizers share.
        name: the table's name; workers with the same name train the same parameters. By default "model", "model2", …
            in the order in which this process makes its optimizers.
        resume: go on with the values and state of a table that is there: one that an earlier optimizer of this script
            has trained, or an earlier run in the same cluster.
        init: None: the model's own values, of the lowest rank that is there when the table is made. A
            ``headwater.init`` value, or a mapping of glob pattern of names to one: the servers fill the
            parameters, and the model may be on the meta device.
        buffers: persistent module buffers after a step are their ``"mean"`` over workers, ``"rank0"``'s, or
            ``"local"``.
        bucket_bytes: gradients leave in buckets of about this many bytes.
        seed: of the servers' initialisers.
        hyper: the optimizer's own arguments (``lr=…``), checked by torch.

    Attributes:
        param_groups: as in torch; what a scheduler writes there travels with the next step.
        state: the servers' state, fetched when somebody looks; what is changed in it is theirs with the next step.

    Example:
        >>> opt = headwater.Optimizer(model, torch.optim.AdamW, lr=3e-4)   # doctest: +SKIP
        >>> model(x).mean().backward(); opt.step(); opt.zero_grad()        # doctest: +SKIP

    Raises:
        UsageError: the parameters cannot be held (see the message).
        UnknownOptimizer: a hyperparameter is not one that the servers know.
        TableConflict: another worker declared the table differently; or the name is that of a table which another
            optimizer trains, or has trained before this run, and ``resume`` does not say that this is meant.
        UnknownTable: ``resume``, and there is no such table.
        NotEnoughMemory: a server has no room for it.
    """

    @interrupts.deferred
    @torch.inference_mode(False)
    def __init__(
        self,
        model: Any,
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        params: Any = None,
        *args: Any,
        sync: Sync | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Literal["error", "skip", "allow"] = "error",
        overlap: bool = False,
        client: Client | None = None,
        name: str | None = None,
        resume: bool = False,
        init: Inits = None,
        buffers: Mode = "mean",
        bucket_bytes: int = 4 << 20,
        seed: int = 0,
        **hyper: Any,
    ) -> None:
        if bucket_bytes <= 0:
            raise UsageError(f"bucket_bytes={bucket_bytes}: must be above 0")
        if nonfinite not in ("error", "skip", "allow"):
            raise UsageError(f"nonfinite={nonfinite!r}: must be 'error', 'skip' or 'allow'")
        if isinstance(params, int | float) or (isinstance(params, torch.Tensor) and not params.ndim):
            params, args = None, (params, *args)  # torch.optim.SGD(model.parameters(), 0.1), without the parameters
        module, reducing, params = _sorted_out(model, params)
        self._made(set_up(module, optimizer, params, args, hyper))
        if on_servers(type(optimizer)):
            raise UsageError("an optimizer that is made already goes into headwater.wrap(optimizer, model)")
        kind = str(getattr(optimizer, "__name__", "")) if on_servers(optimizer) else ""
        options = TrainOptions(
            kind, Bulk() if sync is None else sync, max_grad_norm, nonfinite, bucket_bytes, seed, overlap
        )
        self._connect(module, options, buffers, client, name, init, resume)
        take_over(reducing, _held_by_servers, self._core.say_once)

    def _made(self, made: Setup) -> None:
        """Be the torch optimizer that the arguments describe, of all but its state and step."""
        self._building = True
        self._setup = made
        self._state: Any = {}
        self._here: WorkerOptimizer | None = None
        super().__init__(made.groups, made.defaults)
        self._building = False
        if made.inner is not None:
            self.param_groups = made.inner.param_groups

    def _connect(
        self,
        module: torch.nn.Module,
        options: TrainOptions,
        buffers: Mode,
        client: Client | None,
        name: str | None,
        init: Inits,
        resume: bool,
    ) -> None:
        made = self._setup
        client = connecting.shared(self) if client is None else client
        groups = weakref.WeakMethod(self._present_groups)
        core = Core(client, module, made.parameters, lambda: _called(groups), options, buffers)
        try:
            core.attach(client.names.choose(name, resume, client.tables), init, "resume" if resume else "new")
        except BaseException:
            connecting.release(self)
            raise
        self._core: Core = core
        _take_from_others(made.parameters)
        self._here = None if made.inner is None else WorkerOptimizer(core, made.inner)
        self._state = State(core.slots)
        client.names.take(core.name, self)
        self._watch: Any = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._watch = module.register_forward_pre_hook(LateWrapperHook(_held_by_servers, core.say_once))
        with _OPEN_LOCK:
            _OPEN.add(self)

    def give_way(self, parameters: Iterable[torch.Tensor]) -> None:
        """Another optimizer serves the gradients of these."""
        self._core.gradients.give_way(parameters)

    def _present_groups(self) -> list[dict[str, Any]]:
        return self.param_groups

    # ---- the step ------------------------------------------------------------------------------

    @interrupts.deferred
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step: what ``.grad`` holds is this worker's gradient, and a parameter without one takes no part.

        Returns when the model holds the new values, or with ``overlap`` at once: then the next wait (of a forward, of
        ``synchronize()``, of the next step) raises what went wrong in this one.

        Args:
            closure: computes the loss and calls ``backward()``; called once, before the step (by an optimizer that
                runs at the worker as often as that wants).

        Returns:
            What ``closure`` returned.

        Raises:
            NonFiniteGradient: NaN or Inf, and the policy is "error". The step was not taken.
            ParameterModified: a parameter is of another shape, dtype or device now. The step was not taken.
            UsageError: the workers did not do the same (one clipped, another did not). The step was not taken.
            GradientModified: with ``overlap`` and without ``Bulk``, a gradient changed after it had left.
            WorkerLost, LinkBroken, DeadlineExceeded: see their messages for what is true then.
        """
        core = self._open_core()
        if self._here is not None:
            return self._here.step(closure)
        self._take_state()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = interrupts.interruptible(closure)
        core.step()
        return loss

    @interrupts.deferred
    def _take_state(self) -> None:
        """What the script has made of ``state`` since the last step is the servers'."""
        changed = self._state.changed() if isinstance(self._state, State) else dict(self._state)
        if changed is not None:
            self._core.assign_slots({id(p): slots for p, slots in changed.items()})
            self._state = State(self._core.slots)

    def skip_step(self) -> None:
        """Give this step up, on all workers: what has left is dropped, parameters and state stay as they are.

        Under ``Stale`` and ``Async`` with ``overlap`` what has left may be applied already.
        """
        self._open_core().skip()

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, ``backward()`` accumulates gradients locally, as for ``DistributedDataParallel.no_sync``.

        It is never needed: gradients of several ``backward()`` accumulate anyway. It says before the first step what is
        learnt from it otherwise: which of them is the last.
        """
        return self._open_core().gradients.staying()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip the gradient of this step, with several workers their mean, to ``max_norm``; returns its norm before.

        As ``torch.nn.utils.clip_grad_norm_`` of all parameters, on every worker. ``max_grad_norm=`` of the constructor
        is faster: the servers clip, and nothing has to come back first.
        """
        core = self._open_core()
        if core.several():
            core.gradients.see_mean()  # before gradients are listed: others may have some that this worker has not
        parameters = [p for group in self.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    @interrupts.deferred
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        if not self._core.closed and set_to_none:
            self._core.follow_groups()  # before a backward whose gradients somebody may look at
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if set_to_none:
                    p.grad = None
                    continue
                if p.grad.requires_grad:  # it has a graph of its own
                    p.grad.detach_()
                p.grad.zero_()

    # ---- values --------------------------------------------------------------------------------

    @interrupts.deferred
    def synchronize(self) -> None:
        """Wait until the model holds the outcome of the last step: needed with ``overlap`` only.

        Raises what went wrong in the step, or ``DeadlineExceeded``.
        """
        self._core.arrive()

    @interrupts.deferred
    def assign(self, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Set parameters (and module buffers) on the servers now, outside the optimizer; its state stays.

        Every worker calls it, with the same values.

        Args:
            values: by name, in the parameter's shape and dtype; None: the model's present values, all of them.

        Raises:
            UsageError: a name that is not in the table.
            ShapeMismatch: a shape or dtype that is not the parameter's.
        """
        core = self._open_core()
        buffers = core.buffers.values()
        core.arrive()
        if values is None:
            core.held.written()
            values = {leaf.name: leaf.parameter.detach() for leaf in core.held.leaves} | buffers
        leaves = [leaf for leaf in core.held.leaves if leaf.name in values]
        strangers = values.keys() - {leaf.name for leaf in leaves} - buffers.keys()
        if strangers:
            raise UsageError(f"{sorted(strangers)[:3]} are not in the table {core.table.spec.name!r}")
        if leaves:
            core.assign({leaf.name: core.kept(leaf, values[leaf.name]) for leaf in leaves})
        core.buffers.assign({name: values[name] for name in buffers if name in values})

    @interrupts.deferred
    def publish(
        self,
        name: str,
        metadata: Mapping[str, str] | None = None,
        *,
        keep: int = 3,
        age: float | None = None,
        tags: Iterable[str] = (),
        step: int | None = None,
    ) -> Publication:
        """Make the model as it is after this worker's last step a version that readers can lease; one worker calls it.

        Parameters and module buffers, as all shards hold them. See ``Client.publish`` for the arguments and errors;
        the version's model is this optimizer's ``name``. Raises ``ParameterModified`` if parameters were written since
        the step and there are other workers.
        """
        core = self._open_core()
        core.flush("publish()")
        tables = [core.table, *core.buffers.tables]
        model = core.name.partition("~")[0]
        wanted: dict[str, Any] = {"metadata": metadata, "keep": keep, "age": age, "tags": tags, "step": step}
        return core.client.publish(tables, name, model=model, **wanted)

    @property
    def clock(self) -> int:
        """The number of the last step that this worker has ended: under ``Bulk`` the same on all workers.

        A worker that joins later begins where the others are; advance its schedulers by it.
        """
        return self._core.clock

    @property
    def last_step(self) -> StepResult | None:
        """The outcome of the last step that is complete (clock, norm, staleness), None before the first."""
        self._core.note_last()
        return self._core.last

    def statistics(self) -> Any:
        """The client's counters: bytes pushed and pulled, steps, staleness, seconds waited."""
        return self._core.client.statistics()

    # ---- torch's own interface -----------------------------------------------------------------

    @interrupts.deferred
    def state_dict(self) -> dict[str, Any]:
        """The servers' state in torch's format: the plain torch optimizer of the same class can load it."""
        core = self._open_core()
        if self._here is not None:
            return self._here.inner.state_dict()
        core.arrive()
        self._take_state()
        with self._holding_state():
            self._state = dict(core.slots())
            return super().state_dict()

    @interrupts.deferred
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the servers the state, and the groups their hyperparameters, of this or the plain torch optimizer.

        Every worker calls it with the same state. Parameters without state in ``state_dict`` lose theirs.

        Raises:
            ValueError: other groups or other numbers of parameters (torch's own check).
            UnknownOptimizer: state or hyperparameters of another optimizer.
        """
        core = self._open_core()
        if self._here is not None:
            self._here.inner.load_state_dict(state_dict)
            self.param_groups = self._here.inner.param_groups
            return
        core.arrive()
        with self._holding_state():
            super().load_state_dict(state_dict)
            state = {id(p): found for p, found in self._state.items()}
        core.assign_slots(state)

    @contextmanager
    def _holding_state(self) -> Iterator[None]:
        """``self.state`` is a plain dictionary only while torch's code reads or writes it."""
        try:
            yield
        finally:
            self._state = State(self._core.slots)

    @property
    def state(self) -> Any:
        return self._state if self._here is None else self._here.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        if self._here is None:
            self._state = value
        else:
            self._here.inner.state = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's own way to give an optimizer the state and groups that it has read."""
        for name, value in state.items():
            setattr(self, name, value)

    @interrupts.deferred
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch: these parameters are trained from now on. On every worker, between the same two steps.

        A table cannot grow, so there is a new one with the values and the state of this: it takes a moment.
        """
        if self._building:  # torch's constructor
            super().add_param_group(param_group)
            return
        core = self._open_core()
        if self._here is not None:
            self._here.inner.add_param_group(param_group)
        else:
            super().add_param_group(param_group)
        core.follow_groups()

    @interrupts.deferred
    def close(self) -> None:
        """Leave the model with its present values in memory of its own, and the table on the servers."""
        core = self._core
        if core.closed:
            return
        if self._watch is not None:
            self._watch.remove()
        core.close()
        with _OPEN_LOCK:
            _OPEN.discard(self)
        core.client.names.release(core.name)
        connecting.release(self)

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise UsageError(
            "headwater.Optimizer cannot be pickled or copied: its state is on the servers. Save state_dict() instead"
        )

    def _open_core(self) -> Core:
        if self._core.closed:
            raise UsageError("the optimizer is closed; the model keeps the values it had then")
        return self._core


def wrap(optimizer: torch.optim.Optimizer, model: Any, **manner: Any) -> Optimizer:
    """A ``headwater.Optimizer`` in place of a torch optimizer that somebody else has made (a factory).

    Args:
        optimizer: of parameters of ``model``, with its groups, hyperparameters and state; not to be used any more.
        model: as for ``headwater.Optimizer``.
        manner: keyword arguments of ``headwater.Optimizer`` that say how to train: ``sync``, ``max_grad_norm``, …

    Example:
        >>> opt = headwater.wrap(create_optimizer(model, "adamw"), model)   # doctest: +SKIP

    Raises as ``headwater.Optimizer``, and ``UsageError`` for what is no torch optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, Optimizer):
        raise UsageError(f"headwater.wrap takes a torch optimizer that is made already, not {type(optimizer).__name__}")
    kind = type(optimizer)
    state = optimizer.state_dict() if optimizer.state else None
    if on_servers(kind):
        made = Optimizer(model, kind, optimizer.param_groups, **manner, **_arguments(optimizer))
    else:
        made = Optimizer(model, optimizer, optimizer.param_groups, **manner)
    if on_servers(kind):
        for group, full in zip(optimizer.param_groups, made.param_groups, strict=True):
            group.update(full)  # a scheduler may have them already
        made.param_groups = optimizer.param_groups
        if state is not None:
            made.load_state_dict(state)
            for group, full in zip(optimizer.param_groups, made.param_groups, strict=True):
                group.update(full)
            made.param_groups = optimizer.param_groups
    return made


def _arguments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The defaults that the class takes as arguments; what torch wrote among them is left out."""
    import inspect

    takes = inspect.signature(type(optimizer).__init__).parameters
    return {key: value for key, value in optimizer.defaults.items() if key in takes}


def _sorted_out(model: Any, params: Any) -> tuple[torch.nn.Module, list[torch.nn.Module], Any]:
    """The module, its reducing wrappers, and the parameters; as in torch ``model`` may be the parameters themselves."""
    if params is None and _are_parameters(model := _listed(model)):
        return torch.nn.Module(), [], model
    module, reducing = unwrapped(model)
    return module, reducing, params


def _listed(model: Any) -> Any:
    """A generator (``model.parameters()``) can be read once only."""
    return list(model) if isinstance(model, Iterator) else model


def _are_parameters(given: Any) -> bool:
    if isinstance(given, torch.Tensor):
        return True
    plain = isinstance(given, list | tuple) and bool(given)
    return plain and all(isinstance(item, torch.Tensor | tuple) or _is_group(item) for item in given)


def _is_group(item: Any) -> bool:
    return isinstance(item, dict) and "params" in item


def _held_by_servers() -> set[int]:
    with _OPEN_LOCK:
        return {id(p) for optimizer in _OPEN for group in optimizer.param_groups for p in group["params"]}


def _called(method: weakref.WeakMethod[Any]) -> Any:
    found = method()
    return [] if found is None else found()


def _take_from_others(parameters: Mapping[str, torch.Tensor]) -> None:
    """As in torch the same parameters may be given to another optimizer, after the first one's phase or in turns.

    The new one serves their gradients from now on; whoever steps starts from the values that are there.
    """
    with _OPEN_LOCK:
        others = list(_OPEN)
    for other in others:
        other.give_way(parameters.values())
