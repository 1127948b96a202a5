"""Runs each call of a module inside a context manager, by giving the module a subclass of its own class.

Why not torch's hooks: a KeyboardInterrupt skips even those with ``always_call``, and a forward that a user
interrupts in a notebook would count as under way for ever. Why not around ``forward``: the module's own hooks run
before it (``weight_norm`` computes a parameter there) and would see another version than ``forward`` does.
"""

from __future__ import annotations

import copyreg
import weakref
from contextlib import AbstractContextManager
from types import new_class
from typing import Any, Protocol

import torch

from headwater.errors import UsageError


class CallContext(Protocol):
    """Gives the context manager of each call. ``closed``: calls are plain ones again."""

    @property
    def closed(self) -> bool: ...
    def hold(self) -> AbstractContextManager[Any]: ...


def put(module: torch.nn.Module, keeper: CallContext) -> None:
    """From now on ``module(...)`` runs inside ``keeper.hold()``. Raises ``UsageError``: the module is unchanged."""
    plain, own = type(module), weakref.ref(module)

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if keeper.closed or self is not own():  # a copy that has kept this class (DataParallel's replicas)
            return plain.__call__(self, *args, **kwargs)
        with keeper.hold():
            return plain.__call__(self, *args, **kwargs)

    def reduce(self: torch.nn.Module, protocol: Any) -> Any:
        """A copy, and what is pickled, is of the plain class: nobody keeps it current."""
        made = plain.__reduce_ex__(self, protocol)
        if not isinstance(made, tuple):
            return made
        make, *kinds = (_plain(each) if isinstance(each, type) else each for each in (made[0], *made[1]))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined] # pickle would compare the class
            make = kinds[0].__new__
        return make, tuple(kinds), *made[2:]

    def fill(namespace: dict[str, Any]) -> None:
        namespace |= {
            "__call__": call,
            "__reduce_ex__": reduce,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "_headwater_gate": (plain, keeper),
        }

    try:
        _set(module, new_class(plain.__name__, (plain,), exec_body=fill))
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(
            f"a {plain.__name__} cannot be followed ({error}); nothing was changed. Copy versions into it instead "
            "(weights.copy_to), or follow the module that it was made of"
        ) from error


def take_away(module: torch.nn.Module) -> None:
    """Give the module its own class again, as far as the keepers are closed."""
    while (gate := vars(type(module)).get("_headwater_gate")) is not None and gate[1].closed:
        _set(module, gate[0])


def _set(module: torch.nn.Module, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)  # traced modules would set it on what they wrap


def _plain(kind: type) -> type:
    while (gate := vars(kind).get("_headwater_gate")) is not None:
        kind = gate[0]
    return kind
