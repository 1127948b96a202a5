"""For tests of Headwater and of programs that use it. (``inproc://`` is the one-process cluster.)"""

from headwater.testing.clock import FakeClock

__all__ = ["FakeClock"]
