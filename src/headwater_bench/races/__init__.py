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
    from headwater_bench.races.runner import Course

READS, SECONDS, EVERY = 100_000, 120.0, 1.0


def measure(options: Options) -> list[Figure]:
    """All counts; until so many reads, or so many seconds are over."""
    course = race(options, options.reads or READS, options.seconds or SECONDS)
    for line in course.words[:20]:
        options.note(f"races: {line}")
    return figures(course)


def race(
    options: Options, reads: int, seconds: float, *, every: float = EVERY, server: str = "headwater.server"
) -> Course:
    """One race. ``server``: the module that servers run."""
    from headwater_bench.races.runner import Race
    from headwater_bench.races.processes import Town
    from headwater_bench.rig.monitor import Monitor

    with (
        Town(options.seed, server=server) as town,
        contextlib.closing(Monitor(town.direct["coordinator"], town.token.encode())) as monitor,
    ):
        return Race(town, monitor, options.seed, every, options.note).run(reads, seconds)


def figures(course: Course) -> list[Figure]:
    """Counts first of what must not be, then of what was done and struck."""
    from headwater_bench.races.counters import ERRORS

    c = course.counts
    found = [figure("races", "torn or mixed reads", c["torn"] + c["mixed"], "reads", 0.0)]
    found.append(figure("races", "reads with another version's label", c["mislabelled"], "reads", 0.0))
    found.append(figure("races", "versions that changed while they were held", c["changed"], "looks", 0.0))
    found.append(figure("races", "silent after the last fault", len(course.silent), "processes", 0.0))
    found.append(figure("races", "reads", c["reads"], "reads"))
    found += [figure("races", f"of them by {kind}", n["reads"], "reads") for kind, n in course.kinds.items()]
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
    found += [figure("races", name, count, "") for name, count in sorted(course.struck.items())]
    found.append(figure("races", "ended by themselves", len(course.surprises), "processes"))
    found.append(figure("races", "time", course.seconds, "s"))
    found.append(figure("races", "reads a second", c["reads"] / course.seconds if course.seconds else 0.0, "1/s"))
    return found
