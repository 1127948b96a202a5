"""For tests of Headwater and of programs that use it. (``inproc://`` is the one-process cluster.)

The simulator runs whole clusters of the real classes under a virtual clock; it needs greenlet (the ``dev`` extra):

- ``battery``: many seeds, a failing one shortened and explained; ``python -m headwater.testing.battery --help``.
- ``scenario``, ``faults``: what a run is and what goes wrong in it, as data. ``times``: what things cost.
- ``cluster``: one run. ``oracles``: what must be true of it. ``predict``: how fast a cluster would be.
- ``scheduler``, ``processes``, ``network``, ``links``, ``hosts``, ``workload``: what it is made of.
"""

from headwater.testing.clock import FakeClock

__all__ = ["FakeClock"]
