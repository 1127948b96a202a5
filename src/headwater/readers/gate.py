"""Calls of a module, each inside something of ours: by a class between the module and its own.

Not by torch's hooks: even those that are always called are not for a KeyboardInterrupt, and the forward that a user
gives up in a notebook would be under way for ever. Not around ``forward`` either: what a module's own hooks make of its
parameters (``weight_norm``) would be of another version than the rest.
"""

from __future__ import annotations

import copyreg
import weakref
from contextlib import AbstractContextManager
from types import new_class
from typing import Any, Protocol

import torch

from headwater.errors import UsageError


class Keeper(Protocol):
    """Whoever wants to be around each call. ``closed``: not any more."""

    @property
    def closed(self) -> bool: ...
    def hold(self) -> AbstractContextManager[Any]: ...


def put(module: torch.nn.Module, keeper: Keeper) -> None:
    """From now on ``module(...)`` is inside ``keeper.hold()``. Raises ``UsageError``; then the module is as it was."""
    plain, own = type(module), weakref.ref(module)

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if keeper.closed or self is not own():  # a replica or another copy, which keeps this class
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
