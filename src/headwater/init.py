"""How servers fill a new parameter: the public helpers behind ``headwater.init``.

Each returns a ``headwater.types.Init``. The values depend on the table's seed, the parameter's name and the
element's index only, so a table starts bit-identical on any number of servers; they are not the numbers that
``torch.nn.init`` draws, only the same distributions.

    >>> w = ps.dense("w", (1000, 64), init=headwater.init.normal(0.02))   # doctest: +SKIP
"""

from __future__ import annotations

import math

from headwater.errors import UsageError
from headwater.types import Init


def zeros() -> Init:
    """All zeros."""
    return Init("zeros")


def ones() -> Init:
    """All ones."""
    return Init("ones")


def constant(value: float) -> Init:
    """Every element ``value``."""
    return Init("constant", _number("value", value))


def normal(std: float = 1.0, mean: float = 0.0) -> Init:
    """Normal with standard deviation ``std`` around ``mean``."""
    return Init("normal", _number("mean", mean), _spread("std", std))


def truncated_normal(std: float = 1.0, mean: float = 0.0) -> Init:
    """``normal(std, mean)`` cut at two standard deviations on either side."""
    return Init("truncated_normal", _number("mean", mean), _spread("std", std))


def uniform(low: float = 0.0, high: float = 1.0) -> Init:
    """Uniform on [low, high)."""
    if not _number("low", low) <= _number("high", high):
        raise UsageError(f"init.uniform(low={low}, high={high}): low must not exceed high")
    return Init("uniform", low, high)


def xavier_uniform(gain: float = 1.0) -> Init:
    """Glorot & Bengio (2010): uniform on ±gain·sqrt(6 / (fan_in + fan_out)); two dimensions or more."""
    return Init("xavier_uniform", _number("gain", gain))


def xavier_normal(gain: float = 1.0) -> Init:
    """Glorot & Bengio (2010): normal with std gain·sqrt(2 / (fan_in + fan_out)); two dimensions or more."""
    return Init("xavier_normal", _number("gain", gain))


def kaiming_uniform(a: float = 0.0) -> Init:
    """He et al. (2015): uniform on ±sqrt(6 / ((1 + a²)·fan_in)); ``a`` is the leaky ReLU's slope."""
    return Init("kaiming_uniform", _number("a", a))


def kaiming_normal(a: float = 0.0) -> Init:
    """He et al. (2015): normal with std sqrt(2 / ((1 + a²)·fan_in)); ``a`` is the leaky ReLU's slope."""
    return Init("kaiming_normal", _number("a", a))


def _number(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise UsageError(f"init: {name}={value} must be a finite number; nothing was created")
    return float(value)


def _spread(name: str, value: float) -> float:
    if _number(name, value) < 0:
        raise UsageError(f"init: {name}={value} must be 0 or more; nothing was created")
    return float(value)
