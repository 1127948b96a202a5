"""The parameters of one model that live in one table, and the step that they are at."""

# ruff: noqa: SLF001 -- torch documents a tensor's version counter as `_version`; it has no other name

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from headwater.errors import ParameterModified
from headwater.integrations.base.parameter import TableParameter

if TYPE_CHECKING:
    from headwater.client import DenseTable
    from headwater.integrations.torch.lazy import LazyGradient
    from headwater.integrations.torch.values import Guard


def shares_memory(parameter: torch.Tensor) -> bool:
    """Whether a parameter can be the table's own memory: on the CPU and laid out in C order. Others are copied."""
    return parameter.device.type in ("cpu", "meta") and parameter.is_contiguous()


def users(tensor: torch.Tensor) -> int:
    """How many tensors (and arrays) share the memory of this one, itself included."""
    storage: Any = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1


def shared_with_strangers(parameters: Iterable[torch.Tensor]) -> set[int]:
    """The ids of those whose memory others than these share: a script that has it, a flat vector, another module.

    They must stay where they are: what is written there is theirs, and what they become must be seen there.
    """
    known = {id(p): p for p in parameters if p.device.type == "cpu" and p.layout is torch.strided}
    by_memory: dict[int, list[torch.Tensor]] = {}
    for p in known.values():
        by_memory.setdefault(p.untyped_storage().data_ptr(), []).append(p)
    return {id(p) for same in by_memory.values() if same[0].numel() and users(same[0]) > len(same) for p in same}


def as_held(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A table's tensor in the parameter's shape and dtype: a table holds a complex number as two real ones."""
    return torch.view_as_complex(tensor) if parameter.is_complex() else tensor


def as_kept(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values as a table takes them: on the CPU, in C order, complex numbers as pairs."""
    plain = parameter.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    return (torch.view_as_real(plain) if plain.is_complex() else plain).cpu().contiguous()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return as_kept(tensor).reshape(-1).view(torch.uint8)


class Leaf(TableParameter):
    """One parameter (a leaf of autograd's graph), its place in the table, and what was last seen of it.

    ``gradient`` and ``values`` are in the parameter's shape and dtype. ``counter`` and ``digest``: how a copied
    parameter looked when its values arrived; ``counter`` is autograd's, of writes in place. Of the step under way:
    ``count`` backward passes reached it, ``expected`` of them in a step; ``current`` is what ``.grad`` was given,
    ``spent`` once its step is taken. ``sparse``: autograd makes sparse ones. ``own``: autograd adds to a tensor of the
    script's, which is not the one ``given``. ``empty``: this worker has no gradient, and ``current`` stands
    for others'.
    """

    __slots__ = (
        "count",
        "counter",
        "current",
        "device",
        "digest",
        "empty",
        "expected",
        "given",
        "own",
        "parameter",
        "sparse",
        "spent",
    )

    def __init__(self, name: str, parameter: torch.Tensor, table: DenseTable, stays: bool) -> None:
        gradient, values = as_held(table.gradients[name], parameter), as_held(table.values[name], parameter)
        super().__init__(name, gradient, values, copies=stays or not shares_memory(parameter))
        self.parameter = parameter
        self.device = parameter.device if not parameter.is_meta else self.values.device
        self.spent = self.sparse = False
        self.own = self.empty = False
        self.given: weakref.ref[torch.Tensor] | None = None
        self.count = 0
        self.expected = 1
        self.current: LazyGradient | None = None
        self.counter = parameter._version
        self.digest: int | None = None  # none: it was not looked at

    def shared_by_others(self) -> bool:
        """Whether a script has more of this memory than the parameter."""
        return not self.copies and users(self.parameter) > 1 + (self.parameter is not self.values)

    def holds_values(self) -> bool:
        """Whether the parameter has the table's values already, to the bit: −0 is not 0."""
        p = self.parameter
        return not p.is_meta and p.layout is torch.strided and torch.equal(_bits(p), _bits(self.values))


class Parameters:
    """The leaves of one optimizer: how the model gets their values (``Shell``), and what a script wrote into them.

    ``stay``: ids of parameters that must stay in the memory that they have.
    """

    def __init__(
        self, table: DenseTable, parameters: Mapping[str, torch.Tensor], rank: int, stay: Collection[int] = ()
    ) -> None:
        self.table = table
        self.rank = rank
        self.guard: Guard | None = None
        self.leaves = tuple(Leaf(name, p, table, id(p) in stay) for name, p in parameters.items())
        self.parameters = [leaf.parameter for leaf in self.leaves]
        self._shared = [leaf for leaf in self.leaves if not leaf.copies]
        self._addresses = [leaf.values.data_ptr() for leaf in self._shared]

    # ---- values ----------------------------------------------------------------------------------

    def keep(self, leaves: Sequence[Leaf]) -> None:
        """Whoever looks at them need not wait any more."""
        if self.guard is not None:
            self.guard.take([leaf.parameter for leaf in leaves])

    def show(self, leaves: Sequence[Leaf], same: Collection[Leaf] = ()) -> None:
        """These leaves' values are here: show them to autograd, and remember how they look.

        ``same``: those that had these values before. A graph that was built on them is as good as it was.
        """
        if self.guard is not None:
            self.guard.take([leaf.parameter for leaf in leaves])
        for leaf in leaves:
            if leaf.copies and leaf not in same:
                # The only copy back to another device: one per parameter and step.
                with torch.no_grad():
                    leaf.parameter.copy_(leaf.values)
        # Memory changed under these tensors: a graph that saved them before must refuse to run backward.
        changed = [leaf for leaf in leaves if leaf not in same]
        torch.autograd.graph.increment_version([leaf.parameter for leaf in changed])
        for leaf in leaves:
            if leaf.copies:
                leaf.counter, leaf.digest = leaf.parameter._version, _digest(leaf.parameter)

    def next_step(self) -> None:
        """A step was sent off: graphs built on the old values are void."""
        if self.guard is not None:
            torch.autograd.graph.increment_version([leaf.parameter for leaf in self._shared])

    # ---- what a script wrote ---------------------------------------------------------------------

    def written(self) -> dict[str, torch.Tensor]:
        """The values, copied, of the parameters that somebody wrote since they arrived; they differ in at least a bit.

        Raises:
            ParameterModified: a parameter has another shape, dtype or device than the table holds.
        """
        if [leaf.parameter.data_ptr() for leaf in self._shared] != self._addresses:
            self._bring_home()
        names = set(self.table.written())
        for leaf in self.leaves:
            if leaf.copies:
                self._check_like(leaf)
                if leaf.counter != leaf.parameter._version or leaf.digest != _digest(leaf.parameter):
                    names.add(leaf.name)
        return {leaf.name: as_kept(leaf.parameter).clone() for leaf in self.leaves if leaf.name in names}

    def _bring_home(self) -> None:
        """``p.data = …``: other values at another address. They are written where the table's memory is."""
        for leaf, address in zip(self._shared, self._addresses, strict=True):
            if leaf.parameter.data_ptr() == address:
                continue
            self._check_like(leaf)
            if leaf.parameter.is_shared():  # type: ignore[no-untyped-call]
                raise ParameterModified(
                    f"parameter {leaf.name!r} was moved to memory that processes share (share_memory()) on rank "
                    f"{self.rank}; Headwater's workers share parameters through the servers: run them with `headwater "
                    "run --workers N`. The step was not taken"
                )
            self._part(leaf)
            if users(leaf.parameter) > 1:
                self._stay(leaf)
            else:
                leaf.values.copy_(leaf.parameter.detach())
                leaf.parameter.data = leaf.values
        self._shared = [leaf for leaf in self._shared if not leaf.copies]
        self._addresses = [leaf.values.data_ptr() for leaf in self._shared]

    def _part(self, leaf: Leaf) -> None:
        """What the script kept of the memory that the parameter has left stays as it is, in memory of its own."""
        ours = {id(leaf.values), id(self.table.values[leaf.name])}
        if users(leaf.values) == len(ours):
            return
        place: Any = leaf.values.untyped_storage()
        copy = place.clone()
        with torch._C.DisableTorchFunctionSubclass():  # nothing is looked at but where it lies
            for other in gc.get_objects():
                if not issubclass(type(other), torch.Tensor) or id(other) in ours:
                    continue
                if other.layout is not torch.strided or other.device.type != "cpu":
                    continue
                if other.untyped_storage()._cdata == place._cdata:
                    moved = torch.empty(0, dtype=other.dtype, device="cpu")
                    other.data = moved.set_(copy, other.storage_offset(), other.shape, other.stride())
        if users(leaf.values) > len(ours):
            raise ParameterModified(
                f"p.data = … moved parameter {leaf.name!r} to other memory on rank {self.rank}, and something that is "
                "no tensor (a graph that waits for its backward) still has its memory of before, which the next values "
                "will take; the step was not taken. Drop the graph, or write in place: p.data.copy_(…)"
            )

    def _stay(self, leaf: Leaf) -> None:
        """``p.data = …`` of memory that others have too: the parameter stays there, and is copied from now on."""
        begin, end = span(leaf.parameter)
        for other in self.leaves:
            start, stop = span(other.parameter)
            if other is not leaf and start < end and begin < stop:
                raise ParameterModified(
                    f"parameters {leaf.name!r} and {other.name!r} share memory on rank {self.rank} and are not the "
                    "same parameter (p.data = other.data); the step was not taken. Tie them before the optimizer is "
                    "made: assign one nn.Parameter to both places"
                )
        leaf.copies, leaf.digest = True, None

    def _check_like(self, leaf: Leaf) -> None:
        p, held = leaf.parameter, leaf.values
        same = p.shape == held.shape and p.dtype == held.dtype
        if not same or p.device != leaf.device:
            raise ParameterModified(
                f"parameter {leaf.name!r} is {p.dtype} of shape {tuple(p.shape)} on {p.device} on rank {self.rank}, "
                f"and was {held.dtype} of shape {tuple(held.shape)} when the optimizer was made: the model was moved "
                "or converted (model.to(), .half()) and the step was not taken. Do that before the optimizer is made"
            )

    def copies_as_shown(self) -> list[Leaf]:
        """Copied parameters that nobody wrote into. What was written stays, and is the state with the next step."""
        return [leaf for leaf in self.leaves if leaf.copies and leaf.counter == leaf.parameter._version]


def span(parameter: torch.Tensor) -> tuple[int, int]:
    """The addresses between which its elements lie."""
    if not parameter.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.data_ptr(), parameter.data_ptr() + (last + 1) * parameter.element_size()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(parameter: torch.Tensor) -> int:
    """Of a copied parameter's bits and their places, made where it lies: writes through ``.data`` leave no trace."""
    plain = parameter.detach().contiguous().reshape(-1)
    plain = torch.view_as_real(plain).reshape(-1) if plain.is_complex() else plain
    if plain.device.type == "cpu":
        raw: Any = plain.view(torch.uint8).numpy() if plain.numel() else b""
        return xxhash.xxh3_64_intdigest(memoryview(raw))
    words = plain.view(_WORDS[plain.element_size()])
    odd = torch.arange(1, 2 * words.numel(), 2, device=words.device)
    return int((words * odd).sum().item())
