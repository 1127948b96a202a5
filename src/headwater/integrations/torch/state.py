"""``opt.state``: the servers' optimizer state, as a script sees and changes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

Slots = Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]]


class State(defaultdict[torch.Tensor, Any]):
    """Empty until somebody looks; then a copy of what the servers hold, and what becomes of it is theirs again.

    ``fetch``: the state of each parameter. ``changed()``, before a step: what the script has made of it.
    """

    def __init__(self, fetch: Callable[[], Slots]) -> None:
        super().__init__(dict)
        self._fetch = fetch
        self._seen: dict[torch.Tensor, dict[str, torch.Tensor]] | None = None

    def _look(self) -> None:
        if self._seen is None:
            self._seen = {}
            for parameter, slots in self._fetch():
                super().__setitem__(parameter, dict(slots))
                self._seen[parameter] = {name: slot.clone() for name, slot in slots.items()}

    def changed(self) -> dict[torch.Tensor, dict[str, Any]] | None:
        """All of the state, if it is not what was fetched; None if nobody changed anything. Forgets the copy."""
        if self._seen is None:
            return None
        now, before = dict(super().items()), self._seen
        self._seen = None
        super().clear()
        now = {parameter: slots for parameter, slots in now.items() if slots}
        return None if _same(now, before) else now


def _same(now: dict[torch.Tensor, Any], before: dict[torch.Tensor, dict[str, torch.Tensor]]) -> bool:
    if now.keys() != before.keys():
        return False
    for parameter, slots in before.items():
        found = now[parameter]
        if found.keys() != slots.keys():
            return False
        if not all(torch.equal(torch.as_tensor(found[name]), slot) for name, slot in slots.items()):
            return False
    return True


def _looking(name: str) -> Any:
    plain = getattr(defaultdict, name)

    def method(self: State, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return plain(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    "__getitem__", "__setitem__", "__delitem__", "__iter__", "__len__", "__contains__", "__eq__", "__repr__", "keys",
    "values", "items", "get", "pop", "popitem", "clear", "update", "setdefault", "copy",
):  # fmt: skip
    setattr(State, _name, _looking(_name))
