"""A worker of a chaos run: pushes whole numbers, and writes into its ledger what it knows. Told to stop by SIGTERM.

``python -m headwater_bench.chaos.pusher --rank N --mode MODE --ledger FILE``; with rank -1 it is a reader.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import headwater
from headwater.client import Client, DenseTable, Ticket
from headwater.errors import HeadwaterError, RankTaken
from headwater_bench.chaos.ledger import WIDTHS, LedgerWriter, Tail, in_bounds
from headwater_bench.chaos.workload import POLICIES, Workload, digest, gradient

EVERY = 16  # steps between two pushes of the ballast, and between two looks at the sums


class Sent(NamedTuple):
    """A push that is under way."""

    name: str
    number: int
    table: DenseTable
    ticket: Ticket


class Pusher:
    """One process's work: steps until it is told to stop."""

    def __init__(self, client: Client, rank: int, workload: Workload, path: Path, pace: float) -> None:
        self.client, self.rank, self.mode, self.pace = client, rank, workload.mode, pace
        self.stopping = False
        self._tail = Tail(path, rank)
        self._tail.read()
        self._ledger = self._tail.ledger
        self._writer = LedgerWriter(path)
        self._writer.write("B", text=f"session {client.session:016x}")
        self._main = client.table(workload.ledger_table())
        self._other = client.table(workload.large_table())
        self._pages = [f"page{i}" for i in range(len(WIDTHS))]
        self._others = [p.name for p in self._other.spec.parameters]

    def run(self) -> None:
        """Push until SIGTERM. What raises here ends the process; the ledger says so."""
        for table in (self._main, self._other):
            for gradient_ in table.gradients.values():
                gradient_.zero_()
        number = self._ledger.last("ledger")
        while not self.stopping:
            number += 1
            # Both leave before either is waited for: under Bulk a worker that waits must have contributed to every
            # table's step, or two that wait for different tables would wait for one another.
            sent = [self._send("ledger", number, self._main, self._mark)]
            if self.mode == "bulk":
                sent.append(self._send("model", number, self._other, self._learn))
            elif number % EVERY == 0:
                sent.append(self._send("ballast", number, self._other, self._load))
            for each in sent:
                self._settle(each)
            self._tail.read()
            if number % EVERY == 0:
                self._look()
            time.sleep(self.pace)
        self._writer.write("E")
        self._writer.close()

    def _send(self, name: str, number: int, table: DenseTable, fill: Callable[[int], None]) -> Sent:
        fill(number)
        self._writer.write("P", name, number)
        names = self._pages if table is self._main else self._others
        try:
            return Sent(name, number, table, table.push_step(names, want=name == "model"))
        except HeadwaterError as error:
            self._fail(name, number, error)
            raise

    def _settle(self, sent: Sent) -> None:
        try:
            result = sent.ticket.wait()
        except HeadwaterError as error:
            self._fail(sent.name, sent.number, error)
            raise
        self._writer.write("A", sent.name, sent.number, result.clock)
        if sent.name == "model":
            sent.table.wait()
            values = [sent.table.values[name] for name in self._others]
            self._writer.write("H", sent.name, sent.number, result.clock, digest(values))

    def _fail(self, name: str, number: int, error: HeadwaterError) -> None:
        self._writer.write("X", name, number, text=f"{error.code}: {error}".replace("\n", " "))

    def _mark(self, number: int) -> None:
        """One element of the own row in every page; the one before is cleared."""
        for name, width in zip(self._pages, WIDTHS, strict=True):
            row = self._main.gradients[name][self.rank]
            row.zero_()
            row[number % width] = -1.0

    def _learn(self, number: int) -> None:
        for name, row in zip(self._others, gradient(self.rank, number), strict=True):
            self._other.gradients[name].copy_(row)

    def _load(self, number: int) -> None:
        del number
        for name in self._others:
            self._other.gradients[name].fill_(-1.0)

    def _look(self) -> None:
        """Read your own writes."""
        self._main.pull().wait()
        self._main.wait()
        for name in self._pages:
            wrong = in_bounds(self._ledger, self._main.values[name][self.rank])
            if wrong:
                self._writer.write("V", text=f"{name}: {wrong}")


class ChaosReader:
    """Pulls for ever; what it sees never goes back."""

    def __init__(self, client: Client, workload: Workload, path: Path, pace: float) -> None:
        self.stopping = False
        self.pace = pace
        self._writer = LedgerWriter(path)
        self._writer.write("B", text=f"session {client.session:016x}")
        self._table = client.table(workload.ledger_table())
        self._seen = {name: value.clone().zero_() for name, value in self._table.values.items()}

    def run(self) -> None:
        number = 0
        while not self.stopping:
            number += 1
            self._table.pull().wait()
            self._table.wait()
            for name, before in self._seen.items():
                now = self._table.values[name]
                if bool((now < before).any()):
                    self._writer.write("V", text=f"{name}: a later pull shows less than an earlier one")
                before.copy_(now)
            self._writer.write("R", "ledger", number)
            time.sleep(self.pace)
        self._writer.write("E")


def _connect(rank: int, patience: float) -> Client:
    """As soon as the coordinator has noticed that the process before this one is gone."""
    until = time.monotonic() + patience
    while True:
        try:
            if rank < 0:
                return headwater.connect(role="reader")
            return headwater.connect(rank=rank)
        except (RankTaken, ConnectionError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def main(argv: list[str]) -> int:
    """Exit code 3 if Headwater raised: its ledger says what."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--mode", choices=tuple(POLICIES), required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--pace", type=float, default=0.002)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    writer = LedgerWriter(args.ledger)
    try:
        with _connect(args.rank, 20.0) as client:
            worker: Pusher | ChaosReader
            workload = Workload(args.mode, args.ranks)
            if args.rank < 0:
                worker = ChaosReader(client, workload, args.ledger, 10 * args.pace)
            else:
                worker = Pusher(client, args.rank, workload, args.ledger, args.pace)
            signal.signal(signal.SIGTERM, lambda *_: setattr(worker, "stopping", True))
            worker.stopping = bool(told)
            worker.run()
    except HeadwaterError as error:
        writer.write("E", text=f"{error.code}: {error}".replace("\n", " "))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
