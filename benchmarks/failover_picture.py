"""Kill a server in the middle of a training run and draw what happened: ``python benchmarks/failover_picture.py``.

It runs ``headwater train lm --servers 3 --replicas 2 --minutes 1``, sends SIGKILL to a server that is the primary of a
shard, and writes ``docs/failover.png``. The times are measured from outside: a step when its row appears in
``metrics.jsonl``, the views by asking the coordinator every 20 ms, the new process by ``events.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import headwater
from headwater.launch import registry
from headwater.wire.messages import ClusterStatus

PICTURE = Path(__file__).parents[1] / "docs" / "failover.png"
KEPT = Path(__file__).with_name("runs") / "failover.json"
LOOK = 0.02  # seconds between two looks
INK, LINE, KILL, TAKEN, WHOLE = "#222222", "#2b6cb0", "#c53030", "#b7791f", "#2f855a"


@dataclass
class Course:
    """Moments are ``time.time()``."""

    steps: list[tuple[float, float, float]] = field(default_factory=list)  # when, loss, tokens a second
    killed: float = 0.0
    taken: float = 0.0  # every shard has a primary that lives
    joined: float = 0.0  # the process that takes the dead one's place
    whole: float = 0.0  # all copies are there
    server: int = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--preset", default="9m")
    parser.add_argument("--again", action="store_true", help="Draw the last run again.")
    given = parser.parse_args()
    if given.again:
        course = msgspec.json.decode(KEPT.read_bytes(), type=Course)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            course = watch(Path(scratch) / "run", given.minutes, given.preset)
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_bytes(msgspec.json.encode(course))
    draw(course)
    for line in words(course):
        print(line)


def watch(run: Path, minutes: float, preset: str) -> Course:
    """Train, kill, and note what is seen."""
    options = ["--servers", "3", "--replicas", "2", "--minutes", f"{minutes:g}", "--preset", preset, "--run", str(run)]
    quiet = ["--log-every", "1", "--validate-every", "1000000", "--save-every", "1000000"]
    command = [sys.executable, "-m", "headwater", "train", "lm", *options, *quiet]
    course = Course()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as train, cluster(train.pid) as reader:
        try:
            _follow(course, run, reader, train, 60 * minutes)
        finally:
            train.terminate()
    if not course.whole:
        raise SystemExit("the run ended before all copies were there again")
    return course


@contextlib.contextmanager
def cluster(pid: int) -> Iterator[headwater.Client]:
    """A reader of the cluster that this launcher has started."""
    while not (found := [record for record in registry.running() if record.pid == pid]):
        time.sleep(LOOK)
    os.environ["HEADWATER_TOKEN"] = found[0].token
    with headwater.connect(found[0].address, role="reader", timeout=10.0) as reader:
        yield reader


def _follow(
    course: Course, run: Path, reader: headwater.Client, train: subprocess.Popen[bytes], seconds: float
) -> None:
    metrics = Tail(run / "metrics.jsonl")
    while train.poll() is None:
        now = time.time()
        course.steps += [
            (now, row["loss"], row["tokens_per_second"]) for row in metrics.rows() if row["kind"] == "step"
        ]
        with contextlib.suppress(headwater.HeadwaterError):
            _look(course, reader.status(), seconds)
        time.sleep(LOOK)
    events = Tail(run / "events.jsonl").rows()
    course.joined = next((e["time"] for e in events if "taken the place" in e["event"] or "is back" in e["event"]), 0.0)


def _look(course: Course, status: ClusterStatus, seconds: float) -> None:
    now = time.time()
    if not course.killed:
        if course.steps and now - course.steps[0][0] > seconds / 2 and _redundant(status):
            course.server = status.shards[0].primary
            pid = next(server.pid for server in status.servers if server.server == course.server)
            course.killed = time.time()
            os.kill(pid, signal.SIGKILL)
        return
    serves = all(shard.primary not in (-1, course.server) for shard in status.shards)
    if not course.taken and serves:
        course.taken = now
    if course.taken and not course.whole and _redundant(status):
        course.whole = now


def _redundant(status: ClusterStatus) -> bool:
    return all(shard.copies >= shard.wanted for shard in status.shards)


class Tail:
    """A file of JSON lines that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        data = self._path.read_bytes()[self._offset :]
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines()]


# ---- what is shown -----------------------------------------------------------------------------------


def marks(course: Course) -> list[tuple[float, str, str]]:
    """Seconds after the kill, colour, words."""
    after = next((when for when, _, _ in course.steps if when > course.taken), course.taken)
    found = [
        (course.killed, KILL, f"s{course.server} gets SIGKILL"),
        (course.taken, TAKEN, "its backups are primaries"),
        (after, LINE, "the next step ends"),
        (course.joined, INK, "a new process has joined"),
        (course.whole, WHOLE, "all copies back"),
    ]
    return sorted((when - course.killed, colour, text) for when, colour, text in found if when)


def words(course: Course) -> list[str]:
    steps = list(itertools.pairwise(when for when, _, _ in course.steps))
    usual = statistics.median(b - a for a, b in steps)
    longest = max(b - a for a, b in steps if b > course.killed and a < course.whole)
    return [
        *(f"{seconds:6.2f} s  {text}" for seconds, _, text in marks(course)),
        f"{len(course.steps)} steps of {usual:.2f} s; the longest until all copies were back {longest:.2f} s",
    ]


def draw(course: Course) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    figure, (whole, near) = plt.subplots(
        2, 1, figsize=(8.4, 5.6), height_ratios=(1.0, 1.15), constrained_layout=True
    )  # fmt: skip
    begun = course.steps[0][0]
    whole.plot([when - begun for when, _, _ in course.steps], [loss for _, loss, _ in course.steps], color=LINE, lw=1.3)
    whole.axvline(course.killed - begun, color=KILL, lw=1.2)
    whole.axvspan(course.killed - begun, course.whole - begun, color=WHOLE, alpha=0.12, lw=0)
    whole.set(xlabel="seconds of training", ylabel="loss, nats per token", xlim=(0, None))
    height = max(loss for _, loss, _ in course.steps)
    after = f"a server gets SIGKILL; all copies are back after {course.whole - course.killed:.1f} s (green)"
    whole.annotate(
        after, (course.killed - begun, height), (4, 0), color=KILL, textcoords="offset points", va="top", fontsize=8.5
    )
    whole.set_title("One of three servers is killed in the middle of a training run", loc="left", fontsize=11)
    _zoom(near, course)
    figure.savefig(PICTURE, dpi=130)


def _zoom(axes: Axes, course: Course) -> None:
    """Tokens a second, step by step, around the kill."""
    found = marks(course)
    lo, hi = -3.0, found[-1][0] + 4.0  # room for the last one's words
    seen = [(a[0] - course.killed, b[0] - course.killed, b[2]) for a, b in itertools.pairwise(course.steps)]
    seen = [each for each in seen if each[1] > lo and each[0] < hi]
    for start, end, rate in seen:
        axes.bar(start, rate, width=end - start, align="edge", color=LINE, alpha=0.35, edgecolor="white", lw=0.8)
    top = max(rate for _, _, rate in seen)
    for place, (seconds, colour, text) in enumerate(found):
        height = top * (1.12 + 0.13 * (len(found) - 1 - place))
        axes.plot([seconds, seconds], [0, height], color=colour, lw=1.2)
        axes.annotate(f"{text}, {seconds:.2f} s" if seconds else text, (seconds, height), (4, 0), color=colour,
                      textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    axes.set(xlim=(lo, hi), ylim=(0, top * (1.18 + 0.13 * (len(found) - 1))))
    axes.set(xlabel="seconds after the kill; one bar is one step", ylabel="tokens per second")


if __name__ == "__main__":
    main()
