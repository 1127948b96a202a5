"""Start a cluster and its workers on this machine."""

from __future__ import annotations

from headwater.launch.local import Launcher, address_of, cores, launch
from headwater.launch.outcome import Outcome
from headwater.launch.process import Process
from headwater.launch.shape import Shape

__all__ = ["Launcher", "Outcome", "Process", "Shape", "address_of", "cores", "launch"]
