"""One optimizer's table at work: what a step sends, what it waits for, and how the table grows.

``headwater.Optimizer`` is a shell around it, which other libraries copy (Lightning) and wrap: what changes lives here.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from headwater.errors import HeadwaterError, ParameterModified, UnknownOptimizer, UsageError
from headwater.integrations.base.steps import Steps, TrainOptions
from headwater.integrations.torch.buffers import Buffers, Mode
from headwater.integrations.torch.gradients import Gradients
from headwater.integrations.torch.model import Inits, check_forwards, materialise, specs, trainable
from headwater.integrations.torch.parameters import Leaf, Parameters, as_kept, shared_with_strangers
from headwater.integrations.torch.values import LazyValues
from headwater.integrations.torch.wrappers import named_parameters
from headwater.types import Claim

if TYPE_CHECKING:
    from headwater.client import Client, StepResult
    from headwater.integrations.base.values import StepValues

log = logging.getLogger("headwater")

_SAID: weakref.WeakKeyDictionary[Client, set[str]] = weakref.WeakKeyDictionary()
"""What was said of each client's optimizers, once for all of them."""


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
        options: TrainOptions,
        buffers: Mode,
    ) -> None:
        self.client = client
        self.model = model
        self.options = options
        self._buffers_mode = buffers
        self.parameters = dict(parameters)
        self.closed = False
        self.last: StepResult | None = None
        self._groups = groups
        self._collective = options.sync.collective
        self._grown = 0
        self._aside: dict[int, dict[str, torch.Tensor]] = {}  # the state of parameters that are frozen
        self._steps = 0  # of the tables before this one
        self._beside = sum(name.startswith("beside.") for name in parameters)

    # ---- the table -------------------------------------------------------------------------------

    def attach(self, name: str, inits: Inits, claim: Claim) -> None:
        """Declare the tables and let the model hold their values."""
        if not self.client.alone:
            check_forwards(self.model)
        held = trainable(self.parameters)
        stay = shared_with_strangers(held.values())  # before we share it ourselves
        groups = self._groups()
        spec = self.options.spec(name, specs(held, groups, inits), groups)
        self.name = name
        given = {p.name: as_kept(held[p.name]) for p in spec.parameters if p.init.kind == "values"}
        known = spec.name in self.client.tables
        self.table = self.client.table(spec, given, claim)
        if known or claim == "resume":
            self.table.pull()  # an earlier optimizer's: others may have trained it on
        self.buffers = Buffers(self.model, self.client, spec.name, self.options.sync, self._buffers_mode)
        self._hold(held, stay)

    def _hold(self, held: Mapping[str, torch.Tensor], stay: Collection[int]) -> None:
        self.table.wait()
        self.held = Parameters(self.table, held, self.client.rank, stay)
        same = [leaf for leaf in self.held.leaves if leaf.holds_values()]
        leaves = [leaf for leaf in self.held.leaves if not leaf.copies]
        materialise([leaf.parameter for leaf in leaves], [leaf.values for leaf in leaves])
        self.buffers.retie()
        self.held.show(self.held.leaves, same)
        self._frozen = [p for p in self.parameters.values() if not _trains(p)]
        self._grouped = self._grouping()
        self.steps = Steps(self.client, self.table, self.held.leaves, self.held, self._groups, self.options)
        held_now, values_now = weakref.ref(self.held), weakref.ref(self.steps.values)  # else the client keeps the model
        self._forget_renewals = self.table.when_renewed(lambda: _renew(held_now(), values_now()))
        kind, here = self.options.kind, not self.options.kind
        self.gradients = Gradients(
            self.held, self.steps,
            takes_sparse=here or kind in ("SGD", "Adagrad"),
            looks=here,
            say_looked=self._say_looked if not here else lambda: None,
        )  # fmt: skip
        self.values = LazyValues(self.model, self.held, self.steps.values, self.buffers, overlap=self.options.overlap)

    def several(self) -> bool:
        """Whether a step is that of several workers, or may be."""
        return self.steps.several()

    def follow_groups(self) -> None:
        """What the groups hold now is what is trained: what came, went, moved or was unfrozen makes a new table.

        It has the values and the state of this one. Every worker does so between the same two steps.
        """
        now = self._grouping()
        if now == self._grouped and not any(map(_trains, self._frozen)):
            return
        if not self._collective and self.gradients.out.have_left():
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
        slots = self.table.slots() if self.options.kind else {}
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
        self.gradients.close()
        self.values.close()
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
        self.steps.write_first(writes)
        merged = self.gradients.finish()
        self.end(writes, merged=merged, skip=self.gradients.out.skip)

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
        self.table.digest = self.buffers.digest()
        self.steps.end(writes, skip=skip, merged=merged, based=self.gradients.based)
        self.buffers.step(skip)
        self.held.next_step()
        self.gradients.next_step()
        if writes or not self.values.next_step():
            self.arrive()

    def arrive(self) -> None:
        """Wait until the model holds the outcome of the last step: its parameters and buffers."""
        self.values.wait_all()
        self.note_last()

    def note_last(self) -> None:
        """Take note of the outcome of the last step if it is complete."""
        found = self.steps.completed()
        if found is None:
            return
        self.last = found
        if found.apart:
            raise self.buffers.apart(found.clock)

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
        self.steps.values.arrived([leaf for leaf in self.held.leaves if leaf.name in values])

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


def _renew(held: Parameters | None, values: StepValues[Leaf] | None) -> None:
    """After a rest the table has the values of later steps: copies of the last one's on other devices are old."""
    if held is not None and values is not None:
        values.arrived([leaf for leaf in held.copies_as_shown() if leaf.fresh == values.clock])


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
