"""One module, many versions: which tensors a version puts into it, and how they get there.

The gateway has one instance of a model's code. Before a forward the tensors of a version are bound into it, by pointer:
some hundred assignments, no copy, and only when another version ran before. Values that a version lacks (frozen ones)
are the folder's own, shared by all versions; tied parameters stay tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.errors import ShapeMismatch
from headwater.gateway.engine_types import Weights
from headwater.types import VersionInfo


@dataclass(frozen=True, slots=True)
class Binding:
    """All tensors of a module for one version, in the module's order."""

    version: VersionInfo
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype


class Bindable:
    """A module whose tensors can be exchanged. ``bind`` belongs to one thread, ``fit`` to any.

    Parameters and persistent buffers can be exchanged; buffers keep the module's dtype, floating parameters get the
    version's, or ``dtype``.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module = module
        self._dtype = dtype
        self._names: dict[str, int] = {}
        self._homes: list[list[tuple[nn.Module, str]]] = []
        self._own: list[Tensor] = []
        self._cast: dict[torch.dtype, list[Tensor]] = {}
        self._bound: Binding | None = None
        known: dict[int, int] = {}
        for owner, key, name, tensor in _tensors(module):
            index = known.setdefault(id(tensor), len(self._own))
            if index == len(self._own):
                self._own.append(tensor)
                self._homes.append([])
            self._names[name] = index
            self._homes[index].append((owner, key))

    def fit(self, weights: Weights, version: VersionInfo) -> Binding:
        """The version as this module takes it: zero copy where the dtype is right.

        Raises ``ShapeMismatch`` for a tensor that the module lacks or has in another shape.
        """
        given = {self._index(name, weights[name], version): weights[name] for name in weights}
        dtype = self._dtype or _common([t for i, t in given.items() if isinstance(self._own[i], nn.Parameter)])
        dtype = dtype or _common(self._parameters()) or torch.float32
        own = self._own_in(dtype)
        tensors = tuple(_as(given[i], own[i]) if i in given else own[i] for i in range(len(own)))
        return Binding(version, tensors, dtype)

    def _index(self, name: str, tensor: Tensor, version: VersionInfo) -> int:
        what = f"version {version.number} ({version.name}) of {version.model} does not fit this model"
        index = self._names.get(name)
        if index is None:
            raise ShapeMismatch(
                f"{what}: it holds {name!r} of shape {tuple(tensor.shape)}, which the model lacks; "
                "the version was not loaded: serve it with the model that it was trained as"
            )
        if tensor.shape != self._own[index].shape:
            raise ShapeMismatch(
                f"{what}: {name!r} has shape {tuple(tensor.shape)} there and {tuple(self._own[index].shape)} here; "
                "the version was not loaded: serve it with the model that it was trained as"
            )
        return index

    def _parameters(self) -> list[Tensor]:
        return [t for t in self._own if isinstance(t, nn.Parameter)]

    def _own_in(self, dtype: torch.dtype) -> list[Tensor]:
        """The module's own values, cast once for each dtype that comes."""
        if dtype not in self._cast:
            self._cast[dtype] = [_like(t, dtype) for t in self._own]
        return self._cast[dtype]

    def bind(self, binding: Binding) -> None:
        """Make the module compute with this version from the next forward on."""
        if binding is not self._bound:
            for homes, tensor in zip(self._homes, binding.tensors, strict=True):
                for owner, key in homes:
                    setattr(owner, key, tensor)
            self._bound = binding

    def forget(self, binding: Binding) -> None:
        """If this version is bound, the module goes back to its own values: its memory may go."""
        if binding is self._bound:
            self.bind(Binding(binding.version, tuple(self._own), binding.dtype))


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Every parameter and buffer with its owner, under every name that it has."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for each in (owner.named_parameters, owner.named_buffers):
            for key, tensor in each(recurse=False, remove_duplicate=False):
                yield owner, key, f"{path}.{key}" if path else key, tensor


def _common(tensors: list[Tensor]) -> torch.dtype | None:
    """The dtype that holds the values of all floating tensors; None without any."""
    found: torch.dtype | None = None
    for tensor in tensors:
        if tensor.is_floating_point():
            found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    return found


def _like(own: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the dtype that the model computes in; buffers stay as they are."""
    if isinstance(own, nn.Parameter) and own.is_floating_point() and own.dtype != dtype:
        return nn.Parameter(own.detach().to(dtype), requires_grad=False)
    return own


def _as(given: Tensor, own: Tensor) -> Tensor:
    """A version's tensor in the place of ``own``: a view where the dtype is the same."""
    tensor = given.detach().to(own.dtype)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor
