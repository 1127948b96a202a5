"""What ``.grad`` holds between ``backward()`` and whoever looks at it.

A gradient lies in the table's memory, where the next one will lie too, and with several workers it is one worker's
share of what a script may want to clip. So ``.grad`` is a ``LazyGradient``: autograd adds to it as to any tensor, and
the first operation on it that reads or writes elements is done on a tensor of its own, which ``.grad`` holds from then
on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad_fn", "is_leaf", "grad",
    "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_meta", "is_nested", "is_cpu", "is_cuda", "is_mps",
    "is_xpu", "is_xla", "is_ipu", "is_vulkan", "is_maia", "is_mtia", "names", "output_nr", "retains_grad", "_version",
    "_backward_hooks",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "get_device", "requires_grad_",
    "detach_", "__len__", "__hash__", "_is_view", "_nnz",
)  # fmt: skip

DESCRIBES: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(torch.Tensor, name)]
    + [getattr(torch.Tensor, name) for name in _METHODS if hasattr(torch.Tensor, name)]
    + [torch.numel, torch.is_floating_point, torch.is_complex]
)
"""What says something about a gradient without a look at its elements."""

no_torch_function: Any = torch._C.DisableTorchFunctionSubclass  # noqa: SLF001 - torch's documented way for subclasses

_ZEROES: frozenset[Any] = frozenset([torch.Tensor.zero_, torch.zero_, torch._foreach_zero_])


class Keeper(Protocol):
    """Who knows what a gradient is when somebody looks."""

    def reveal(self, leaf: Any, gradient: LazyGradient) -> torch.Tensor: ...
    def zero(self, leaf: Any, gradient: LazyGradient) -> torch.Tensor: ...


class LazyGradient(torch.Tensor):
    """A gradient in the table's memory, until somebody looks.

    ``keeper.reveal(leaf, gradient)`` gives the tensor to do operations on; ``keeper.zero(leaf, gradient)`` one of
    zeros, without a look. Neither is kept alive: of an optimizer that is gone the gradient is a plain tensor's.
    """

    keeper: weakref.ref[Keeper]
    leaf: weakref.ref[Any]
    plain: torch.Tensor | None

    @staticmethod
    def over(memory: torch.Tensor, keeper: Keeper, leaf: Any) -> LazyGradient:
        """One over ``memory``, a strided tensor without a graph."""
        made: LazyGradient = torch.Tensor._make_subclass(LazyGradient, memory)  # noqa: SLF001 - torch's own name for it
        made.keeper, made.leaf, made.plain = weakref.ref(keeper), weakref.ref(leaf), None
        return made

    def looked_at(self, zeroes: bool) -> torch.Tensor:
        """The tensor to do an operation on, one that zeroes it or another."""
        if self.plain is None:
            keeper, leaf = self.keeper(), self.leaf()
            if keeper is None or leaf is None:
                with no_torch_function():
                    self.plain = self.detach().as_subclass(torch.Tensor).clone()
            else:
                self.plain = keeper.zero(leaf, self) if zeroes else keeper.reveal(leaf, self)
        return self.plain

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in DESCRIBES:
            zeroes = func in _ZEROES
            args = _looked_at(args, zeroes)
            kwargs = _looked_at(kwargs, zeroes)
        with no_torch_function():
            return func(*args, **(kwargs or {}))


def _looked_at(value: Any, zeroes: bool) -> Any:
    """``value`` with the plain tensor in place of each ``LazyGradient``, in containers too."""
    if isinstance(value, LazyGradient):
        return value.looked_at(zeroes)
    if isinstance(value, tuple | list):
        found = [_looked_at(item, zeroes) for item in value]
        return found if isinstance(value, list) else _tuple(value, found)
    if isinstance(value, dict):
        return {key: _looked_at(item, zeroes) for key, item in value.items()}
    return value


def _tuple(value: tuple[Any, ...], found: list[Any]) -> tuple[Any, ...]:
    return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
