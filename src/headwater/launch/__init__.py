"""Start a cluster and its workers on this machine."""

from __future__ import annotations

from headwater.launch.local import Launcher, Outcome, cores, launch
from headwater.launch.process import Process

__all__ = ["Launcher", "Outcome", "Process", "cores", "launch"]
