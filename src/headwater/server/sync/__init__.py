"""Synchronisation policies as decisions: who may read, what may be applied. No tensors, no I/O."""

from __future__ import annotations

from headwater.server.sync.alike import Alike
from headwater.server.sync.bulk import Gathering
from headwater.server.sync.clocks import Clocks
from headwater.server.sync.words import Words

__all__ = ["Alike", "Clocks", "Gathering", "Words"]
