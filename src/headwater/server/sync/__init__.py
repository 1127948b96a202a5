"""Synchronisation policies as decisions: who may read, what may be applied. No tensors, no I/O."""

from __future__ import annotations

from headwater.server.sync.bulk import Gathering
from headwater.server.sync.clocks import Clocks

__all__ = ["Clocks", "Gathering"]
