"""What every run under faults does between two looks: notice who has ended, undo what is over, start who is due.

One thread, one loop; what blocks (asking the coordinator) has a thread elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from headwater_bench.rig.cluster import Cluster, RigProcess
from headwater_bench.rig.monitor import Monitor

QUIET = 0.5  # seconds after a fault until the next may cost a server its place: the first may have later effects
WHOLE = 30.0  # seconds after a fault in which every shard has all its copies again


class Supervisor:
    """``ended`` hears of every process that ended by itself, with its exit code; ``each_turn`` is called in each turn.

    ``again``: seconds until such a process is started again, ``period``: seconds between two looks.
    """

    def __init__(
        self,
        cluster: Cluster,
        monitor: Monitor,
        ended: Callable[[RigProcess, int], None],
        *,
        period: float,
        again: float,
        each_turn: Callable[[float], None] = lambda now: None,
    ) -> None:
        self.cluster, self.monitor = cluster, monitor
        self._ended, self._each_turn = ended, each_turn
        self._period, self._again = period, again

    def turn(self) -> None:
        """Everything that is due."""
        now = time.monotonic()
        self.cluster.reap()
        exits, self.cluster.exits = self.cluster.exits, []
        for member, code in exits:
            if not (member.leaving or member.killed):
                self._ended(member, code)
                member.due = now + self._again
        self._each_turn(now)
        for member in self.cluster.members.values():
            if member.due is not None and member.due <= now and not member.running:
                self.cluster.start(member.name, wait=False)

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Turn until ``done``; whether it was within ``seconds``."""
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() >= until:
                return False
            self.turn()
            time.sleep(self._period)
        return True

    def all_servers_run(self) -> bool:
        return all(member.running and not member.stopped for member in self.cluster.of("server"))

    def redundant_since(self, moment: float) -> bool:
        """Whether the coordinator, asked after ``moment``, said that every shard has all its copies on servers that
        run."""
        return self.monitor.redundant_since(moment, {m.pid for m in self.cluster.of("server") if m.running})
