"""Readers of versions: leases, tensors of one version, modules that are kept current. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.readers.follow import Follower
    from headwater.readers.reading import Reader, ReaderStatistics, reader
    from headwater.readers.weights import Weights

__all__ = ["Follower", "Reader", "ReaderStatistics", "Weights", "reader"]

_FROM = {
    "Follower": "follow",
    "Reader": "reading",
    "ReaderStatistics": "reading",
    "Weights": "weights",
    "reader": "reading",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'headwater.readers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwater.readers.{_FROM[name]}"), name)
