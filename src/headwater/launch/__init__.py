"""Start a cluster and its workers on this machine."""

from __future__ import annotations

from headwater.launch.local import Launcher, address_of, cores, launch
from headwater.launch.outcome import Outcome
from headwater.launch.process import Process
from headwater.launch.shape import Shape
from headwater.launch.streams import Sturdy

__all__ = ["Launcher", "Outcome", "Process", "Shape", "Sturdy", "address_of", "cores", "launch"]
