"""The same dense and small work on Headwater and its peers, side by side.

``make bench-peers``, or ``python benchmarks/peers/run.py``. Each peer has a virtual environment of its own
(``.venv-NAME`` beside this file), made on the first run from ``requirements-NAME.txt``. The table is printed and
saved as ``benchmarks/peers.md``; the raw seconds are in ``benchmarks/peers/runs/``, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headwater_bench.report import Machine, machine, number
from headwater_bench.statistics import percentile

HERE = Path(__file__).parent
PAGE = HERE.parent / "peers.md"
PEERS = ("headwater", "gloo", "ray", "tensorflow")
HEAD = ("system", "version", "dense SGD, ms", "dense AdamW, ms", "small p50, µs", "small p99, µs", "dense SGD, ×")

Seconds = dict[str, list[list[float]]]
"""Seconds by work (``SGD``, ``AdamW``, ``small``), one list per pass."""

PROSE = """# Peers: the same work on other systems

Command: `make bench-peers` (`python benchmarks/peers/run.py`); each peer runs in its own virtual environment.

*Dense*: 64 MB of float32 gradients leave one worker, one optimizer step is applied where the parameters live, and
the worker has the fresh 64 MB. *Small*: the same with 1 KB. Times are the median over {passes} passes of each pass's
median; the range of the passes' medians is in brackets. Systems take turns, so that a noisy neighbour hits all of
them. The last column is how many times longer than Headwater in its own buffers.

Machine: {machine}.

{table}
What each one does:

- **Headwater, own buffers**: one table, `Bulk`, two servers. The gradient already lies in the table's `.gradient`
  buffer (where a backward pass writes it) and `pull()` gives live values: nothing is copied. **Copied in and out**:
  the gradient comes from the caller's own tensor and the values go to another one. **tcp**: the same over sockets on
  the loopback.
- **Gloo**: `torch.distributed.all_reduce` between two ranks and torch's fused step in each. There is no server;
  nothing is pulled.
- **Ray**: an actor holds the parameters and runs torch's fused step; arrays travel through Ray's shared-memory store.
- **TensorFlow**: `ParameterServerStrategy`, one coordinator, one worker, one server. Adam stands in for AdamW, which
  TensorFlow has no fused kernel for: less work, in TensorFlow's favour.
"""


def main() -> None:
    options = arguments()
    rows: dict[str, Seconds] = {}
    versions: dict[str, str] = {}
    where = machine()
    for peer in options.only:
        prepare(peer)
    for turn in range(options.passes):
        first = turn % len(options.only)
        for peer in options.only[first:] + options.only[:first]:
            note(f"pass {turn + 1} of {options.passes}: {peer}")
            found = measure(peer, options)
            for row, works in found["rows"].items():
                versions[row] = found["version"]
                for work, seconds in works.items():
                    rows.setdefault(row, {}).setdefault(work, []).append(seconds)
    save(rows, versions, where)
    body = table_of(rows, versions)
    show(body)
    if set(options.only) == set(PEERS):
        PAGE.write_text(page(body, where, options.passes), encoding="utf-8")
        note(f"saved {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE.name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20, help="dense rounds in a pass")
    parser.add_argument("--small-rounds", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="the page is saved with all only")
    return parser.parse_args()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def interpreter(peer: str) -> str:
    """The Python of a peer's environment; Headwater's is this one."""
    return sys.executable if peer == "headwater" else str(HERE / f".venv-{peer}" / "bin" / "python")


def prepare(peer: str) -> None:
    """Make the peer's environment, unless it was made from the same requirements."""
    if peer == "headwater":
        return
    folder = HERE / f".venv-{peer}"
    wanted = (HERE / f"requirements-{peer}.txt").read_text(encoding="utf-8")
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    note(f"installing {peer} (once)")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [interpreter(peer), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, "-r", str(HERE / f"requirements-{peer}.txt")], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def measure(peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """One pass of one peer, in processes of its own; what it says beside its answer is shown only if it fails."""
    command = [interpreter(peer), str(HERE / f"peer_{peer}.py")]
    command += ["--rounds", str(options.rounds), "--small-rounds", str(options.small_rounds)]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{peer} ended with code {done.returncode}; nothing was saved")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table_of(rows: dict[str, Seconds], versions: dict[str, str]) -> list[tuple[str, ...]]:
    """One row per system, fastest first."""
    ours = [seconds for name, seconds in rows.items() if name.startswith("Headwater")]
    best = middle((ours or list(rows.values()))[0]["SGD"])
    ordered = sorted(rows.items(), key=lambda row: middle(row[1]["SGD"]))
    return [
        (
            name,
            versions[name],
            spread(seconds["SGD"], 1e3),
            spread(seconds["AdamW"], 1e3),
            spread(seconds["small"], 1e6),
            number(statistics.median(percentile(one, 0.99) for one in seconds["small"]) * 1e6),
            number(middle(seconds["SGD"]) / best),
        )
        for name, seconds in ordered
    ]


def middle(passes: list[list[float]]) -> float:
    return statistics.median(statistics.median(one) for one in passes)


def spread(passes: list[list[float]], scale: float) -> str:
    """The median pass, and the range of the passes' medians."""
    medians = [statistics.median(one) * scale for one in passes]
    return f"{number(statistics.median(medians))} ({number(min(medians))}-{number(max(medians))})"


def show(body: list[tuple[str, ...]]) -> None:
    table = Table(title="the same work, side by side")
    for column in HEAD:
        table.add_column(column, no_wrap=True)
    for row in body:
        table.add_row(*row)
    console = Console()
    console.print(table, width=max(console.width, 150))


def page(body: list[tuple[str, ...]], where: Machine, passes: int) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return PROSE.format(table="\n".join(lines) + "\n", machine=where, passes=passes)


def save(rows: dict[str, Seconds], versions: dict[str, str], where: Machine) -> None:
    folder = HERE / "runs"
    folder.mkdir(exist_ok=True)
    raw = {"machine": str(where), "versions": versions, "seconds": rows}
    (folder / "latest.json").write_text(json.dumps(raw), encoding="utf-8")


if __name__ == "__main__":
    main()
