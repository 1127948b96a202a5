"""What the coordinator must remember: a few small keys that are on disk before anybody hears of them.

A store promises three things and nothing else:

- ``put`` is atomic, and durable when it returns: after a crash all of its changes are there, or none.
- ``items`` gives what all the ``put``\\ s before have left.
- One holder at a time. A second one is refused by ``StateInUse``, and the hold ends with its process, however it ends.

**etcd** (for clusters that already run it) fits behind the same three: a key is ``<cluster>/<key>``, ``items`` is
one range read of that prefix, ``put`` one ``Txn`` of puts and deletes. The hold is a key under a lease that the
coordinator keeps alive, and every ``Txn`` compares that this key is still its own, so a holder whose lease ran out is
refused by the ``Txn`` itself (``StateInUse`` from ``put``) and stops. etcd's limits (128 changes and 1.5 MB per
``Txn``) are why values here are small and one ``put`` holds what one event changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Store(Protocol):
    """Keys and values that outlive the process; the top of this file says what they promise."""

    def items(self) -> dict[str, bytes]:
        """Everything there is. Raises ``StateCorrupt``."""

    def put(self, changes: Mapping[str, bytes | None]) -> None:
        """All of ``changes``, or none; ``None`` deletes. On disk when it returns.

        Raises ``ClusterError``: nothing was kept, or (it says so) whether it was kept is unknown and the store takes
        nothing more until it is opened again.
        """

    def close(self) -> None:
        """Let go of it; another may hold it then. Closing twice is harmless."""
