"""``headwater bench recovery``: how long a death stops training, and what deaths cost in the long run.

First part: 3 servers with two copies of every shard and 3 workers under ``Bulk``, which push small tables as fast as
they can (the processes of ``headwater chaos``, over shared memory). One at a time a primary gets SIGKILL, a primary
gets SIGSTOP, a worker gets SIGKILL; before the next, all copies and workers are back. Second part: ``goodput``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from random import Random

from headwater.errors import DeadlineExceeded
from headwater_bench import goodput
from headwater_bench.chaos.ledger import Ledger, Tail
from headwater_bench.chaos.processes import add_workers
from headwater_bench.chaos.schedule import WORKERS
from headwater_bench.chaos.workload import Workload
from headwater_bench.options import Options
from headwater_bench.report import Figure, figure
from headwater_bench.rig.cluster import Cluster
from headwater_bench.rig.monitor import Monitor
from headwater_bench.rig.supervisor import Supervisor
from headwater_bench.statistics import percentile

EVENTS = 20
SEED = 1
TURN = 0.01
PATIENCE = 30.0  # seconds for any recovery
SHADOW = 1.0  # seconds after a worker's death in which a survivor's pause may begin
FIRST = 20  # acknowledged pushes of each worker before the first event


def measure(options: Options) -> list[Figure]:
    """All figures; ``rounds`` is the number of events of each kind."""
    events = options.rounds_or(EVENTS)
    options.note("recovery: starting 3 servers and 3 workers")
    with Cluster(SEED, local=True) as cluster, _monitor(cluster) as monitor:
        add_workers(cluster, Workload("bulk", WORKERS))
        run = RecoveryRun(cluster, monitor)
        run.begin()
        found: dict[str, list[float]] = {}
        for name, strike in (
            ("primary killed", run.kill_server),
            ("primary stopped", run.stop_server),
            ("worker killed", run.kill_worker),
        ):
            options.note(f"recovery: {name}, {events} times")
            found[name] = [strike() for _ in range(events)]
        lost = run.lost()
    return recovery_figures(found, lost) + goodput.measure(options)


def recovery_figures(seconds: dict[str, list[float]], lost: int) -> list[Figure]:
    """Figures from the seconds of each event, and the steps that workers who were not struck have lost."""
    found = []
    for name in ("primary killed", "primary stopped"):
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            text = f"{name}, acknowledges again, {label}"
            found.append(figure("recovery", text, percentile(seconds[name], share), "s", 0.0))
    pauses = seconds["worker killed"]
    found.append(figure("recovery", "worker killed, survivors' pause, p50", percentile(pauses, 0.5), "s", 0.0))
    found.append(figure("recovery", "worker killed, survivors' pause, longest", max(pauses), "s", 0.0))
    found.append(figure("recovery", "steps lost by workers that were not struck", lost, "steps", 0.0))
    return found


@contextlib.contextmanager
def _monitor(cluster: Cluster) -> Iterator[Monitor]:
    with contextlib.closing(Monitor(cluster.direct["coordinator"], cluster.token.encode())) as monitor:
        yield monitor


class RecoveryRun:
    """One event at a time. Every strike returns its seconds when everybody is back."""

    def __init__(self, cluster: Cluster, monitor: Monitor) -> None:
        self._cluster, self._monitor = cluster, monitor
        self._supervisor = Supervisor(
            cluster, monitor, lambda member, code: None, period=TURN, again=math.inf, each_turn=self._read
        )
        self._random = Random(SEED)
        self._names = [f"w{rank}" for rank in range(WORKERS)]
        self._tails = {name: Tail(cluster.file(name), i) for i, name in enumerate(self._names)}

    def begin(self) -> None:
        """Start the workers; until all push."""
        for name in self._names:
            self._cluster.start(name)
        self._until(lambda: all(len(self._pushes(name)) >= FIRST for name in self._names), "every worker pushes")
        self._all_back(time.monotonic())

    def kill_server(self) -> float:
        name = self._primary()
        moment = time.monotonic()
        self._cluster.kill(name)
        seconds = self._acknowledged_again(moment)
        self._cluster.start(name, wait=False)
        self._all_back(time.monotonic())
        return seconds

    def stop_server(self) -> float:
        name = self._primary()
        moment = time.monotonic()
        self._cluster.stop(name)
        seconds = self._acknowledged_again(moment)
        self._cluster.go_on(name)
        self._all_back(time.monotonic())
        return seconds

    def kill_worker(self) -> float:
        """The survivors' pause: the longest time between two acknowledgements that one of them got."""
        victim = self._random.choice(self._names)
        survivors = [name for name in self._names if name != victim]
        moment = time.monotonic()
        self._cluster.kill(victim)
        over = moment + SHADOW
        self._until(lambda: all(self._after(name, over) for name in survivors), "the survivors are acknowledged")
        pause = max(longest_gap(self._acks(name), moment, time.monotonic()) for name in survivors)
        self._cluster.start(victim)
        self._all_back(time.monotonic())
        return pause

    def lost(self) -> int:
        """Pushes that ended with an error, of workers that nobody struck: a survivor's push has none."""
        return sum(len(tail.ledger.errors) for tail in self._tails.values())

    # ---- waiting ---------------------------------------------------------------------------------

    def _until(self, done: Callable[[], bool], what: str) -> None:
        if not self._supervisor.wait(done, PATIENCE):
            raise DeadlineExceeded(f"the benchmark waited {PATIENCE:g} s until {what}")

    def _read(self, now: float) -> None:
        del now
        for tail in self._tails.values():
            tail.read()

    def _acknowledged_again(self, moment: float) -> float:
        """Seconds until a push that left after ``moment`` was acknowledged, by every shard."""
        self._until(lambda: any(self._after(name, moment) for name in self._names), "a push is acknowledged")
        return min(acked - moment for name in self._names for acked in self._after(name, moment))

    def _all_back(self, since: float) -> None:
        def back() -> bool:
            return self._supervisor.redundant_since(since) and all(self._after(n, since) for n in self._names)

        self._until(back, "all copies and workers are back")
        until = time.monotonic() + self._random.uniform(0.2, 0.4)
        self._until(lambda: time.monotonic() > until, "a moment has passed")

    # ---- what is known ---------------------------------------------------------------------------

    def _primary(self) -> str:
        """A server that is the primary of a shard."""
        assert self._monitor.sight is not None
        status = self._monitor.sight.status
        number = self._random.choice(sorted({shard.primary for shard in status.shards}))
        pid = next(server.pid for server in status.servers if server.server == number)
        return next(member.name for member in self._cluster.of("server") if member.pid == pid)

    def _ledger(self, name: str) -> Ledger:
        return self._tails[name].ledger

    def _pushes(self, name: str) -> list[tuple[float, float]]:
        """Sent and acknowledged."""
        return [(p.sent, p.acked) for p in list(self._ledger(name).of("ledger").values()) if p.acked is not None]

    def _acks(self, name: str) -> list[float]:
        return [acked for _, acked in self._pushes(name)]

    def _after(self, name: str, moment: float) -> list[float]:
        """Acknowledgements of what left after a moment."""
        return [acked for sent, acked in self._pushes(name)[-200:] if sent >= moment]


def longest_gap(moments: Sequence[float], begin: float, end: float) -> float:
    """The longest time between two neighbours, of which the second lies in ``begin … end``."""
    return max((b - a for a, b in itertools.pairwise(moments) if begin <= b <= end), default=0.0)
