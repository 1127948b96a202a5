"""Under Bulk: the model after every step, computed by one process, against the hashes that the workers wrote.

Which workers contributed to a step is known from their ledgers. A push that was never acknowledged (its worker was
killed) may be part of a step or not; where the hash says that it is, it counts.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from headwater_bench.chaos.ledger import Ledger
from headwater_bench.chaos.workload import MODEL, WIDE, digest, gradient

MOST = 64  # states that are kept for as long as nobody knows better

Part = tuple[int, int]  # (rank, number of the push)


@dataclass(frozen=True, slots=True)
class Comparison:
    """``steps`` that somebody saw, how many had the bits of one process, and the first that had not."""

    steps: int
    equal: int
    words: str = ""


class OneProcess:
    """The model and torch's own AdamW."""

    def __init__(self) -> None:
        self.tensors = [torch.zeros(WIDE, requires_grad=True) for _ in range(MODEL)]
        self._optimizer = torch.optim.AdamW(self.tensors, lr=0.01, fused=True)

    def step(self, parts: Collection[Part]) -> None:
        """Gradients added in rank order, divided by their number."""
        total: torch.Tensor | None = None
        for rank, number in sorted(parts):
            own = gradient(rank, number)
            total = own if total is None else total.add_(own)
        assert total is not None
        for tensor, row in zip(self.tensors, total.div_(len(parts)), strict=True):
            tensor.grad = row
        self._optimizer.step()

    def digest(self) -> str:
        return digest([tensor.detach() for tensor in self.tensors])


def compare(ledgers: Collection[Ledger], most: int = 1 << 30) -> Comparison:
    """Every step up to the ``most``-th. Stops at the first that no set of contributions explains.

    A step whose hash nobody wrote down may leave more than one possible state; later hashes tell which it was.
    """
    sure: dict[int, list[Part]] = {}
    seen: dict[int, str] = {}
    for ledger in ledgers:
        for number, push in ledger.of("model").items():
            if push.acked is not None:
                sure.setdefault(push.clock, []).append((ledger.rank, number))
        for clock, found in ledger.hashes.items():
            if seen.setdefault(clock, found) != found:
                return Comparison(len(seen), 0, f"two workers saw different values after step {clock}")
    models = [OneProcess()]
    equal = 0
    maybe = [_doubtful(ledger) for ledger in ledgers]
    for clock in range(1, min(max(seen, default=0), most) + 1):
        doubtful = [part for each in maybe for part, low, high in each if low < clock < high]
        models = _after(models, sure.get(clock, []), doubtful, seen.get(clock))
        if not models:
            return Comparison(len(seen), equal, f"step {clock} of {sure.get(clock)}, perhaps {doubtful}")
        equal += clock in seen
    return Comparison(len(seen), equal)


def _doubtful(ledger: Ledger) -> list[tuple[Part, int, int]]:
    """Pushes that may be part of a step, and the steps between which that lies."""
    found: list[tuple[Part, int, int]] = []
    last, waiting = 0, []
    for number, push in sorted(ledger.of("model").items()):
        if push.acked is None:
            if not push.refused:
                waiting.append(number)
            continue
        found += [((ledger.rank, k), last, push.clock) for k in waiting]
        last, waiting = push.clock, []
    return found + [((ledger.rank, k), last, 1 << 62) for k in waiting]


def _after(models: list[OneProcess], sure: list[Part], doubtful: list[Part], wanted: str | None) -> list[OneProcess]:
    """The states that are possible after a step."""
    sets = [parts for parts in _sets(sure, doubtful) if parts]
    found: list[OneProcess] = []
    for model in models:
        for parts in sets:
            after = model if len(sets) == 1 else copy.deepcopy(model)
            after.step(parts)
            if wanted is None:
                found.append(after)
            elif after.digest() == wanted:
                return [after]
    return found[:MOST]


def _sets(sure: list[Part], doubtful: list[Part]) -> Iterator[list[Part]]:
    """What is sure, alone first, then with some of the rest, at most one of each rank."""
    taken = {rank for rank, _ in sure}
    rest = [part for part in doubtful if part[0] not in taken]
    for count in range(len(rest) + 1):
        for more in combinations(rest, count):
            if len({rank for rank, _ in more}) == count:
                yield [*sure, *more]
