"""``headwater.Optimizer``: a ``torch.optim.Optimizer`` whose parameters and state live on the servers.

The way of a gradient: autograd's hook (torch_departures) → ``Table.push`` → … → the servers' optimizer;
the way of the values: ``Table.step`` → ``Table.wait`` in a forward pre-hook (torch_arrivals).
"""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from headwater.errors import HeadwaterError, UsageError
from headwater.integrations.torch_arrivals import Arrivals
from headwater.integrations.torch_buffers import Buffers, Mode
from headwater.integrations.torch_departures import Departures, Groups
from headwater.integrations.torch_leaves import Held, shares_memory
from headwater.integrations.torch_plan import Inits, materialise, optimizer_spec, plan
from headwater.integrations.torch_told import Told
from headwater.types import Bulk, Sync, TableSpec
from headwater.wire import optimizers

if TYPE_CHECKING:
    from headwater.client import Client, Publication, StepResult, Ticket

_OPEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_OPEN_LOCK = threading.Lock()


def _close_at_exit() -> None:
    """A script that ended well finishes its last step; one that failed is lost, and the others are told so."""
    if getattr(sys, "last_value", None) is None:
        for optimizer in list(_OPEN):
            if optimizer.owns_client:
                optimizer.close()


atexit.register(_close_at_exit)


class Optimizer(torch.optim.Optimizer):
    """Train ``model`` through the parameter server; the line of a script that changes.

    Gradients leave while ``backward()`` runs, the servers step them with ``optimizer``, and each module's
    forward waits for just the values it needs. Under ``Bulk`` the parameters of all workers are, bit for bit,
    those of one process that accumulates every worker's gradients in rank order, divides by their number and
    calls the same torch optimizer (``fused=True`` for Adam and AdamW).

    Args:
        model: the module to train. Parameters are known by their names in it; all workers give them the same
            names, shapes and dtypes. Those on the CPU become the table's own memory. Those on another device
            stay there, and are copied to the table and back.
        optimizer: a class of ``torch.optim`` from the closed list (``headwater.wire.optimizers.KNOWN``).
        params: None for all trainable parameters in one group, or parameters or groups of the model as any
            torch optimizer takes them. Frozen parameters are left out of the table.
        sync: ``Bulk()``, ``Stale(bound)`` or ``Async()``.
        max_grad_norm: clip the aggregate gradient, over all shards, to this 2-norm.
        nonfinite: what a NaN or Inf in a gradient does: ``"error"`` raises before it leaves, ``"skip"`` passes
            over the step on all workers, ``"allow"`` sends it.
        client: from ``headwater.connect``; by default one from the environment, closed with the optimizer.
        name: the table's name; workers with the same name train the same parameters.
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
        state: empty, since the state is on the servers; ``state_dict()`` fetches it.

    Example:
        >>> opt = headwater.Optimizer(model, torch.optim.AdamW, lr=3e-4)   # doctest: +SKIP
        >>> model(x).mean().backward(); opt.step(); opt.zero_grad()        # doctest: +SKIP

    Raises:
        UsageError: the parameters cannot be held (see the message).
        UnknownOptimizer: the optimizer or a hyperparameter is not in the closed list.
        TableConflict: another worker declared the table differently.
        NotEnoughMemory: a server has no room for it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: type[torch.optim.Optimizer],
        params: Any = None,
        *,
        sync: Sync | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Literal["error", "skip", "allow"] = "error",
        client: Client | None = None,
        name: str = "model",
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
        made = plan(model, optimizer, params, hyper)
        _check_free(made.parameters)
        sync = Bulk() if sync is None else sync
        self._name = optimizer.__name__
        spec = TableSpec(
            name,
            made.specs(init),
            optimizer_spec(self._name, made.groups),
            sync,
            max_grad_norm,
            nonfinite,
            seed,
        )
        self._built = False
        super().__init__(made.groups, made.defaults)
        self._built = True
        self._model = model
        self._own_client = client is None
        self._client = _connect() if client is None else client
        try:
            self._attach(model, spec, made.parameters, sync, buffers)
            self._departures = Departures(self._held, made.frozen, bucket_bytes, nonfinite, self._new_groups)
        except BaseException:
            if self._own_client:
                self._client.close()
            raise
        self._arrivals = Arrivals(model, self._held, self._buffers)
        with _OPEN_LOCK:
            _OPEN.add(self)

    def _attach(
        self,
        model: torch.nn.Module,
        spec: TableSpec,
        parameters: Mapping[str, torch.nn.Parameter],
        sync: Sync,
        buffers: Mode,
    ) -> None:
        """Declare the tables and let the model hold their values."""
        given = {p.name: parameters[p.name].detach().cpu() for p in spec.parameters if p.init.kind == "values"}
        known = spec.name in self._client.tables
        self._table = self._client.table(spec, values=given)
        if known:
            self._table.pull()  # an earlier optimizer's: others may have trained it on
        self._buffers = Buffers(model, self._client, spec.name, sync, buffers)
        self._table.wait()
        hosted = {name: p for name, p in parameters.items() if shares_memory(p)}
        materialise(hosted.values(), [self._table.values[name] for name in hosted])
        self._buffers.retie()
        self._held = Held(self._table, parameters, self._client.rank)
        self._held.arrived(self._held.leaves)
        held = weakref.ref(self._held)
        self._table.renewed = self._renewed = lambda: _renew(held())  # else the client would keep the model
        self._sent: Groups = None
        self._ended_with: Groups = None  # the hyperparameters of the last step that was ended
        self._failures = 0  # the table's, when groups were sent last
        self._ticket: Ticket | None = None
        self._last: StepResult | None = None
        self._told = Told(self._client, spec.name)
        self._closed = False

    # ---- the step ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End this worker's step and return at once; the new values are on their way.

        Gradients that have not left yet leave now, and a parameter without one is not part of the step. The
        next forward (or ``synchronize()``) waits, and raises what went wrong in the step.

        Args:
            closure: computes the loss and calls ``backward()``; called once, before the step.

        Returns:
            What ``closure`` returned.

        Raises:
            GradientModified: a gradient changed after it left. The step was not taken.
            ParameterModified: a parameter was written outside the optimizer. The step was not taken.
            NonFiniteGradient: NaN or Inf, and the policy is "error". The step was not taken.
            UsageError: a parameter that is not in the table has a gradient. The step was not taken.
        """
        self._check_open()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._held.check_parameters()
        self._buffers.check()
        self._departures.finish()
        self._end_step(skip=self._departures.skip)
        return loss

    def skip_step(self) -> None:
        """Give this step up, on all workers: what has left is dropped, parameters and state stay as they are.

        The way on after ``NonFiniteGradient`` or ``GradientModified``. Under ``Stale`` and ``Async`` without
        ``max_grad_norm`` what has left may be applied already.
        """
        self._check_open()
        self._end_step(skip=True)

    def _end_step(self, skip: bool) -> None:
        self._note_last()
        self._buffers.settle()
        self._table.digest = self._buffers.digest()
        self._ticket = self._table.step(groups=self._new_groups(), skip=skip)
        self._ended_with = self._sent
        self._buffers.step(skip)
        self._held.next_step(skip)
        self._departures.next_step()
        self._arrivals.next_step()

    def _new_groups(self) -> Groups:
        """All groups' hyperparameters if they differ from those sent last; the first step always sends them.

        Raises ``UnknownOptimizer`` for a value that the servers would refuse.
        """
        groups = [optimizers.select(self._name, group) for group in self.param_groups]
        if groups == self._sent and self._failures == self._table.failures:
            return None
        for group in groups:
            optimizers.complete(self._name, group)
        self._sent, self._failures = groups, self._table.failures
        return groups

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, ``backward()`` accumulates gradients locally, as for ``DistributedDataParallel.no_sync``.

        The next ``backward()`` outside sends the sum; without one, ``step()`` does.
        """
        before, self._departures.local = self._departures.local, True
        try:
            yield
        finally:
            self._departures.local = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients. With ``set_to_none=False`` they become new zeros: the old ones may be in flight."""
        zeros = set_to_none is False and [p for p in self._held.parameters if p.grad is not None]
        super().zero_grad(set_to_none=True)
        for parameter in zeros or ():
            parameter.grad = torch.zeros_like(parameter)

    # ---- values --------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until the model holds the outcome of the last step: its parameters and buffers.

        Raises what went wrong in the step, or ``DeadlineExceeded``.
        """
        self._arrivals.wait_all()
        self._note_last()

    def assign(self, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Set parameters (and module buffers) on the servers, outside the optimizer; its state stays.

        Every worker calls it, with the same values.

        Args:
            values: by name, in the parameter's shape and dtype; None: the model's present values, all of them.

        Raises:
            UsageError: a name that is not in the table.
            ShapeMismatch: a shape or dtype that is not the parameter's.
        """
        self._check_open()
        buffers = self._buffers.values()
        if values is None:
            values = {leaf.name: leaf.parameter.detach().cpu() for leaf in self._held.leaves} | buffers
        leaves = [leaf for leaf in self._held.leaves if leaf.name in values]
        strangers = values.keys() - {leaf.name for leaf in leaves} - buffers.keys()
        if strangers:
            raise UsageError(f"{sorted(strangers)[:3]} are not in the table {self._table.spec.name!r}")
        self._arrivals.wait_all()
        if leaves:
            self._table.assign({leaf.name: values[leaf.name] for leaf in leaves})
            self._table.refresh()  # what was written into parameters here is now what the servers hold
            self._held.arrived(leaves)
        self._buffers.assign({name: values[name] for name in buffers if name in values})

    def publish(
        self,
        name: str,
        metadata: Mapping[str, str] | None = None,
        *,
        keep: int = 3,
        age: float | None = None,
        tags: Iterable[str] = (),
    ) -> Publication:
        """Make the model as it is after this worker's last step a version that readers can lease; one worker calls it.

        Parameters and module buffers, as all shards hold them. See ``Client.publish`` for the arguments and errors;
        the version's model is this optimizer's ``name``.
        """
        self._check_open()
        tables = [self._table, *self._buffers.tables]
        return self._client.publish(tables, name, metadata=metadata, keep=keep, age=age, tags=tags)

    @property
    def clock(self) -> int:
        """The number of the last step that this worker has ended: under ``Bulk`` the same on all workers.

        A worker that joins later begins where the others are; advance its schedulers by it.
        """
        return self._table.clock

    @property
    def last_step(self) -> StepResult | None:
        """The outcome of the last step that is complete (clock, norm, staleness), None before the first."""
        self._note_last()
        return self._last

    def _note_last(self) -> None:
        if self._ticket is not None and self._ticket.done():
            ticket, self._ticket = self._ticket, None
            self._table.settle()  # raises what nobody has heard yet
            try:
                self._last = ticket.wait()
            except HeadwaterError:
                return
            self._told.hear(self._last, self._ended_with)
            if self._last.apart:
                raise self._buffers.apart(self._last.clock)

    def statistics(self) -> Any:
        """The client's counters: bytes pushed and pulled, steps, staleness, seconds waited."""
        return self._client.statistics()

    # ---- torch's own interface -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The servers' state in torch's format: the plain torch optimizer of the same class can load it."""
        self._check_open()
        slots = self._table.slots()
        with self._holding_state():
            for leaf in self._held.leaves:
                if slots.get(leaf.name):
                    self.state[leaf.parameter] = dict(slots[leaf.name])
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the servers the state, and the groups their hyperparameters, of this or the plain torch optimizer.

        Every worker calls it with the same state. Parameters without state in ``state_dict`` lose theirs.

        Raises:
            ValueError: other groups or other numbers of parameters (torch's own check).
            UnknownOptimizer: state or hyperparameters of another optimizer.
        """
        self._check_open()
        with self._holding_state():
            super().load_state_dict(state_dict)
            slots = {leaf.name: _tensors(self.state.get(leaf.parameter, {})) for leaf in self._held.leaves}
        self._table.assign_slots(slots)

    @contextmanager
    def _holding_state(self) -> Iterator[None]:
        """``self.state`` is filled only while torch's code reads or writes it."""
        try:
            yield
        finally:
            self.state = defaultdict(dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only torch's constructor may call this; a table cannot grow."""
        if self._built:
            raise UsageError(
                "a table's parameters are fixed when it is made. Pass all groups at once: "
                "headwater.Optimizer(model, …, params=[{'params': …, 'lr': …}, …])"
            )
        super().add_param_group(param_group)

    def close(self) -> None:
        """Leave the model with its present values in memory of its own, and the table on the servers."""
        if self._closed:
            return
        self._closed = True
        with suppress(HeadwaterError):  # then the values are those of the last step that arrived
            self.synchronize()
        self._departures.close()
        self._arrivals.close()
        if self._table.renewed is self._renewed:  # not a later optimizer's
            self._table.renewed = None
        for leaf in self._held.leaves:
            if not leaf.copies:
                leaf.parameter.grad = None
                leaf.parameter.data = leaf.parameter.detach().clone()
        self._buffers.retie()
        with _OPEN_LOCK:
            _OPEN.discard(self)
        if self._own_client:
            self._client.close()

    @property
    def owns_client(self) -> bool:
        """Whether the client was made for this optimizer and is closed with it."""
        return self._own_client

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise UsageError(
            "headwater.Optimizer cannot be pickled or copied: its state is on the servers. Save state_dict() instead"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the optimizer is closed; the model keeps the values it had then")


def _renew(held: Held | None) -> None:
    if held is not None:
        held.renewed()


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """One parameter's state as tensors; older torch kept step counts as numbers and absent buffers as None."""
    return {name: torch.as_tensor(value) for name, value in state.items() if value is not None}


def _check_free(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """A parameter belongs to one table at a time."""
    with _OPEN_LOCK:
        taken = {id(p) for other in _OPEN for group in other.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) in taken:
            raise UsageError(f"parameter {name!r} is held by another headwater.Optimizer; close() that one first")


def _connect() -> Client:
    from headwater.client import connect

    return connect()
