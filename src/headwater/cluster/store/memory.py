"""A store that keeps nothing when its process ends."""

from __future__ import annotations

from collections.abc import Mapping


class MemoryStore:
    """Nothing durable: for tests, for the simulator, and for a coordinator without a state folder."""

    def __init__(self, items: Mapping[str, bytes] | None = None) -> None:
        self._items = dict(items or {})

    def items(self) -> dict[str, bytes]:
        return dict(self._items)

    def put(self, changes: Mapping[str, bytes | None]) -> None:
        for key, value in changes.items():
            if value is None:
                self._items.pop(key, None)
            else:
                self._items[key] = bytes(value)

    def close(self) -> None:
        pass
