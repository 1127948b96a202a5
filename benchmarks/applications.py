"""Train the applications and write docs/applications.md: ``python benchmarks/applications.py [NAME …]``.

Each recipe with its defaults, then the same steps in one plain process with 2 threads, then a few of them under
DistributedDataParallel over Gloo. What was measured of the others stays as it is in ``benchmarks/runs/``, which git
ignores; the page is made of all that is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from headwater_bench.report import machine
from headwater_recipes import listing
from headwater_recipes.common import metrics
from headwater_recipes.common.recipe import Recipe

HERE = Path(__file__).parent
RUNS, DOCS = HERE / "runs", HERE.parent / "docs"
DDP_STEPS = 60
WITHHELD = ("nearest.png", "mistakes.png")
HEAD = """# Applications

What `headwater train NAME` trains, judged on data that it has never seen. Written by `make recipes`: every figure is
measured. *Plain* is the same number of steps on the same batches in one process with two threads and no servers
(`python -m headwater_recipes.common.plain`); *DDP* is `DistributedDataParallel` over Gloo with as many workers.
"""


def main() -> None:
    """See the module."""
    known = {recipe.name: recipe for recipe in listing.found() if recipe.typed.startswith("headwater train ")}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*known, []], default=[*known])
    RUNS.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
            found = measured(known[name], Path(folder) / "run")
        (RUNS / f"recipe-{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    write_page(known)


def write_page(known: dict[str, Recipe[Any]]) -> None:
    """All that has been measured."""
    sections = [section(known[name], read(name)) for name in known if (RUNS / f"recipe-{name}.json").is_file()]
    (DOCS / "applications.md").write_text("\n".join([HEAD, *sections]), encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """What was measured last of a recipe."""
    found: dict[str, Any] = json.loads((RUNS / f"recipe-{name}.json").read_text(encoding="utf-8"))
    return found


def measured(recipe: Recipe[Any], run: Path) -> dict[str, Any]:
    """One run with the defaults, and what stands beside it."""
    where = machine()
    subprocess.run([sys.executable, "-m", "headwater", *recipe.typed.split()[1:], "--run", str(run)], check=True)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    unit = recipe.wording.unit
    rates = [row[f"{unit}_per_second"] for row in metrics.read_rows(run) if row["kind"] == "step"]
    for picture in shown(report):
        (DOCS / "pictures").mkdir(exist_ok=True)
        shutil.copy(run / picture, DOCS / "pictures" / f"{recipe.name}-{picture}")
    return {
        "machine": str(where), "report": report, "unit": unit, "rate": statistics.median(rates),
        "plain": plain(recipe, run), "ddp": plain(recipe, run, "--ddp", "--steps", str(DDP_STEPS)),
    }  # fmt: skip


def shown(report: dict[str, Any]) -> list[str]:
    """The pictures for the page: not those that show the data themselves, which the repository must not hold."""
    return [picture for picture in report.get("pictures", ()) if picture not in WITHHELD]


def plain(recipe: Recipe[Any], run: Path, *words: str) -> dict[str, Any] | None:
    """Without servers; ``None`` where there is no such run (the servers draw the model's first values)."""
    command = [sys.executable, "-m", "headwater_recipes.common.plain", recipe.task, str(run), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def section(recipe: Recipe[Any], found: dict[str, Any]) -> str:
    """A recipe's part of the page."""
    row, report, unit = listing.row(recipe), found["report"], found["unit"]
    beside = found["plain"] or {}
    lines = [
        f"## {row.task.capitalize()}: `{row.command}`", "",
        f"{row.data} ({row.licence}); {row.model}. {report['step']} steps in {report['training_seconds']:.0f} s.",
        f"Machine: {found['machine']}.", "",
        "| on held-out data | Headwater | plain |", "|---|---:|---:|",
    ]  # fmt: skip
    for name, value in report.items():
        short = name.removeprefix("validation_")
        told = name in ("step", "training_seconds") or name.startswith("largest_")
        if isinstance(value, int | float) and not told:
            alone = beside.get("metrics", {}).get(short)
            lines.append(f"| {short.replace('_', ' ')} | {_said(value)} | {_said(alone)} |")
    baselines = flat(report.get("baseline", {}))
    words = [f"{name.replace('_', ' ')} {_said(value)}" for name, value in baselines.items()]
    lines += ["", f"Baselines: {', '.join(words)}."]
    lines += ["", f"| {unit} a second | Headwater | plain, 2 threads | DDP over Gloo |", "|---|---:|---:|---:|"]
    rates = [found["rate"], beside.get("units_per_second"), (found["ddp"] or {}).get("units_per_second")]
    lines.append("| | " + " | ".join(_said(rate) for rate in rates) + " |")
    for picture in shown(report):
        lines += ["", f"![{picture.partition('.')[0]}](pictures/{recipe.name}-{picture})"]
    return "\n".join([*lines, ""])


def flat(figures: dict[str, Any], before: str = "") -> dict[str, float]:
    """The numbers; those of a baseline that has several are named by both."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name} ")
        elif isinstance(value, int | float):
            found[before + name] = value
    return found


def _said(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    main()
