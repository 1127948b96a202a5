"""Measure again and rewrite the tables of these pages: ``python benchmarks/fill.py [PAGE …]``; all without a name.

Each page has its table between ``<!-- figures -->`` and ``<!-- end -->``. The reports themselves are kept as JSON in
``benchmarks/runs/``, which git ignores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import msgspec

from headwater_bench.report import Report, to_markdown

HERE = Path(__file__).parent
BENCHES = (
    "dense",
    "small",
    "many",
    "step",
    "memory",
    "replicas",
    "snapshot",
    "publish",
    "relay",
    "recovery",
    "serve",
    "delta",
    "races",
)
START, END = "<!-- figures -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", nargs="*", choices=[*BENCHES, "peers", []], default=[*BENCHES, "peers"])
    for name in parser.parse_args().pages:
        if name == "peers":
            subprocess.run([sys.executable, str(HERE / "peers" / "run.py")], check=True)
        else:
            fill(name, measure(name))


def measure(bench: str) -> Report:
    """One run of a bench; its progress goes to the terminal."""
    command = [sys.executable, "-m", "headwater", "bench", bench, "--json"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    (HERE / "runs").mkdir(exist_ok=True)
    (HERE / "runs" / f"{bench}.json").write_bytes(printed)
    return msgspec.json.decode(printed, type=Report)


def fill(bench: str, report: Report) -> None:
    """Put the report's machine and table into the bench's page."""
    page = HERE / f"{bench}.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    section = f"{START}\nMachine: {report.machine}.\n\n{to_markdown(report.figures)}{END}"
    page.write_text(before + section + after, encoding="utf-8")


if __name__ == "__main__":
    main()
