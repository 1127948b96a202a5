"""Gradients leave during backward: hook → bucket → ``table.push``. What ``.grad`` holds at ``step()`` is what counts.

A gradient moves into the table's memory as soon as autograd has finished it; the memory that autograd gave it is free
then, and ``.grad`` is a ``LazyGradient`` over the table's. A bucket of them leaves when its last one is ready, as early
as the step before has shown it to be (the last of several backward passes). At ``step()`` leaves what changed since:
nothing in a script that changes nothing, for which no byte is looked at again.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from headwater import interrupts
from headwater.errors import GradientModified, UsageError
from headwater.integrations.torch.lazy import LazyGradient, no_torch_function
from headwater.integrations.torch.parameters import Leaf, Parameters, as_kept

if TYPE_CHECKING:
    from headwater.integrations.base.steps import Steps


def _counted() -> int:
    parameter = torch.nn.Parameter(torch.zeros(1, device="cpu"))
    parameter.grad = torch.zeros(1, device="cpu")
    grad = parameter.grad
    return sys.getrefcount(grad)


_OURS = _counted()
"""References to a ``.grad`` that nobody else has: a local variable's, the count's own, in some torch autograd's."""

_UNHELD = 3
"""References to a leaf's ``LazyGradient`` when nobody keeps it: the leaf's, a local variable's, and the count's own."""


class Gradients:
    """The gradients of one optimizer, from autograd to what leaves (``out``).

    ``several``: other workers' gradients count too, so that a script that looks at ``.grad`` wants their mean.
    ``looks``: it is known that gradients will be looked at. ``say_looked`` is called when one was.
    """

    def __init__(
        self,
        held: Parameters,
        steps: Steps[Leaf],
        *,
        takes_sparse: bool = False,
        looks: bool = False,
        say_looked: Callable[[], None] = lambda: None,
    ) -> None:
        self.local = False  # inside no_sync(): gradients accumulate and stay
        self.out = steps.gradients
        self._held = held
        self._values = steps.values
        self._several = steps.several
        self._takes_sparse = takes_sparse
        self._say_looked = say_looked
        self._looks = looks  # the script looks at gradients between backward and step: learnt from the step before
        self._looked = False  # the same, in this step
        self._mean: dict[str, torch.Tensor] | None = None  # what ``.grad`` was given of all workers' mean
        self._marks: dict[str, int] = {}
        self._meeting = -1  # the backward that was noticed last
        self._meets = False  # the mean is fetched after it
        self._nobodys: set[str] = set()  # shown as zeros to who looked at it first; no worker has a gradient of it
        self.based = 0  # how many means of this step went, changed, into what this worker contributes
        self._local: set[str] = set()  # what it had a gradient of when it saw the mean
        self._hooks: dict[int, Any] = {id(leaf.parameter): self._hooked(leaf) for leaf in held.leaves}

    def close(self) -> None:
        """Remove the hooks, and leave ``.grad`` with memory of its own."""
        self.give_way([leaf.parameter for leaf in self._held.leaves])

    def give_way(self, parameters: Iterable[torch.Tensor]) -> None:
        """Somebody else trains these now: what ``.grad`` holds is looked at in ``step()`` only."""
        chosen = {id(p) for p in parameters}
        for leaf in self._held.leaves:
            if id(leaf.parameter) not in chosen:
                continue
            _, *handles = self._hooks.pop(id(leaf.parameter), (None,))
            for handle in handles:
                handle.remove()
            if leaf.current is not None and leaf.parameter.grad is leaf.current:
                leaf.current.plain = leaf.parameter.grad = leaf.gradient.clone()
                leaf.current = None

    def _hooked(self, leaf: Leaf) -> tuple[Any, ...]:
        """The node that adds up the parameter's gradients, which lives as long as somebody has it, and the hooks."""
        parameter: Any = leaf.parameter
        if not parameter.requires_grad:
            return (None,)  # its gradient is set by hand
        with torch.enable_grad():
            node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
        before = node.register_prehook(_Weakly(self, leaf, Gradients._coming))
        return node, before, parameter.register_post_accumulate_grad_hook(_Weakly(self, leaf, Gradients._ready))

    # ---- backward --------------------------------------------------------------------------------

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Inside, gradients accumulate here and do not leave."""
        before, self.local = self.local, True
        try:
            yield
        finally:
            self.local = before

    @interrupts.deferred
    def _ready(self, leaf: Leaf, _parameter: torch.Tensor) -> None:
        """Autograd's hook: the gradient of this backward is complete in ``parameter.grad``."""
        leaf.spent = False
        grad = leaf.parameter.grad
        if grad is leaf.current:
            if leaf.fresh != self._values.clock:
                raise self._written_in_flight(leaf)
            leaf.changed = True  # autograd added to the table's memory
        if self.local:
            if grad is not None and grad is not leaf.current and not leaf.own:
                leaf.given = weakref.ref(grad)
            return
        leaf.count += 1
        leaf.empty = False
        alone = not self._several()
        if not alone:
            self._notice_backward()
        if grad is not leaf.current and not self._taken(leaf, grad, alone):
            return
        if self.out.early and leaf.count == leaf.expected:
            self.out.ready(leaf)

    def _taken(self, leaf: Leaf, grad: torch.Tensor | None, alone: bool) -> bool:
        """Move a gradient that autograd has made into the table's memory; False if it stays where it is."""
        if grad is None or (self._looks and alone) or not _is_plain(grad):
            return False  # it is looked at before it leaves: autograd's own tensor is as good as ours
        if leaf.current is not None and leaf.current.plain is grad:
            leaf.current = None
        if leaf.own or sys.getrefcount(grad) > _OURS + 1:
            self._meets = not alone
            return False  # the script has it too, and expects autograd to go on adding to it
        self._load(leaf, grad)
        return True

    def _coming(self, leaf: Leaf, _gradients: Any) -> None:
        """Autograd is about to add to ``.grad``: is what is there the script's own (a buffer, what it has kept)?

        To a mean that the script has only read it adds nothing: the worker's own gradient goes on.
        """
        if self._mean is not None:
            self._take_back()
        if leaf.empty and leaf.parameter.grad is leaf.current:
            leaf.parameter.grad = leaf.current = None  # it stood for others' gradients: this worker has one now
        leaf.empty = False
        self._nobodys.discard(leaf.name)
        leaf.own = _is_own(leaf)

    def _take_back(self) -> None:
        """The mean was looked at and not changed: ``.grad`` is this worker's again, which lies where it lay."""
        mean, self._mean = self._mean, None
        if mean is None:
            return
        if any(leaf.name in mean and _is_own(leaf) for leaf in self._held.leaves) or self._changed(mean):
            self.based += 1
            return
        for leaf in self._held.leaves:
            if leaf.name in mean:
                leaf.current = None
                leaf.parameter.grad = self._restored(leaf) if leaf.name in self._local else None

    def _restored(self, leaf: Leaf) -> torch.Tensor:
        if leaf.copies:
            plain = _like(leaf, leaf.gradient)
            leaf.given = weakref.ref(plain)
            return plain
        leaf.current = LazyGradient.over(leaf.gradient, self, leaf)
        return leaf.current

    def _after_backward(self) -> None:
        """Several workers: what this one has no gradient of another may have, and whoever looks must see that too."""
        for leaf in self._held.leaves:
            grad = leaf.parameter.grad
            if grad is None and leaf.parameter.requires_grad:
                memory = torch.zeros_like(leaf.parameter, requires_grad=False) if leaf.copies else leaf.gradient
                leaf.current = LazyGradient.over(memory, self, leaf)
                leaf.empty, leaf.spent, leaf.own = True, False, False
                leaf.parameter.grad = leaf.current
            elif grad is not None and grad is not leaf.current and _was_given(leaf, grad) and _is_plain(grad):
                self._load(leaf, grad)  # gathered under no_sync() only
        if self._meets:
            self._meets = False
            self.fetch_mean()

    def _notice_backward(self) -> None:
        """Be called when this backward ends. A tensor of the script's shows the mean from then on, as under DDP."""
        task = torch._C._current_graph_task_id()  # noqa: SLF001 - as torch.utils.checkpoint tells backward passes apart
        if task != self._meeting:
            self._meeting = task
            engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001 - where DDP and FSDP queue theirs
            engine.queue_callback(self._after_backward)

    def _load(self, leaf: Leaf, grad: torch.Tensor) -> None:
        """Move the gradient into the table's memory, and let ``.grad`` be that."""
        if leaf.fresh != self._values.clock:
            self._values.wait([leaf])  # the servers may still read the memory
        kept = leaf.current
        if kept is not None and (kept.plain is not None or self._is_kept(leaf, kept)):
            kept = leaf.current = None
        if leaf.copies:
            self._give(leaf, grad)
            return
        leaf.gradient.copy_(grad.detach())
        leaf.changed = True
        if kept is None:
            kept = leaf.current = LazyGradient.over(leaf.gradient, self, leaf)
        leaf.parameter.grad = kept

    def _give(self, leaf: Leaf, grad: torch.Tensor) -> None:
        """A gradient on another device stays there; it is copied when it leaves."""
        if self._several():
            leaf.parameter.grad = leaf.current = LazyGradient.over(grad.detach(), self, leaf)

    def _is_kept(self, leaf: Leaf, gradient: LazyGradient) -> bool:
        """Whether the script has kept an old ``.grad``, which must not become the new one: it gets a copy."""
        if sys.getrefcount(gradient) <= _UNHELD + 1:
            return False
        if not leaf.copies and not self._several():
            gradient.plain = leaf.gradient.clone()
        return True

    # ---- looks -----------------------------------------------------------------------------------

    @interrupts.deferred
    def reveal(self, leaf: Leaf, gradient: LazyGradient) -> torch.Tensor:
        """The script looks at a gradient: from here on ``.grad`` is a tensor of its own, of all workers' mean."""
        self._looked = True
        self._say_looked()
        if self._several() and not self.local:
            if leaf.parameter.grad is gradient:
                self._fetch_past() if leaf.spent else self.fetch_mean()
            if gradient.plain is None:
                raise UsageError(
                    f"an old gradient of {leaf.name!r} was looked at, which `.grad` holds no longer: the servers have "
                    "merged all workers' and keep nothing of it. Look at it between backward() and step()"
                )
            return gradient.plain
        if gradient.plain is None:
            plain = gradient.plain = self._own(leaf)
            if leaf.parameter.grad is gradient:
                leaf.parameter.grad = plain
                leaf.given = weakref.ref(plain)
        return gradient.plain

    def _own(self, leaf: Leaf) -> torch.Tensor:
        if leaf.copies:
            assert leaf.current is not None
            with no_torch_function():
                return leaf.current.detach().as_subclass(torch.Tensor)
        return leaf.gradient.clone()

    def zero(self, leaf: Leaf, gradient: LazyGradient) -> torch.Tensor:
        """The script zeroes a gradient, which needs no look at what it was."""
        gradient.plain = torch.zeros_like(leaf.parameter, requires_grad=False)
        if leaf.parameter.grad is gradient and leaf.empty:
            leaf.parameter.grad = None  # this worker has none
        elif leaf.parameter.grad is gradient:
            leaf.parameter.grad = gradient.plain
            leaf.given = weakref.ref(gradient.plain)
        return gradient.plain

    def see_mean(self) -> None:
        """``fetch_mean``, unless ``.grad`` holds it already."""
        if self._mean is None:
            self.fetch_mean()

    @interrupts.deferred
    def fetch_mean(self) -> None:
        """Let ``.grad`` of every parameter be the mean over workers of what they have; each of them must do so.

        Gradients that are not finite are among it: whoever looks decides what they mean.
        """
        self._looked = True
        self._contribute(checked=False)
        self._local = {leaf.name for leaf in self._held.leaves if leaf.left}
        mean, names = self._held.table.mean(based=self.based)
        self._mean, self._marks = {}, {}
        for leaf in self._held.leaves:
            if leaf.empty and leaf.parameter.grad is leaf.current and leaf.name not in names:
                leaf.parameter.grad = None  # nobody has one; what the script has of it are zeros
                self._nobodys.add(leaf.name)
                leaf.current.plain = torch.zeros_like(leaf.parameter, requires_grad=False)  # type: ignore[union-attr]
            leaf.empty = False
        for leaf in self._held.leaves:
            if leaf.name not in names:
                continue
            self._marks[leaf.name] = _mark(mean[leaf.name])
            self._mean[leaf.name] = self._show(leaf, _like(leaf, mean[leaf.name]))

    def _made_of_zeros(self, leaf: Leaf) -> bool:
        """Whether the script made ``.grad`` out of the zeros that stood for nobody's: then it has none, as in torch."""
        grad = leaf.parameter.grad
        return leaf.name in self._nobodys and grad is not None and _is_plain(grad) and not bool(grad.any())

    def _show(self, leaf: Leaf, mean: torch.Tensor) -> torch.Tensor:
        """Let ``.grad`` be the mean; a tensor that the script may have already takes its values."""
        grad = leaf.parameter.grad
        if grad is not None and grad is not leaf.current and _is_plain(grad):
            return grad.copy_(mean)
        if leaf.current is not None and grad is leaf.current:
            leaf.current.plain = mean
        leaf.parameter.grad = mean
        leaf.given = weakref.ref(mean)
        return mean

    def _fetch_past(self) -> None:
        """The same after the step, as long as every worker looks and ``.grad`` holds what went into it."""
        leaves = [
            leaf
            for leaf in self._held.leaves
            if leaf.spent and not leaf.empty and leaf.parameter.grad is leaf.current is not None
        ]
        self.out.push(leaves, [leaf.name for leaf in leaves], anew=True)
        for leaf in leaves:
            leaf.left = False
        self.out.void = True
        mean, _ = self._held.table.mean(past=True)
        for leaf in leaves:
            assert leaf.current is not None
            leaf.current.plain = leaf.parameter.grad = plain = _like(leaf, mean[leaf.name])
            leaf.given = weakref.ref(plain)

    def _changed(self, mean: Mapping[str, torch.Tensor]) -> bool:
        """Whether some ``.grad`` is not the mean, to the bit, that it was given."""
        for leaf in self._held.leaves:
            grad = leaf.parameter.grad
            given = mean.get(leaf.name)
            if grad is not given or (grad is not None and _mark(as_kept(grad)) != self._marks[leaf.name]):
                return True
        return False

    # ---- the end of a step -----------------------------------------------------------------------

    def finish(self) -> bool:
        """Let leave what has not, and what changed since it left; True if that is all workers' gradient, changed.

        Raises:
            NonFiniteGradient: NaN or Inf, and the policy is "error". The step is not taken.
            GradientModified: a gradient that was applied already changed since (overlap, without ``Bulk``).
            UsageError: a sparse gradient of an optimizer that has no rule for it.
        """
        if self._mean is None:
            self._contribute(checked=True)
            return False
        if not self._changed(self._mean):
            return False
        for leaf in self._held.leaves:
            if self._made_of_zeros(leaf):
                leaf.parameter.grad = None
        leaves = [leaf for leaf in self._held.leaves if leaf.parameter.grad is not None]
        for leaf in leaves:
            self._copy(leaf)
        if self.out.may_leave(leaves):
            self.out.push(leaves, [leaf.name for leaf in leaves], anew=True)
        return True

    def _contribute(self, *, checked: bool) -> None:
        here, gone = [], False
        for leaf in self._held.leaves:
            grad = leaf.parameter.grad
            if grad is None or (leaf.empty and grad is leaf.current):
                gone = gone or leaf.left
                continue
            if grad is not leaf.current or leaf.copies:
                self._copy(leaf)
            here.append(leaf)
        self.out.finish(here, gone=gone, checked=checked)

    def _copy(self, leaf: Leaf) -> None:
        """What ``.grad`` holds, into the table's memory."""
        grad = leaf.parameter.grad
        assert grad is not None
        if grad.requires_grad and self._several():
            raise UsageError(
                f"the gradient of {leaf.name!r} has a graph of its own (create_graph=True), and with several workers "
                "their mean counts, which has none; the step was not taken. Use torch.autograd.grad for inner gradients"
            )
        kept = leaf.current
        if kept is not None and kept is not grad and kept.plain is None and self._is_kept(leaf, kept):
            leaf.current = None
        if leaf.fresh != self._values.clock:
            self._values.wait([leaf])
        with no_torch_function():
            plain = grad.detach()
            leaf.gradient.copy_(plain if plain.layout is torch.strided else self._dense(leaf, plain))
        leaf.changed = True

    def _dense(self, leaf: Leaf, grad: torch.Tensor) -> torch.Tensor:
        if not self._takes_sparse:
            raise UsageError(
                f"the gradient of {leaf.name!r} is sparse, which this optimizer cannot take (SGD, Adagrad and "
                "SparseAdam can); the step was not taken. Make the embedding with sparse=False"
            )
        leaf.sparse = True
        return grad.to_dense()

    def _written_in_flight(self, leaf: Leaf) -> GradientModified:
        return GradientModified(
            f"backward() added to the gradient of {leaf.name!r} on rank {self._held.rank} after step() and before its "
            "new values arrived, while the servers may have been reading it; the step may have used either. Call "
            "zero_grad() or synchronize() first (overlap=False does)"
        )

    def next_step(self) -> None:
        """The step was sent off, and ``out`` has heard of it."""
        self._mean, self.based = None, 0
        self._nobodys.clear()
        self._looks, self._looked = self._looks or self._looked, False
        for leaf in self._held.leaves:
            if leaf.count:
                leaf.expected = leaf.count
            leaf.count = 0
            leaf.spent = True
            if leaf.empty and leaf.parameter.grad is leaf.current:
                leaf.parameter.grad = None
            leaf.empty = False


class _Weakly:
    """A hook that keeps nobody alive: an optimizer that the script has dropped is gone, and so is its model."""

    __slots__ = ("_act", "_gradients", "_leaf")

    def __init__(self, gradients: Gradients, leaf: Leaf, act: Callable[[Gradients, Leaf, Any], None]) -> None:
        self._gradients, self._leaf, self._act = weakref.ref(gradients), weakref.ref(leaf), act

    def __call__(self, given: Any) -> None:
        gradients, leaf = self._gradients(), self._leaf()
        if gradients is not None and leaf is not None:
            self._act(gradients, leaf, given)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_hook, ()  # a copied model has none


def _no_hook() -> Callable[..., None]:
    return lambda *_args: None


def _is_plain(grad: torch.Tensor) -> bool:
    """Whether a gradient can move: one with a graph of its own stays, and a sparse one is made dense in ``step()``."""
    return not grad.requires_grad and grad.layout is torch.strided


def _is_own(leaf: Leaf) -> bool:
    """Whether ``.grad`` is the script's tensor now, to which it expects autograd to add."""
    grad = leaf.parameter.grad
    return grad is not None and grad is not leaf.current and not _was_given(leaf, grad)


def _was_given(leaf: Leaf, grad: torch.Tensor) -> bool:
    """Whether ``.grad`` is what autograd, or we, put there: the object, since memory that is freed is used again."""
    return grad.layout is not torch.strided or (leaf.given is not None and leaf.given() is grad)


def _like(leaf: Leaf, mean: torch.Tensor) -> torch.Tensor:
    """The mean as the parameter's gradient: in its shape and dtype, on its device."""
    plain = torch.view_as_complex(mean) if leaf.parameter.is_complex() and not mean.is_complex() else mean
    if leaf.sparse:  # for an optimizer that passes over rows: those that nobody's gradient touches
        return plain.to(leaf.parameter.device).to_sparse(1)
    return torch.empty_like(leaf.parameter, requires_grad=False).copy_(plain) if leaf.copies else plain


def _mark(tensor: torch.Tensor) -> int:
    """Of a table's tensor (C order, on the CPU): tells any change of a bit."""
    if not tensor.numel():
        return 0
    flat = tensor.reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(memoryview(flat.numpy()))  # type: ignore[arg-type]
