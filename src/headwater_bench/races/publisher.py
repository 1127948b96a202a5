"""The trainer of the race: steps and publishes without a rest, and moves a tag. Told to stop by SIGTERM.

``python -m headwater_bench.races.publisher --counters FILE --pace SECONDS``
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from random import Random

import torch

import headwater
from headwater.client import Client, DenseTable, Publication
from headwater.errors import HeadwaterError, RankTaken, VersionExists
from headwater.wire.versions import SetTag
from headwater_bench.races import values
from headwater_bench.races.counters import Counters
from headwater_bench.races.work import work_until_told

EVERY = 2  # steps between two publications
LARGE = 10  # steps between two of the large table
ON_THE_WAY = 3  # publications that are not waited for
TAG = "stable"
PATIENCE = 20.0  # seconds until the rank of the process before this one is free


class RacePublisher:
    """One process's work. ``pace``: seconds of rest after each step."""

    def __init__(self, client: Client, counters: Counters, pace: float) -> None:
        self.stopping = False
        self._client, self._counters, self._pace = client, counters, pace
        self._tables = [client.table(spec) for spec in values.specs(values.MODEL)]
        (self._large,) = [client.table(spec) for spec in values.specs(values.LARGE)]
        for name, gradient in self._large.gradients.items():  # the same at every step
            gradient.copy_(values.gradient(name, gradient.numel(), 1))
        self._under_way: deque[tuple[str, str, Publication]] = deque()
        self._ready: deque[str] = deque(maxlen=4)
        self._random = Random()

    def run(self) -> None:
        """Until SIGTERM. What raises here ends the process; another one goes on."""
        while not self.stopping:
            step = max(table.clock for table in self._tables)
            behind = [table for table in self._tables if table.clock < step]
            if behind:  # the one before this process died between the two
                self._step(behind)
                continue
            self._step(self._tables)
            if (step + 1) % EVERY == 0:
                self._publish(values.MODEL, self._tables, step + 1)
            if step % LARGE == 0:  # the next step leaves while the servers still copy this one
                self._publish(values.LARGE, [self._large], self._large.clock)
                self._large.push_step(list(self._large.gradients), want=False).wait()
            self._counters.add("steps")
            time.sleep(self._pace)

    def _step(self, tables: list[DenseTable]) -> None:
        """Both leave before either is waited for; what was published just now is still being copied."""
        tickets = []
        for table in tables:
            for name, gradient in table.gradients.items():
                gradient.copy_(values.gradient(name, gradient.numel(), table.clock + 1))
            tickets.append(table.push_step(list(table.gradients), want=False))
        for ticket in tickets:
            ticket.wait()

    def _publish(self, model: str, tables: list[DenseTable], step: int) -> None:
        name = f"step-{step}"
        keep = self._random.choice((2, 3, 5))
        try:
            begun = self._client.publish(tables, name, model=model, metadata={"step": str(step)}, keep=keep)
            self._under_way.append((model, name, begun))
        except VersionExists:  # by the process before this one
            return
        except HeadwaterError as error:
            self._counters.failed(error.code, str(error))
            return
        while len(self._under_way) > ON_THE_WAY:
            self._finish(*self._under_way.popleft())

    def _finish(self, model: str, name: str, publication: Publication) -> None:
        try:
            publication.wait()
            self._counters.add("published")
            if model == values.MODEL:
                self._ready.append(name)
            if self._ready and self._random.random() < 0.1:
                self._client.ask(SetTag(values.MODEL, TAG, self._random.choice(self._ready)))
        except HeadwaterError as error:
            self._counters.failed(error.code, str(error))


def _connect() -> Client:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return headwater.connect(rank=0)
        except (RankTaken, ConnectionError):
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def main(argv: list[str]) -> int:
    """Exit code 3 if Headwater raised: the counters say what."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counters", type=Path, required=True)
    parser.add_argument("--pace", type=float, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    return work_until_told(args.counters, _connect, lambda client, counters: RacePublisher(client, counters, args.pace))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
