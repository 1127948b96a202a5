"""The counts against those in the repository."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headwater

FIGURES = Path(headwater.__file__).parents[2] / "benchmarks" / "guard.json"
VERSION = "{}.{}".format(*sys.version_info)

Figures = Mapping[str, Mapping[str, int]]


def worse(found: Figures, known: Figures, tolerance: Mapping[str, float]) -> list[str]:
    """A line for each count that is above its figure by more than its tolerance (a share), and for each without one."""
    lines = []
    for workload, counts in found.items():
        for name, value in counts.items():
            figure = known.get(workload, {}).get(name)
            if figure is None:
                lines.append(f"{workload}: no figure for {name} ({value})")
            elif value > figure * (1 + tolerance[name]):
                lines.append(f"{workload}: {value} {name}, {figure} in the repository")
    return lines


def better(found: Figures, known: Figures, tolerance: Mapping[str, float]) -> list[str]:
    """The same for those that are below."""
    return [
        f"{workload}: {value} {name}, {known[workload][name]} in the repository"
        for workload, counts in found.items()
        for name, value in counts.items()
        if value < known.get(workload, {}).get(name, 0) * (1 - tolerance[name])
    ]


def measure(show: int = 0) -> Figures:
    """Count in this process. Nothing else may have run in it."""
    import torch

    from headwater_bench.guard.counting import Profile
    from headwater_bench.guard.workloads import WORKLOADS

    torch.set_num_threads(1)
    found: dict[str, dict[str, int]] = {}
    for workload, run in WORKLOADS.items():
        counts, functions = run(Profile())
        found[workload] = counts._asdict()
        for name, number in functions[:show]:
            print(f"{workload}: {number:6.1f} × {name}", file=sys.stderr)
    return found


def main(arguments: list[str]) -> None:
    """Ends in ``SystemExit``: 1 if something is worse than its figure, 2 without figures for this version of Python."""
    parser = argparse.ArgumentParser(prog="python -m headwater_bench.guard")
    parser.add_argument("--update", action="store_true", help="write what is found as the new figures")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="the functions that are called most")
    parser.add_argument("--count", action="store_true", help="print the counts as JSON and judge nothing")
    given = parser.parse_args(arguments)
    if not FIGURES.exists():
        parser.error("benchmarks/guard.json is not here: the guard is for a checkout of Headwater")
    if given.count:
        print(json.dumps(measure(given.show)), flush=True)
        os._exit(0)  # servers' threads still run: nothing that they use may be taken down under them
    sys.exit(_judge(_apart(given.show), given.update))


def _apart(show: int) -> Figures:
    """The counts of a process of their own: without this one's modules, environment and hash seed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
    command = [sys.executable, "-m", "headwater_bench.guard", "--count", "--show", str(show)]
    environment = kept | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    found: Figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    return found


def _judge(found: Figures, update: bool) -> int:
    kept: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    tolerance, known = kept["tolerance"], kept["figures"].get(VERSION)
    if update:
        kept["figures"][VERSION] = found
        FIGURES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        known = known or found
    for workload, counts in found.items():
        print(f"{workload}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
    if known is None:
        print(f"no figures for Python {VERSION}: make bench-guard UPDATE=1 writes them")
        return 2
    bad, good = worse(found, known, tolerance), better(found, known, tolerance)
    for line in bad:
        print(f"MORE THAN BEFORE: {line}")
    for line in good:
        print(f"less than before: {line}; keep it: make bench-guard UPDATE=1")
    return 1 if bad and not update else 0
