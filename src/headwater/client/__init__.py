"""The client: sessions with shards, tables as flat memory, tickets. Names load on first use: readers need no tables."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.client.client import Client
    from headwater.client.connecting import connect, current, release, shared
    from headwater.client.dense.handle import Dense
    from headwater.client.dense.table import DenseTable
    from headwater.client.publication import Publication
    from headwater.client.statistics import ClientStatistics
    from headwater.client.table import Table
    from headwater.client.tickets import StepResult, Ticket

__all__ = [
    "Client",
    "ClientStatistics",
    "Dense",
    "DenseTable",
    "Publication",
    "StepResult",
    "Table",
    "Ticket",
    "connect",
    "current",
    "release",
    "shared",
]

_FROM = {
    "Client": "client",
    "ClientStatistics": "statistics",
    "Dense": "dense.handle",
    "DenseTable": "dense.table",
    "Publication": "publication",
    "StepResult": "tickets",
    "Table": "table",
    "Ticket": "tickets",
    "connect": "connecting",
    "current": "connecting",
    "release": "connecting",
    "shared": "connecting",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'headwater.client' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"headwater.client.{_FROM[name]}"), name)
    return found
