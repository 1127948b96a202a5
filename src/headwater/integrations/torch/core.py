"""One optimizer's table at work: what a step sends, what it waits for, and how the table grows.

``headwater.Optimizer`` is a shell around it, which other libraries copy (Lightning) and wrap: what changes lives here.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch

from headwater.errors import HeadwaterError, ParameterModified, UnknownOptimizer, UsageError
from headwater.integrations.torch.buffers import Buffers, Mode
from headwater.integrations.torch.gradients import Departures, Groups
from headwater.integrations.torch.model import Inits, check_forwards, materialise, optimizer_spec, specs, trainable
from headwater.integrations.torch.notices import Told
from headwater.integrations.torch.parameters import Held, Leaf, as_kept, shared_with_strangers
from headwater.integrations.torch.values import Arrivals
from headwater.integrations.torch.wrappers import named_parameters
from headwater.types import Claim, DenseSpec, OptimizerSpec, Sync
from headwater.wire import optimizers

if TYPE_CHECKING:
    from headwater.client import Client, StepResult, Ticket

Nonfinite = Literal["error", "skip", "allow"]
log = logging.getLogger("headwater")

_SAID: weakref.WeakKeyDictionary[Client, set[str]] = weakref.WeakKeyDictionary()
"""What was said of each client's optimizers, once for all of them."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How an optimizer trains: the arguments of ``headwater.Optimizer`` that say so."""

    kind: str  # of the servers' optimizers; "" if it runs here
    sync: Sync
    max_grad_norm: float | None
    nonfinite: Nonfinite
    buffers: Mode
    bucket_bytes: int
    seed: int
    overlap: bool


class Core:
    """``parameters``: all of the optimizer's, by name; of them the trainable ones are in the table.

    ``groups``: the present parameter groups of the optimizer. ``here``: the optimizer runs at the worker.
    """

    def __init__(
        self,
        client: Client,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.Tensor],
        groups: Callable[[], Sequence[Mapping[str, Any]]],
        manner: Manner,
    ) -> None:
        self.client = client
        self.model = model
        self.manner = manner
        self.parameters = dict(parameters)
        self.closed = False
        self.last: StepResult | None = None
        self._groups = groups
        self._collective = manner.sync.collective
        self._grown = 0
        self._aside: dict[int, dict[str, torch.Tensor]] = {}  # the state of parameters that are frozen
        self._steps = 0  # of the tables before this one
        self._beside = sum(name.startswith("beside.") for name in parameters)
        self._ticket: Ticket | None = None

    # ---- the table -------------------------------------------------------------------------------

    def attach(self, name: str, inits: Inits, claim: Claim) -> None:
        """Declare the tables and let the model hold their values."""
        if not self.client.alone:
            check_forwards(self.model)
        held = trainable(self.parameters)
        stay = shared_with_strangers(held.values())  # before we share it ourselves
        spec = self._spec(name, held, inits)
        self.name = name
        given = {p.name: as_kept(held[p.name]) for p in spec.parameters if p.init.kind == "values"}
        known = spec.name in self.client.tables
        self.table = self.client.table(spec, given, claim)
        if known or claim == "resume":
            self.table.pull()  # an earlier optimizer's: others may have trained it on
        self.buffers = Buffers(self.model, self.client, spec.name, self.manner.sync, self.manner.buffers)
        self._hold(held, stay)

    def _spec(self, name: str, held: Mapping[str, torch.Tensor], inits: Inits) -> DenseSpec:
        m, groups = self.manner, self._groups()
        if m.kind:
            how = optimizer_spec(m.kind, groups)
            return DenseSpec(name, specs(held, groups, inits), how, m.sync, m.max_grad_norm, m.nonfinite, m.seed)
        # The worker's optimizer makes values: they are assigned under ``Bulk``, else what they moved by is subtracted.
        how = OptimizerSpec("Assign", ({},)) if self._collective else OptimizerSpec("SGD", ({"lr": 1.0},))
        plain = tuple(msgspec.structs.replace(p, group=0) for p in specs(held, groups, inits))
        return DenseSpec(name, plain, how, m.sync, None, "allow", m.seed)

    def _hold(self, held: Mapping[str, torch.Tensor], stay: Collection[int]) -> None:
        self.table.wait()
        self.held = Held(self.table, held, self.client.rank, stay)
        same = [leaf for leaf in self.held.leaves if leaf.holds_values()]
        leaves = [leaf for leaf in self.held.leaves if not leaf.copies]
        materialise([leaf.parameter for leaf in leaves], [leaf.values for leaf in leaves])
        self.buffers.retie()
        self.held.arrived(self.held.leaves, same)
        held_now = weakref.ref(self.held)  # else the client would keep the model
        self._forget_renewals = self.table.when_renewed(lambda: _renew(held_now()))
        self._frozen = [p for p in self.parameters.values() if not _trains(p)]
        self._grouped = self._grouping()
        self._members = self.client.members
        self._sent: Groups = None
        self._ended_with: Groups = None  # the hyperparameters of the last step that was ended
        self._told = Told(self.client, self.table.spec.name)
        self._failures = 0  # the table's, when groups were sent last
        m = self.manner
        here = not m.kind
        self.departures = Departures(
            self.held, m.bucket_bytes, m.nonfinite, self._new_groups,
            early=(self._collective or m.overlap) and not (here and not self.several()),
            final=not self._collective and m.overlap,
            several=self.several,
            takes_sparse=here or m.kind in ("SGD", "Adagrad"),
            looks=here,
            say_looked=self._say_looked if not here else lambda: None,
        )  # fmt: skip
        self.arrivals = Arrivals(self.model, self.held, self.buffers, overlap=m.overlap)

    def several(self) -> bool:
        """Whether a step is that of several workers, or may be."""
        return self._collective and not (self.client.alone and self.client.members == self._members)

    def follow_groups(self) -> None:
        """What the groups hold now is what is trained: what came, went, moved or was unfrozen makes a new table.

        It has the values and the state of this one. Every worker does so between the same two steps.
        """
        now = self._grouping()
        if now == self._grouped and not any(map(_trains, self._frozen)):
            return
        if not self._collective and self.departures.have_left():
            raise UsageError(
                "parameters were added or unfrozen when gradients of the step had left already (overlap=True), which "
                "this policy applies as they arrive. Do that between step() and zero_grad()"
            )
        names = {id(p): name for name, p in named_parameters(self.model).items()}
        before = {id(p): name for name, p in self.parameters.items() if name not in names.values()}
        for group in self._groups():
            for p in group["params"]:
                if id(p) not in names:
                    self._beside += 1
                    names[id(p)] = before.get(id(p), f"beside.{self._beside}")
        order = {id(p): place for place, p in enumerate(self.model.parameters())}
        present = [p for group in self._groups() for p in group["params"]]
        present.sort(key=lambda p: order.get(id(p), len(order)))
        self._grow({names[id(p)]: p for p in present})

    def _grouping(self) -> list[list[int]]:
        return [[id(p) for p in group["params"]] for group in self._groups()]

    def _grow(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.arrive()
        old = {id(leaf.parameter): leaf.name for leaf in self.held.leaves}
        slots = self.table.slots() if self.manner.kind else {}
        aside = self._aside
        slots = {name: slots.get(old.get(id(p), ""), aside.get(id(p), {})) for name, p in parameters.items()}
        self.parameters = dict(parameters)
        self._steps += self.table.clock
        self.let_go()
        self._grown += 1
        base = self.name.partition("~")[0]
        self.attach(f"{base}~{self._grown}", None, "new")
        held = {leaf.name for leaf in self.held.leaves}
        ids = {id(p): name for name, p in parameters.items()}
        self._aside = {key: kept for key, kept in aside.items() if key not in ids}
        self._aside |= {key: slots[name] for key, name in ids.items() if name not in held and slots[name]}
        if slots:  # every worker has the same, and pushes after it
            self.table.assign_slots({name: kept for name, kept in slots.items() if name in held})
        if not self._collective:
            self.client.barrier(f"grown {self.table.spec.name}")

    def let_go(self) -> None:
        """Leave the model with its present values in memory of its own."""
        self.departures.close()
        self.arrivals.close()
        self._forget_renewals()
        for leaf in self.held.leaves:
            if leaf.copies:
                continue
            if leaf.shared_by_others():
                leaf.values.copy_(leaf.values.clone())  # whoever shares it stays with it: pages of this process's own
            else:
                leaf.parameter.data = leaf.parameter.detach().clone()
        self.buffers.retie()

    # ---- steps -----------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of the servers' optimizer on what ``.grad`` holds."""
        self.begin()
        writes = self.held.written()
        self.buffers.check()
        self._write_first(writes)
        merged = self.departures.finish()
        self.end(writes, merged=merged, skip=self.departures.skip)

    def _write_first(self, writes: Mapping[str, torch.Tensor]) -> None:
        """Without steps of all workers what was written must be there before the gradient is applied to it."""
        if not writes or self._collective:
            return
        if self.departures.have_left():
            raise ParameterModified(
                f"{min(writes)!r} was written on rank {self.client.rank}, and gradients of this step have left already "
                "(overlap=True), which this policy applies as they arrive. Write by opt.assign(), or leave overlap out"
            )
        self.table.write(writes)

    def skip(self) -> None:
        """Give this step up, on all workers."""
        self.arrive()
        writes = self.held.written()
        if writes and not self._collective:
            self.table.write(writes)
        self.end(writes, skip=True)

    def begin(self) -> None:
        """Before a step is put together: the last one's values are here, and what can be trained is in the table."""
        self.arrive()
        self.follow_groups()

    def end(self, writes: Mapping[str, torch.Tensor], *, merged: bool = False, skip: bool = False) -> None:
        """End the step, and wait for what comes of it."""
        self.note_last()
        self.buffers.settle()
        groups = self._new_groups()
        self.table.digest = self.buffers.digest()
        with_it = writes if self._collective else None
        based = self.departures.based
        self._ticket = self.table.step(groups=groups, skip=skip, merged=merged, based=based, writes=with_it)
        self._ended_with = self._sent
        self.buffers.step(skip)
        self.held.wrote = self.table.clock if writes else 0
        self.held.next_step()
        self.departures.next_step()
        if writes or not self.arrivals.next_step():
            self.arrive()

    def arrive(self) -> None:
        """Wait until the model holds the outcome of the last step: its parameters and buffers."""
        self.arrivals.wait_all()
        self.note_last()

    def note_last(self) -> None:
        """Remember the outcome of the last step if it is complete."""
        if self._ticket is not None and self._ticket.done():
            ticket, self._ticket = self._ticket, None
            self.table.settle()  # raises what nobody has heard yet
            try:
                self.last = ticket.wait()
            except HeadwaterError:
                return
            self._told.hear(self.last, self._ended_with)
            if self.last.apart:
                raise self.buffers.apart(self.last.clock)

    def _new_groups(self) -> Groups:
        """All groups' hyperparameters if they differ from those sent last; the first step always sends them.

        Raises ``UnknownOptimizer`` for a value that the servers would refuse.
        """
        kind = self.manner.kind
        if not kind:
            return None
        groups = [optimizers.select(kind, group) for group in self._groups()]
        if groups == self._sent and self._failures == self.table.failures:
            return None
        for group in groups:
            optimizers.complete(kind, group)
        self._sent, self._failures = groups, self.table.failures
        return groups

    # ---- the rest --------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """The number of the last step that this worker has ended."""
        return self._steps + self.table.clock

    def kept(self, leaf: Leaf, value: torch.Tensor) -> torch.Tensor:
        """A value of a parameter as the table takes it."""
        same = value.is_complex() == leaf.parameter.is_complex()
        return as_kept(value) if same else value

    def slots(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The servers' optimizer state of each parameter that has some, in torch's shapes."""
        found = self.table.slots()
        for leaf in self.held.leaves:
            if found.get(leaf.name):
                p = leaf.parameter
                yield p, {name: _as_state(slot, p) for name, slot in found[leaf.name].items()}
        for p in self.parameters.values():
            if id(p) in self._aside:
                yield p, dict(self._aside[id(p)])

    def assign_slots(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Replace the optimizer state; ``state`` by the ids of parameters. That of frozen ones is kept here."""
        held = {id(leaf.parameter) for leaf in self.held.leaves}
        self._aside = {key: _tensors(slots) for key, slots in state.items() if key not in held}
        slots = {leaf.name: _tensors(state.get(id(leaf.parameter), {})) for leaf in self.held.leaves}
        try:
            self.table.assign_slots(slots)
        except UnknownOptimizer:  # it is the state of other hyperparameters (amsgrad, momentum), which the groups have
            self._grow(self.parameters)
            self.table.assign_slots(slots)

    def flush(self, why: str) -> None:
        """What the script wrote since the last step becomes the state now: only where no other worker has a say."""
        self.arrive()
        writes = self.held.written()
        if not writes:
            return
        if self.several():
            raise ParameterModified(
                f"{min(writes)!r} was written since the last step; the servers hear of it with the next one, from "
                f"every worker. {why} after that, or call opt.assign() on every worker"
            )
        self.assign(writes)

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set parameters on the servers, whatever was written here."""
        self.table.assign(values)
        self.table.refresh()
        self.held.arrived([leaf for leaf in self.held.leaves if leaf.name in values])

    def close(self) -> None:
        """Leave the model with its present values in memory of its own, and the table on the servers."""
        self.closed = True
        try:
            with suppress(HeadwaterError):  # then the values are those of the last step that arrived
                self.arrive()
            with suppress(HeadwaterError):
                if not self.several():
                    self.flush("close()")
        finally:  # after Ctrl-C as well
            self.let_go()

    def say_once(self, text: str) -> None:
        """To the log, once, on the lowest rank."""
        said = _SAID.setdefault(self.client, set())
        if text not in said and self.client.rank <= 0:
            said.add(text)
            log.warning(text)

    def _say_looked(self) -> None:
        if self.several():
            self.say_once(
                "the script looks at gradients between backward() and step(): each step then fetches the mean of all "
                "workers' gradients first. To clip, max_grad_norm=… of headwater.Optimizer does without"
            )


def _trains(parameter: torch.Tensor) -> bool:
    """Whether a step may change it: torch steps what has a gradient, frozen or not."""
    return parameter.requires_grad or parameter.grad is not None


def _renew(held: Held | None) -> None:
    if held is not None:
        held.renewed()


def _as_tensor(value: Any) -> torch.Tensor:
    """Of a number: not of the script's default dtype, which may not hold it."""
    return torch.as_tensor(value, dtype=torch.float32 if isinstance(value, float) else None, device="cpu")


def _as_state(slot: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Of a complex parameter a table holds state as pairs."""
    pairs = parameter.is_complex() and slot.shape == (*parameter.shape, 2)
    return torch.view_as_complex(slot) if pairs else slot


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """One parameter's state as tensors; older torch kept step counts as numbers and absent buffers as None."""
    found = {name: _as_tensor(value) for name, value in state.items() if value is not None}
    return {name: as_kept(value) if value.is_complex() else value for name, value in found.items()}
