"""``headwater bench races``: a million reads while versions are published and processes die; is one of them torn?

Real processes: three servers with two copies of every shard, a publisher that steps and publishes without a rest, and
readers that lease, check every element of every tensor and release, over shared memory and over TCP with deltas.
Servers, publisher, readers and the coordinator are killed and stopped meanwhile. ``values`` says what a read must find,
``reader`` reads, ``runner`` strikes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from headwater_bench.options import Options
from headwater_bench.report import Figure, figure

if TYPE_CHECKING:
    from headwater_bench.races.runner import RaceResult

READS, SECONDS, EVERY = 100_000, 120.0, 1.0


def measure(options: Options) -> list[Figure]:
    """All counts; until so many reads, or so many seconds are over."""
    result = race(options, options.reads or READS, options.seconds or SECONDS)
    for line in result.words[:20]:
        options.note(f"races: {line}")
    return figures(result)


def race(
    options: Options, reads: int, seconds: float, *, every: float = EVERY, server: str = "headwater.server"
) -> RaceResult:
    """One race. ``server``: the module that servers run."""
    from headwater_bench.races.processes import add_processes
    from headwater_bench.races.runner import RaceRun
    from headwater_bench.rig.cluster import Cluster
    from headwater_bench.rig.monitor import Monitor

    with (
        Cluster(options.seed, local=True, proxied=False, server=server) as cluster,  # proxies would be its slowest part
        contextlib.closing(Monitor(cluster.direct["coordinator"], cluster.token.encode())) as monitor,
    ):
        add_processes(cluster, options.seed)
        return RaceRun(cluster, monitor, options.seed, every, options.note).run(reads, seconds)


def figures(result: RaceResult) -> list[Figure]:
    """Counts first of what must not be, then of what was done and struck."""
    from headwater_bench.races.counters import ERRORS

    c = result.counts
    found = [figure("races", "torn or mixed reads", c["torn"] + c["mixed"], "reads", 0.0)]
    found.append(figure("races", "reads with another version's label", c["mislabelled"], "reads", 0.0))
    found.append(figure("races", "versions that changed while they were held", c["changed"], "looks", 0.0))
    found.append(figure("races", "silent after the last fault", len(result.silent), "processes", 0.0))
    found.append(figure("races", "reads", c["reads"], "reads"))
    found += [figure("races", f"of them by {kind}", n["reads"], "reads") for kind, n in result.kinds.items()]
    for name, text in (
        ("fetched", "of them the first of a version in that process"),
        ("rechecks", "looks at versions that were held"),
        ("afterwards", "of them after their lease had ended"),
        ("shared", "parts as shared memory"),
        ("whole", "parts as bytes"),
        ("deltas", "parts as deltas"),
        ("damaged", "parts that came damaged"),
        ("published", "versions published"),
        ("steps", "steps trained"),
    ):
        found.append(figure("races", text, c[name], ""))
    found += [figure("races", f"refused or failed: {code}", c[code], "") for code in ERRORS if c[code]]
    found += [figure("races", name, count, "") for name, count in sorted(result.struck.items())]
    found.append(figure("races", "ended by themselves", len(result.surprises), "processes"))
    found.append(figure("races", "time", result.seconds, "s"))
    found.append(figure("races", "reads a second", c["reads"] / result.seconds if result.seconds else 0.0, "1/s"))
    return found
