"""Train the applications and write docs/applications.md: ``python benchmarks/applications.py [NAME …] [--only PART]``.

Three parts. ``run`` needs a machine that does nothing else: each recipe with its defaults, then the rates of the same
loop in one plain process with 2 threads, and under DistributedDataParallel over Gloo. ``plain`` is the whole run once
more in one process with one thread, two recipes at a time; ``seeds`` trains those whose held-out data are few with two
other seeds. What was measured of a recipe stays in ``benchmarks/applications/NAME.json``, and the page is made of all
that is there. The runs themselves are in ``benchmarks/runs/``, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from headwater_bench.report import machine
from headwater_recipes import listing
from headwater_recipes.common import metrics
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.data.catalog import CATALOG

HERE = Path(__file__).parent
RESULTS, RUNS, DOCS = HERE / "applications", HERE / "runs", HERE.parent / "docs"
RATE_STEPS = 60
FEW = ("detection", "faces", "linear-diabetes", "qa-spans", "speech")
"""What is judged on few things."""
SEEDS = (1, 2)
"""Beside the default, 0."""


class Judged(NamedTuple):
    """``figure`` by which a recipe is judged, and the ``baseline``'s beside it: their names in ``flat(report)``.
    ``recipe`` if it has another name, trained with ``data`` other than the default.
    """

    figure: str
    baseline: str
    recipe: str = ""
    data: str = ""


JUDGED = {
    "commands": Judged("accuracy", "baseline MFCC and nearest centroid accuracy"),
    "detection": Judged("validation map 50", "baseline green blobs map 50"),
    "faces": Judged("validation rank 1", "baseline pixels rank 1"),
    "finetune": Judged("held out loss", "held out loss before"),
    "image": Judged("validation accuracy", "baseline linear"),
    "linear": Judged("r2", "baseline closed form r2"),
    "linear-diabetes": Judged("r2", "baseline closed form r2", "linear", "diabetes"),
    "lm": Judged("validation bits per byte", "unigram bits per byte"),
    "qa": Judged("accuracy", "baseline tfidf logistic regression accuracy"),
    "qa-spans": Judged("f1", "baseline never an answer f1", "qa", "disflqa"),
    "sentiment": Judged("accuracy", "baseline tfidf logistic regression accuracy"),
    "sentiment-topics": Judged("accuracy", "baseline tfidf logistic regression accuracy", "sentiment", "newsgroups"),
    "speech": Judged("accuracy", "baseline MFCC statistics and logistic regression accuracy"),
    "translation": Judged("bleu", "baseline word by word bleu"),
}


class Application(NamedTuple):
    """A recipe as it is trained here; ``data`` if not with the default."""

    name: str
    recipe: Recipe[Any]
    data: str

    @property
    def typed(self) -> str:
        """The whole command."""
        return f"{self.recipe.typed} --data {self.data}" if self.data else self.recipe.typed


TOLD = ("step", "training seconds", "largest ", "beta ")
"""Figures that are told elsewhere, or are none of quality."""
WITHHELD = ("nearest.png", "mistakes.png", "translations.png", "boxes.png")
HEAD = """# Applications

What `headwater train NAME` trains by 2 workers through 2 servers, judged on data that it has never seen. Written by
`make recipes`: every figure is measured.

*Plain* is the same number of steps on the same batches in one process with one thread and no servers
(`python -m headwater_recipes.common.plain`). Its parameters are compared with the run's: *same* says that no bit of any
of them differs. Minutes are those of the whole command, preparation and evaluation included. Rates are those of
training: of the run, of the same loop in one plain process with two threads, and of `DistributedDataParallel` over Gloo
with two workers. *±* is the standard deviation over three seeds, where what is held out is small.
"""


def main() -> None:
    """See the module."""
    known = applications()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--only", choices=["run", "plain", "seeds", "page"], help="default: all, one after another")
    asked = parser.parse_args()
    if strange := [name for name in asked.names if name not in known]:
        parser.error(f"{', '.join(strange)}: there is {', '.join(known)}")
    chosen = [known[name] for name in asked.names or known]
    for place in (RESULTS, RUNS):
        place.mkdir(exist_ok=True)
    if asked.only in (None, "run"):
        for each in chosen:
            keep(each, run(each))
    if asked.only in (None, "plain"):
        with ThreadPoolExecutor(2) as both:
            for each, found in zip(chosen, both.map(plain, chosen), strict=True):
                keep(each, {"plain": found})
    if asked.only in (None, "seeds"):
        for each in chosen:
            if each.name in FEW:
                keep(each, {"seeds": [report_of(each, trained(each, seed)) for seed in SEEDS]})
    write_page(known)


def applications() -> dict[str, Application]:
    """All of them, by name."""
    recipes = {recipe.name: recipe for recipe in listing.found()}
    return {name: Application(name, recipes[each.recipe or name], each.data) for name, each in JUDGED.items()}


# ---- measuring -------------------------------------------------------------------------------------


def folder(each: Application, seed: int = 0) -> Path:
    """The run's."""
    return RUNS / (f"{each.name}-{seed}" if seed else each.name)


def kept(each: Application) -> dict[str, Any]:
    """What was measured last; nothing of what was never measured."""
    path = RESULTS / f"{each.name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def keep(each: Application, found: dict[str, Any]) -> None:
    """Beside what other parts have found."""
    text = json.dumps({**kept(each), **found}, indent=1)
    (RESULTS / f"{each.name}.json").write_text(text + "\n", encoding="utf-8")


def trained(each: Application, seed: int = 0) -> Path:
    """The folder of a run with the defaults, and nothing of one that was there."""
    place = folder(each, seed)
    shutil.rmtree(place, ignore_errors=True)
    words = [*each.typed.split()[1:], "--run", str(place), "--seed", str(seed)]
    subprocess.run([sys.executable, "-m", "headwater", *words], check=True)
    return place


def report_of(each: Application, place: Path) -> dict[str, Any]:
    """``report.json``; a run of another seed is not needed any more."""
    found: dict[str, Any] = json.loads((place / "report.json").read_text(encoding="utf-8"))
    if place != folder(each):
        shutil.rmtree(place)
    return found


def run(each: Application) -> dict[str, Any]:
    """The defaults, and the rates beside them. What other parts have found belongs to the run before."""
    (RESULTS / f"{each.name}.json").unlink(missing_ok=True)
    where, begun = machine(), time.monotonic()
    place = trained(each)
    minutes = (time.monotonic() - begun) / 60
    report, unit = report_of(each, place), each.recipe.wording.unit
    for picture in shown(report):
        (DOCS / "pictures").mkdir(exist_ok=True)
        shutil.copy(place / picture, DOCS / "pictures" / f"{each.name}-{picture}")
    rates = [row[f"{unit}_per_second"] for row in metrics.read_rows(place) if row["kind"] == "step"]
    quick = ("--rate", "--steps", str(RATE_STEPS))
    others = [without_servers(each, *quick, *more) for more in (("--threads", "2"), ("--ddp",))]
    return {
        "machine": str(where), "minutes": minutes, "report": report, "unit": unit,
        "rates": [statistics.median(rates), *(found and found["units_per_second"] for found in others)],
    }  # fmt: skip


def plain(each: Application) -> dict[str, Any] | None:
    """The whole run in one process with one thread, as a worker has: the same sums in the same order."""
    return without_servers(each, "--threads", "1")


def without_servers(each: Application, *words: str) -> dict[str, Any] | None:
    """``None`` where there is no such run, say of a loop that DistributedDataParallel cannot wrap."""
    command = [sys.executable, "-m", "headwater_recipes.common.plain", each.recipe.task, str(folder(each)), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- the page --------------------------------------------------------------------------------------


def write_page(known: dict[str, Application]) -> None:
    """All that has been measured."""
    measured = [each for each in known.values() if "rates" in kept(each)]
    parts = [HEAD, *table(measured), "", *[section(each, kept(each)) for each in measured]]
    (DOCS / "applications.md").write_text("\n".join(parts), encoding="utf-8")


def shown(report: dict[str, Any]) -> list[str]:
    """The pictures for the page: not those that show the data themselves, which the repository must not hold."""
    return [picture for picture in report.get("pictures", ()) if picture not in WITHHELD]


def table(measured: list[Application]) -> list[str]:
    """All of them at a glance."""
    head = ("command", "judged by", "Headwater", "plain", "baseline", "minutes", "a second", "plain", "DDP")
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---|---|---:|---:|---:|---:|"]
    for each in measured:
        found = kept(each)
        name, beside, *_ = JUDGED[each.name]
        baseline = f"{beside.removeprefix('baseline ')} {said(flat(found['report']).get(beside))}"
        rate, *others = map(said, found["rates"])
        cells = [
            f"`{each.typed}`", words(name), spread(found, name), alone(found, name), baseline,
            f"{found['minutes']:.1f}", f"{rate} {found['unit']}", *others,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(each: Application, found: dict[str, Any]) -> str:
    """An application's part of the page."""
    row, report = listing.row(each.recipe), found["report"]
    data, licence = (each.data, CATALOG[each.data].licence) if each.data else (row.data, row.licence)
    lines = [
        f"## {row.task.capitalize()}: `{each.typed}`", "",
        f"{data} ({licence}); {row.model}.",
        f"{report['step']:,} steps in {report['training_seconds']:.0f} s, {found['minutes']:.1f} minutes in all.",
        f"Machine: {found['machine']}.", "",
        "| on held-out data | Headwater | plain |", "|---|---:|---:|",
    ]  # fmt: skip
    figures = {name: value for name, value in flat(report).items() if not name.startswith(TOLD)}
    ours = [name for name in figures if "baseline " not in name]
    lines += [f"| {words(name)} | {spread(found, name)} | {alone(found, name)} |" for name in ours]
    beside = [f"{name.replace('baseline ', '')} {said(figures[name])}" for name in figures if name not in ours]
    lines += ["", f"Baselines: {', '.join(beside)}."] if beside else []
    for picture in shown(report):
        lines += ["", f"![{picture.partition('.')[0]}](pictures/{each.name}-{picture})"]
    return "\n".join([*lines, ""])


def spread(found: dict[str, Any], name: str) -> str:
    """A figure of the run; with more seeds than one the mean, and how far they lie apart. Another seed may hold out
    others, and lack a figure.
    """
    reports = [flat(report) for report in (found["report"], *found.get("seeds", ()))]
    values = [report[name] for report in reports if name in report]
    if len(values) == 1 or len(set(values)) == 1:
        return said(values[0])
    return f"{said(statistics.mean(values))} ± {statistics.stdev(values):.2g}"


def alone(found: dict[str, Any], name: str) -> str:
    """A figure of the plain run."""
    beside = found.get("plain")
    if beside is None:
        return "–"
    value = flat(beside["figures"]).get(name)
    same = beside["largest_difference"] == 0 and value == flat(found["report"])[name]
    return "same" if same else said(value)


def flat(figures: dict[str, Any], before: str = "") -> dict[str, float]:
    """The numbers by their names, as people write them; those of a part are named by it too."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            found |= flat(value, f"{name} ")
        elif isinstance(value, int | float):
            found[name] = value
    return found


def words(name: str) -> str:
    """Of held-out data they all are."""
    return name.removeprefix("validation ")


def said(value: float | None) -> str:
    """Three digits, or a whole number."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


if __name__ == "__main__":
    main()
