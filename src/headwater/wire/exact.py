"""Sums of floats that do not depend on how the terms were dealt out. Light to import: no torch.

A sum of floats depends on its order, so a gradient norm summed shard by shard would depend on the number of
shards. Servers therefore send their part as an *expansion*: a few floats whose exact sum is the exact sum of
all terms (Shewchuk 1997, "Adaptive precision floating-point arithmetic"). Rounding happens once, at the end,
in ``merge``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def exact_sum(values: Sequence[float]) -> list[float]:
    """The exact sum of ``values`` as an expansion: largest term first, [] for zero, [inf] or [nan] if not finite.

    ``math.fsum`` rounds the exact sum once; what rounding lost is the exact sum of the values and the
    negated result, and so on. A sum of n doubles needs two or three rounds.
    """
    expansion: list[float] = []
    terms = list(values)
    while True:
        try:
            rounded = math.fsum(terms)
        except (OverflowError, ValueError):  # beyond the largest double; inf - inf
            return [math.inf] if all(term >= 0 for term in values) else [math.nan]
        if rounded == 0.0:
            return expansion
        if not math.isfinite(rounded):
            return [rounded]
        expansion.append(rounded)
        terms.append(-rounded)


def exact_add(expansion: Sequence[float], value: float) -> list[float]:
    """The expansion of ``expansion + value``."""
    return exact_sum([*expansion, value])


def merge(expansions: Iterable[Sequence[float]]) -> float:
    """The sum of all expansions, rounded once: the same for any split of the terms among them."""
    total = exact_sum([term for expansion in expansions for term in expansion])
    return total[0] if total else 0.0


def clip_factor(max_norm: float, total_square: float) -> tuple[float, float | None]:
    """The norm and the factor that clips a gradient to ``max_norm``, None if it is short enough.

    As ``torch.nn.utils.clip_grad_norm_``: norm = sqrt(total), factor = max_norm / (norm + 1e-6) if below 1.
    Both are float64; a kernel multiplies a float32 gradient by the factor rounded to float32. A norm that is
    infinite gives the factor 0 and NaN gives NaN, as in torch: whether such a step is taken is the policy's
    business.
    """
    norm = math.sqrt(total_square)
    factor = max_norm / (norm + 1e-6)
    return norm, None if factor >= 1.0 else factor
