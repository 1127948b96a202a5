"""``headwater bench delta``: what a delta between two versions weighs and costs, beside one copy of the same bytes.

One thread throughout. Each kind of change is made once for a piece of 32 MB and repeated up to the size. The floor of a
size is the entropy of what has to be said: which words changed, H(p)/p bits for each if p of them did, and how far they
moved, by the distribution that was found.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headwater.types import Span
from headwater.wire import delta
from headwater_bench.options import MEBIBYTE, Options
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import interleave, median_ratio

Array = npt.NDArray[Any]

ROUNDS = 9
PIECE = 32 * MEBIBYTE
STEPS = 8
"""Optimizer steps before the versions that are compared, so that the moments are not those of a first step."""

SPREAD, GRADIENT = 0.02, 1e-3
"""Standard deviations of weights and gradients."""

LINK = 2.7e9
"""Bytes per second of the link over which whole and delta race: a fast network. ``delta.DENSE`` is for it."""

RACE = 64 * MEBIBYTE
RACE_ROUNDS = 3
SHARES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
LARGE = 9.0
"""A bound that no delta reaches."""

COMPILE = """
import time
import numba
from headwater.wire import delta
start = time.process_time()
delta.warm()
print(time.process_time() - start)
"""


class VersionPair(NamedTuple):
    """Two versions of a part, uint8, of words of ``word`` bytes."""

    old: Array
    new: Array
    word: int


def measure(options: Options) -> list[Figure]:
    """The figures for ``size`` MB."""
    torch.set_num_threads(1)
    found = _compiling(options)
    for name, make in KINDS.items():
        options.note(f"delta: {name}")
        found += _figures(name, _repeated(make(), options.size * MEBIBYTE), options.rounds_or(ROUNDS))
    options.note("delta: which is faster over a link, delta or whole")
    return found + _race(options.rounds_or(RACE_ROUNDS))


def _compiling(options: Options) -> list[Figure]:
    """Seconds of a processor until the loops are ready: compiled, and found where they were kept."""
    options.note("delta: compiling")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        cold, kept = (
            float(subprocess.check_output([sys.executable, "-c", COMPILE], env=environment)) for _ in range(2)
        )
    return [figure("delta", "loops compiled, once", cold, "s"), figure("delta", "loops loaded again", kept, "s")]


# --- what changes -----------------------------------------------------------------------------------------------


def stepped(kind: Any, rate: float, dtype: torch.dtype, master: torch.dtype, count: int) -> VersionPair:
    """``count`` normal weights before and after an optimizer's step in ``master``, both rounded to ``dtype``."""
    dice = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter((torch.randn(count, generator=dice) * SPREAD).to(master))
    optimizer = kind([weights], lr=rate)
    for _ in range(STEPS):
        old = weights.detach().to(dtype, copy=True)
        weights.grad = (torch.randn(count, generator=dice) * GRADIENT).to(master)
        optimizer.step()
    new = weights.detach().to(dtype, copy=True)
    return VersionPair(_bytes(old), _bytes(new), dtype.itemsize)


def changing(share: float, master: torch.dtype) -> Callable[[], VersionPair]:
    """AdamW on bfloat16 weights, at the rate that changes about this share of them in a step."""

    def make() -> VersionPair:
        low, high = 1e-9, 1.0
        for _ in range(20):
            rate = (low * high) ** 0.5
            sample = stepped(torch.optim.AdamW, rate, torch.bfloat16, master, 2**16)
            low, high = (rate, high) if changed(sample).mean() < share else (low, rate)
        return stepped(torch.optim.AdamW, rate, torch.bfloat16, master, PIECE // 2)

    return make


def replaced(share: float) -> VersionPair:
    """bfloat16 words, a share of them replaced by any other: the worst case."""
    dice = np.random.default_rng(0)
    old = dice.integers(0, 2**16, PIECE // 2, dtype=np.uint16)
    new = old.copy()
    struck = dice.random(old.size) < share
    new[struck] += dice.integers(1, 2**16, int(struck.sum()), dtype=np.uint16)
    return VersionPair(old.view(np.uint8), new.view(np.uint8), 2)


FP32, BF16 = torch.float32, torch.bfloat16
KINDS: dict[str, Callable[[], VersionPair]] = {
    "bf16 AdamW 1 %": changing(0.01, BF16),
    "bf16 of fp32 AdamW 1 %": changing(0.01, FP32),
    "bf16 random 1 %": lambda: replaced(0.01),
    "bf16 AdamW 0.1 %": changing(0.001, BF16),
    "bf16 AdamW 10 %": changing(0.1, BF16),
    "fp32 SGD, rate 1e-5": lambda: stepped(torch.optim.SGD, 1e-5, FP32, FP32, PIECE // 4),
    "fp32 AdamW, rate 1e-4": lambda: stepped(torch.optim.AdamW, 1e-4, FP32, FP32, PIECE // 4),
}


def changed(versions: VersionPair) -> Array:
    """Which words differ."""
    old, new = _words(versions)
    different: Array = old != new
    return different


def _bytes(tensor: torch.Tensor) -> Array:
    return tensor.view(torch.uint8).numpy()


def _words(versions: VersionPair) -> tuple[Array, Array]:
    kind = np.uint16 if versions.word == 2 else np.uint32
    return versions.old.view(kind), versions.new.view(kind)


def _repeated(piece: VersionPair, size: int) -> VersionPair:
    return VersionPair(np.resize(piece.old, size), np.resize(piece.new, size), piece.word)


def floor(versions: VersionPair) -> float:
    """Bytes per changed word that the entropy of places and moves allows."""
    different = changed(versions)
    old, new = _words(versions)
    share = different.mean()
    places = -np.log2(share) - (1 - share) / share * np.log2(1 - share) if share < 1 else 0.0
    moves = np.unique((new - old)[different], return_counts=True)[1] / different.sum()
    return float(places - (moves * np.log2(moves)).sum()) / 8


# --- what it costs ----------------------------------------------------------------------------------------------


def _figures(name: str, versions: VersionPair, rounds: int) -> list[Figure]:
    old, new, word = versions
    spans = [Span(0, old.size, word)]
    made = delta.encode(old, new, spans, most=LARGE)
    assert made is not None
    copy, target = old.copy(), old.copy()
    seconds = interleave(
        {
            "copy": _timed(lambda: np.copyto(copy, old)),
            "compare": _timed(lambda: _compare(old, copy)),
            "encode": _timed(lambda: delta.encode(old, new, spans, most=LARGE)),
            "apply": lambda: _timed_apply(target, old, made),
        },
        rounds,
        warmup=1,
    )
    piece = VersionPair(old[:PIECE], new[:PIECE], word)
    count = int(changed(versions).sum())
    bound = median_ratio(seconds["copy"], seconds["compare"])
    return [
        figure("delta", f"{name} changed", 100 * count * word / old.size, "% of words"),
        figure("delta", f"{name} bytes per changed word", len(made) / count, "B", floor(piece)),
        figure("delta", f"{name} size / whole", 100 * len(made) / old.size, "%"),
        figure("delta", f"{name} encode / memcpy", median_ratio(seconds["copy"], seconds["encode"]), "×", bound),
        figure("delta", f"{name} apply / memcpy", median_ratio(seconds["copy"], seconds["apply"]), "×"),
        figure("delta", f"{name} words that came out wrong", _wrong(old, new, made, word), "words", 0.0),
    ]


def _timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    def measured() -> float:
        start = clock()
        work()
        return clock() - start

    return measured


def _timed_apply(target: Array, old: Array, made: bytes, clock: Callable[[], float] = time.perf_counter) -> float:
    np.copyto(target, old)
    return _timed(lambda: delta.apply(target, made), clock)()


def _compare(left: Array, right: Array) -> None:
    """Both versions are read, and nothing else: the ceiling of encoding."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    compare(left.ctypes.data, right.ctypes.data, left.size)


def _wrong(old: Array, new: Array, made: bytes, word: int) -> int:
    """Words that differ from the newer version after the delta was applied, and applied again."""
    target = old.copy()
    delta.apply(target, made)
    wrong = int(changed(VersionPair(target, new, word)).sum())
    delta.apply(target, made)
    return wrong + int(changed(VersionPair(target, new, word)).sum())


# --- delta or whole ---------------------------------------------------------------------------------------------


class CodecTimes(NamedTuple):
    """The changed words' share, the delta's share of the bytes; seconds of a processor to encode and to apply."""

    changed: float
    size: float
    encode: float
    apply: float


def _race(rounds: int) -> list[Figure]:
    """From which share on it is faster to send everything over the link than encode, send and apply."""
    dice = np.random.default_rng(0)
    old = dice.integers(0, 2**16, RACE // 2, dtype=np.uint16)
    order = dice.random(old.size)
    # One place, or two with half that chance, and so on, up or down: about as an optimizer moves bfloat16 weights.
    moves = (dice.geometric(0.5, old.size) * dice.choice([-1, 1], old.size)).astype(np.uint16)
    runs = []
    for share in SHARES:
        new = old + np.where(order < share, moves, np.uint16(0))
        runs.append(_raced(VersionPair(old.view(np.uint8), new.view(np.uint8), 2), share, rounds))
    whole = RACE / LINK
    single = crossing([(run.encode + run.size * whole + run.apply, run) for run in runs], whole)
    kept = crossing([(run.size * whole + run.apply, run) for run in runs], whole)
    found = []
    for name, run in (("encoded for one reader", single), ("encoded once, for many", kept)):
        found += [
            figure("delta", f"2.7 GB/s, {name}: whole wins from, changed", 100 * run.changed, "% of words"),
            figure("delta", f"2.7 GB/s, {name}: whole wins from, size", 100 * run.size, "% of whole"),
        ]
    return found


def _raced(versions: VersionPair, share: float, rounds: int) -> CodecTimes:
    old, new, word = versions
    spans = [Span(0, old.size, word)]
    made = delta.encode(old, new, spans, most=LARGE)
    assert made is not None
    target = old.copy()
    # A processor's seconds, not the clock's: the link's are fixed, so a neighbour's noise would hit one side only.
    busy = time.thread_time
    encode = _timed(lambda: delta.encode(old, new, spans, most=LARGE), busy)
    seconds = interleave({"encode": encode, "apply": lambda: _timed_apply(target, old, made, busy)}, rounds, warmup=1)
    middle = {side: statistics.median(found) for side, found in seconds.items()}
    return CodecTimes(share, len(made) / old.size, middle["encode"], middle["apply"])


def crossing(runs: list[tuple[float, CodecTimes]], whole: float) -> CodecTimes:
    """Where the seconds of the runs reach ``whole``, between two of them by a straight line; else the nearest end."""
    for (before, low), (after, high) in itertools.pairwise(runs):
        if before < whole <= after:
            part = (whole - before) / (after - before)
            return CodecTimes(*(a + part * (b - a) for a, b in zip(low, high, strict=True)))
    return runs[0][1] if runs[0][0] >= whole else runs[-1][1]
