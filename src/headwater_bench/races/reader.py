"""A reader of the race: lease, check every element of every tensor, release. Told to stop by SIGTERM.

``python -m headwater_bench.races.reader --counters FILE --seed N [--steady] [--model NAME]``
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

import headwater
from headwater.errors import HeadwaterError, LinkError, UnknownVersion
from headwater.readers import Reader, Weights
from headwater_bench.races import values
from headwater_bench.races.counters import Counters
from headwater_bench.races.publisher import TAG
from headwater_bench.races.work import work_until_told

PATIENCE = 10.0  # seconds that a lease may take
HELD = 3  # versions that a reader keeps beside the newest
KEEP = 0.02  # the share of reads whose version is kept for a while
RECHECK = 0.05  # the share of reads after which one that is kept is looked at again
LONGEST = 5.0  # seconds
RETRY = 0.02  # seconds of rest after an error


@dataclass(slots=True, eq=False)
class HeldVersion:
    """A version that is looked at again. ``weights``: None when its lease has ended and only tensors are left."""

    step: int
    tensors: dict[str, torch.Tensor]
    weights: Weights | None
    until: float


class RaceReader:
    """One process's work."""

    def __init__(self, reader: Reader, counters: Counters, seed: int, *, steady: bool) -> None:
        self.stopping = False
        self._steady = steady
        self._newest: Weights | None = None  # a steady reader's: held until there is a newer one
        self._reader, self._counters = reader, counters
        self._random = Random(seed)
        self._kept: list[HeldVersion] = []
        self._last = 0  # number of the version that was read last

    def run(self) -> None:
        """Until SIGTERM."""
        while not self.stopping:
            try:
                self._read()
            except HeadwaterError as error:
                self._counters.failed(error.code, str(error))
                time.sleep(RETRY)
                if isinstance(error, LinkError) and not self._reader.statistics().connected:
                    raise
            if self._kept and self._random.random() < RECHECK:
                self._look_again(self._random.choice(self._kept))
        for kept in list(self._kept):
            self._look_again(kept)

    def _read(self) -> None:
        weights = self._reader.lease(self._name(), PATIENCE)
        keep = len(self._kept) < HELD and self._random.random() < KEEP
        try:
            step = self._step(weights)
            tensors = dict(weights)
            self._count(weights, values.check(tensors, step, self._reader.model))
            if keep:
                self._keep(weights, step, tensors)
            elif self._steady and (self._newest is None or self._newest.version.number < weights.version.number):
                weights, self._newest = self._newest or weights, weights
        finally:
            if not keep and weights is not self._newest:
                weights.release()

    def _name(self) -> str:
        which = self._random.random()
        if which < 0.9:
            return "latest"
        if which < 0.95 and self._reader.model == values.MODEL:
            return TAG
        known = self._reader.versions()
        names = [each.info.name for each in known if each.state == "ready"]
        if not names:
            raise UnknownVersion("nothing is ready yet")
        return self._random.choice(names)

    def _step(self, weights: Weights) -> int:
        """What the label says, in all of its places: they must agree."""
        info = weights.version
        said = {str(info.step), info.metadata["step"], info.name.removeprefix("step-")}
        if len(said) > 1:
            self._wrong("mislabelled", f"the label of version {info.number} names steps {sorted(said)}")
        return int(info.metadata["step"])

    def _count(self, weights: Weights, found: values.ReadCheck) -> None:
        self._counters.add("reads")
        if weights.version.number != self._last:
            self._last = weights.version.number
            self._counters.add("fetched")
            counts = self._reader.statistics().parts
            for name, value in zip(("shared", "whole", "deltas", "damaged"), counts, strict=True):
                self._counters.put(name, value)
        if found.verdict != "whole":
            self._wrong(found.verdict, f"version {weights.version.number}: {found.words}")

    def _wrong(self, what: str, words: str) -> None:
        self._counters.add(what)
        self._counters.say(f"{what}: {words}")

    # ---- versions that are kept ------------------------------------------------------------------

    def _keep(self, weights: Weights, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Under its lease, or its tensors alone: they promise to stay as they are without one."""
        until = time.monotonic() + self._random.random() * LONGEST
        held: Weights | None = weights
        if self._random.random() < 0.5:
            weights.release()
            held = None
        self._kept.append(HeldVersion(step, tensors, held, until))

    def _look_again(self, kept: HeldVersion) -> None:
        self._counters.add("rechecks")
        if kept.weights is None:
            self._counters.add("afterwards")
        found = values.check(kept.tensors, kept.step, self._reader.model)
        if found.verdict != "whole":
            lease = "ended" if kept.weights is None else "open"
            self._wrong("changed", f"a version that was kept, lease {lease}: {found.words}")
        if time.monotonic() > kept.until or self.stopping:
            self._kept.remove(kept)
            if kept.weights is not None:
                kept.weights.release()


def _connect(model: str) -> Reader:
    """As soon as somebody answers: the relay may just be beginning."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return headwater.reader(model, timeout=3 * PATIENCE)
        except LinkError:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY)


def main(argv: list[str]) -> int:
    """Exit code 3 if the cluster could not be reached any more: another process goes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counters", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("--model", choices=tuple(values.MODELS), default=values.MODEL)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.nice(5)  # there are more readers than cores: what they race against must get its turn
    return work_until_told(
        args.counters,
        lambda: _connect(args.model),
        lambda reader, counters: RaceReader(reader, counters, args.seed, steady=args.steady),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
