"""What workers say they pushed and what was acknowledged, and whether the sums agree.

A worker writes a line before a push leaves and another when its acknowledgement is there. A line is one ``write``,
so it is there even if the worker is killed right after. Push ``k`` of a worker adds 1 to one element of its own row in
every page of the table, element ``k mod width``. Each page has its own prime width: a lost and a doubled push could
hide one another only if they were a product of widths apart. Pages lie on different shards, so every shard is counted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

WIDTHS = (167, 163, 157, 151, 149, 139)
"""Elements per worker in each page; three rows of doubles fill one page of memory, two pages one shard."""

REFUSED = frozenset({"WorkerLost", "StaleEpoch", "NonFiniteGradient", "ShapeMismatch", "UsageError"})
"""Errors that promise that nothing was applied."""


class LedgerWriter:
    """A worker's ledger. ``kind`` of a line: P pushed, A acknowledged, X an error, H a hash, V a broken promise,
    B begun, E ended."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, kind: str, table: str = "-", number: int = 0, clock: int = 0, text: str = "") -> None:
        line = f"{kind} {table} {number} {clock} {time.monotonic():.6f} {text}".rstrip() + "\n"
        os.write(self._fd, line.encode())

    def close(self) -> None:
        os.close(self._fd)


@dataclass(slots=True)
class PushEntry:
    """One push: when it left, and when and as which step it was acknowledged."""

    sent: float
    acked: float | None = None
    clock: int = 0
    refused: bool = False


@dataclass(slots=True)
class Ledger:
    """All that the processes of one rank have written."""

    rank: int
    pushes: dict[str, dict[int, PushEntry]] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    begun: int = 0
    ended: bool = False

    def of(self, table: str) -> dict[int, PushEntry]:
        return self.pushes.setdefault(table, {})

    def last(self, table: str) -> int:
        """The number of the last push; 0 before the first."""
        return max(self.of(table), default=0)

    def acknowledged(self, table: str) -> list[int]:
        return [k for k, push in self.of(table).items() if push.acked is not None]

    def unknown(self, table: str) -> list[int]:
        return [k for k, push in self.of(table).items() if push.acked is None and not push.refused]

    def take(self, line: str) -> None:
        """One line of the file."""
        kind, table, number, clock, when, *rest = line.split(" ", 5)
        k, at, text = int(number), float(when), rest[0] if rest else ""
        match kind:
            case "P":
                self.of(table)[k] = PushEntry(at)
            case "A":
                push = self.of(table)[k]
                push.acked, push.clock = at, int(clock)
            case "X":
                self.of(table)[k].refused = text.split(":")[0] in REFUSED
                self.errors.append((at, text))
            case "H":
                if self.hashes.setdefault(int(clock), text) != text:
                    self.violations.append(f"rank {self.rank} saw two states of step {clock}")
            case "V":
                self.violations.append(f"rank {self.rank}: {text}")
            case "B":
                self.begun += 1
            case "E":
                self.ended = True
                if text:
                    self.errors.append((at, text))


class Tail:
    """Reads a ledger while it grows."""

    def __init__(self, path: Path, rank: int) -> None:
        self.ledger = Ledger(rank)
        self._path = path
        self._offset = 0

    def read(self) -> list[str]:
        """Take the lines that are new; returns them."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.decode().splitlines()
        for line in lines:
            self.ledger.take(line)
        return lines


@dataclass(frozen=True, slots=True)
class Verdict:
    """Pushes per shard that were acknowledged and are missing, or are there more often than they were sent."""

    lost: int
    doubled: int
    words: tuple[str, ...]


def cells(numbers: Iterable[int], width: int) -> torch.Tensor:
    """How often each element of a row was increased by these pushes."""
    found = Counter(k % width for k in numbers)
    return torch.tensor([float(found[i]) for i in range(width)], dtype=torch.float64)


def judge(
    ledgers: Iterable[Ledger], pages: Mapping[int, torch.Tensor], shard_of: Mapping[int, int], table: str = "ledger"
) -> Verdict:
    """Compare the final values of the pages (rows × width each) with the ledgers. ``shard_of`` says where each lies."""
    missing: Counter[tuple[int, int]] = Counter()  # (rank, shard) -> pushes
    surplus: Counter[tuple[int, int]] = Counter()
    words = []
    for ledger in ledgers:
        sure, maybe = ledger.acknowledged(table), ledger.unknown(table)
        for page, values in pages.items():
            low = cells(sure, values.shape[1])
            high = low + cells(maybe, values.shape[1])
            row = values[ledger.rank]
            short, over = float((low - row).clamp(min=0).sum()), float((row - high).clamp(min=0).sum())
            key = (ledger.rank, shard_of[page])
            missing[key], surplus[key] = max(missing[key], round(short)), max(surplus[key], round(over))
            if short or over:
                where = [i for i in range(len(row)) if row[i] < low[i] or row[i] > high[i]]
                words.append(
                    f"rank {ledger.rank}, page {page} on shard {shard_of[page]}: {short:.0f} missing, {over:.0f} too "
                    f"many, at elements {where[:8]} of {len(row)}; {len(sure)} acknowledged, unknown {maybe[:8]}"
                )
    return Verdict(sum(missing.values()), sum(surplus.values()), tuple(words))


def in_bounds(ledger: Ledger, row: torch.Tensor, table: str = "ledger") -> str:
    """For a worker: does a pull contain all that was acknowledged to it? Returns what is wrong, or nothing."""
    total, sure = float(row.sum()), len(ledger.acknowledged(table))
    most = sure + len(ledger.unknown(table))
    return "" if sure <= total <= most else f"a pull shows {total:.0f} pushes of {sure} to {most}"
