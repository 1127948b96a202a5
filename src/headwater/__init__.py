"""Headwater: a model's parameters in one place, with one version history.

The line that changes in a PyTorch script is the optimizer's::

    opt = headwater.Optimizer(model, torch.optim.AdamW, lr=3e-4, sync=headwater.Bulk())

Everything public is listed in ``__all__``. Names load on first use, so that ``import headwater`` costs
neither torch nor a socket.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from headwater import errors
from headwater.errors import (
    AddressInUse,
    AuthenticationFailed,
    ClusterError,
    DataError,
    DeadlineExceeded,
    DeltaCorrupt,
    DiskFull,
    GradientModified,
    HeadwaterError,
    InternalError,
    LinkBroken,
    LinkError,
    NonFiniteGradient,
    NotEnoughMemory,
    ParameterModified,
    ProtocolError,
    RankTaken,
    RunInUse,
    SessionExpired,
    ShapeMismatch,
    SnapshotCorrupt,
    StaleEpoch,
    StateCorrupt,
    StateInUse,
    TableConflict,
    UnknownOptimizer,
    UnknownTable,
    UnknownVersion,
    Unreachable,
    UsageError,
    VersionExists,
    VersionExpired,
    WorkerLost,
)
from headwater.types import Async, Bulk, DenseSpec, Init, OptimizerSpec, ParameterSpec, Stale, VersionInfo

if TYPE_CHECKING:
    from headwater import data, init, launch, pretrained
    from headwater.client import Client, Dense, DenseTable, Publication, Table, Ticket, connect
    from headwater.data import shard
    from headwater.integrations.torch.optimizer import Optimizer, wrap
    from headwater.readers import Follower, Reader, Weights, reader
    from headwater.wire.versions import VersionStatus

__version__ = "0.1.0"

__all__ = [
    "AddressInUse",
    "Async",
    "AuthenticationFailed",
    "Bulk",
    "Client",
    "ClusterError",
    "DataError",
    "DeadlineExceeded",
    "DeltaCorrupt",
    "Dense",
    "DenseSpec",
    "DenseTable",
    "DiskFull",
    "Follower",
    "GradientModified",
    "HeadwaterError",
    "Init",
    "InternalError",
    "LinkBroken",
    "LinkError",
    "NonFiniteGradient",
    "NotEnoughMemory",
    "Optimizer",
    "OptimizerSpec",
    "ParameterModified",
    "ParameterSpec",
    "ProtocolError",
    "Publication",
    "RankTaken",
    "Reader",
    "RunInUse",
    "SessionExpired",
    "ShapeMismatch",
    "SnapshotCorrupt",
    "Stale",
    "StaleEpoch",
    "StateCorrupt",
    "StateInUse",
    "Table",
    "TableConflict",
    "Ticket",
    "UnknownOptimizer",
    "UnknownTable",
    "UnknownVersion",
    "Unreachable",
    "UsageError",
    "VersionExists",
    "VersionExpired",
    "VersionInfo",
    "VersionStatus",
    "Weights",
    "WorkerLost",
    "__version__",
    "connect",
    "data",
    "errors",
    "init",
    "launch",
    "pretrained",
    "reader",
    "shard",
    "wrap",
]

_LATE = {
    "Client": "headwater.client",
    "Dense": "headwater.client",
    "DenseTable": "headwater.client",
    "Table": "headwater.client",
    "Ticket": "headwater.client",
    "connect": "headwater.client",
    "Follower": "headwater.readers",
    "Optimizer": "headwater.integrations.torch.optimizer",
    "wrap": "headwater.integrations.torch.optimizer",
    "Publication": "headwater.client",
    "Reader": "headwater.readers",
    "Weights": "headwater.readers",
    "VersionStatus": "headwater.wire.versions",
    "reader": "headwater.readers",
    "shard": "headwater.data",
}
"""Public names that need more than the standard library: where each one lives."""


def __getattr__(name: str) -> Any:
    if name in ("data", "init", "launch", "pretrained"):
        return importlib.import_module(f"headwater.{name}")
    if name not in _LATE:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    _offer_inproc()
    found = globals()[name] = getattr(importlib.import_module(_LATE[name]), name)
    return found


def _offer_inproc() -> None:
    """Let inproc:// addresses work, without loading servers for those who use none."""
    transport = importlib.import_module("headwater.transports.inproc")
    if not transport.provided():
        transport.provide(lambda *asked: importlib.import_module("headwater.launch.inproc").open_hub(*asked))


def __dir__() -> list[str]:
    return sorted(__all__)


if os.environ.get("HEADWATER_STDIN") == "none":  # a launcher says that this process has no standard input
    importlib.import_module("headwater.client.stdin").refuse()
