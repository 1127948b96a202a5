"""The order of samples in an epoch: a seeded permutation that is computed, not stored.

A generalised Feistel network (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 6): a
position is written as two digits of a mixed radix a × b ≥ n, each round adds a hash of one digit to the other, and
what lands outside 0..n-1 goes round again. Any part of the order costs only its own length, so neither the coordinator
nor a worker ever holds n numbers, and the result depends on no library's random stream.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.uint64]
_ROUNDS = 8
_MASK = (1 << 64) - 1


def order(n: int, seed: int, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """The samples at positions ``start:stop`` (0 ≤ start ≤ stop ≤ n) of this epoch, as int64 of that length."""
    high = math.isqrt(n - 1) + 1  # a: the smallest whose square holds n
    low = -(-n // high)
    keys = [_mix_number(_mix_number(seed) ^ _mix_number((epoch << 8) + turn + 1)) for turn in range(_ROUNDS)]
    found = _permute(np.arange(start, stop, dtype=np.uint64), high, low, keys)
    while (outside := np.flatnonzero(found >= n)).size:
        found[outside] = _permute(found[outside], high, low, keys)
    return found.astype(np.int64)


def _permute(positions: Positions, high: int, low: int, keys: list[int]) -> Positions:
    """One way through the network: a permutation of 0..high·low-1."""
    a, b = np.uint64(high), np.uint64(low)
    left, right = positions // b, positions % b
    for turn, key in enumerate(keys):
        if turn % 2:
            right = (right + _mix(left, key) % b) % b
        else:
            left = (left + _mix(right, key) % a) % a
    return left * b + right


def _mix(values: Positions, key: int) -> Positions:
    """SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014) of each value under a key."""
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_number(value: int) -> int:
    """The same for one Python number of any size or sign, which keeps to 64 bits by itself."""
    z = (value * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
