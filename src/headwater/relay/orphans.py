"""Versions that the other side has no more and readers here still hold: not to be leased again, kept until they end."""

from __future__ import annotations

from collections.abc import Callable, Collection

from headwater.versions.entries import Entry


class Orphans:
    """``drop`` is called with a version's number when nobody holds it any more."""

    def __init__(self, drop: Callable[[int], None]) -> None:
        self._entries: dict[int, Entry] = {}
        self._drop = drop

    def add(self, entry: Entry) -> None:
        """A version is not one of the catalogue's any more. Who leases it may still be fetching it."""
        if entry.leases:
            self._entries[entry.number] = entry
        else:
            self._drop(entry.number)

    def discard(self, number: int) -> None:
        """Another version has this number now."""
        if self._entries.pop(number, None) is not None:
            self._drop(number)

    def released(self, session: int, number: int) -> None:
        """A reader has released a lease."""
        entry = self._entries.get(number)
        if entry is not None and entry.leases[session]:
            entry.leases[session] -= 1
            self._look(entry)

    def holds(self, session: int, numbers: Collection[int]) -> None:
        """A reader leases these versions, and no others."""
        for entry in [entry for number, entry in self._entries.items() if number not in numbers]:
            entry.leases.pop(session, None)
            self._look(entry)

    def keep(self, sessions: Collection[int]) -> None:
        """These readers are there, and no others."""
        for number, entry in list(self._entries.items()):
            if not set(sessions) & set(entry.leases):
                self.discard(number)

    def _look(self, entry: Entry) -> None:
        if not entry.leases.total():
            self.discard(entry.number)
