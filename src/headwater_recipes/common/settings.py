"""What every run is asked to do, and how far it has come: ``trainer.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import msgspec

import headwater
from headwater import launch
from headwater.errors import UsageError

Precision = Literal["auto", "float32", "bfloat16"]

Ack = Literal["memory", "disk"]

CLUSTER = ("shards", "replicas", "min_copies", "ack", "state", "snapshots", "snapshot_every")
"""Settings that are ``headwater.launch.Launcher``'s, by the same names."""


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe's settings are these and its own. ``batch`` is per worker; ``minutes`` and ``steps`` are totals."""

    MINUTES: ClassVar[float] = 2.5
    """How long a run trains that was given neither --minutes nor --steps."""

    data: tuple[str, ...] = ()
    workers: int = 2
    servers: int = 2
    sync: str = "bulk"
    batch: int = 4
    seq: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 40
    max_grad_norm: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    precision: Precision = "auto"
    log_every: int = 10
    save_every: int = 200
    validate_every: int = 200
    publish_every: int = 0
    shards: int | None = None
    replicas: int = 1
    min_copies: int = 1
    ack: Ack = "memory"
    state: str | None = None
    snapshots: str | None = None
    snapshot_every: float | None = None

    @property
    def budget(self) -> float | None:
        """Seconds of training in all; None if the run has a number of steps."""
        return None if self.steps is not None else 60 * (self.minutes or self.MINUTES)


AnySettings = TypeVar("AnySettings", bound=Training)


class State(msgspec.Struct, Generic[AnySettings], frozen=True, kw_only=True):
    """``trainer.json``. ``elapsed``: seconds of training; ``progress`` along the learning-rate schedule, 0 to 1."""

    step: int = 0
    elapsed: float = 0.0
    progress: float = 0.0
    seed: int = 0
    settings: AnySettings
    headwater: str = headwater.__version__


def make_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given on the command line, by the names of the settings; options left out are None.

    Paths become absolute texts, as workers may run elsewhere.

    Raises:
        UsageError: a precision, or a kind of acknowledgement, that there is not.
    """
    for name, kind in (("precision", Precision), ("ack", Ack)):
        if given.get(name) is not None and given[name] not in get_args(kind):
            raise UsageError(f"--{name} {given[name]}: must be one of {', '.join(get_args(kind))}")
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return str(value.resolve()) if isinstance(value, Path) else value


_SYNC = re.compile(r"(?P<kind>bulk|stale|async)(?::(?P<bound>\d+))?")


def parse_sync(text: str) -> headwater.Bulk | headwater.Stale | headwater.Async:
    """``bulk``, ``stale:N``, ``async`` or ``async:N``.

    Raises:
        UsageError: anything else.
    """
    found = _SYNC.fullmatch(text)
    bound = int(found["bound"]) if found and found["bound"] else None
    if found and found["kind"] == "bulk" and bound is None:
        return headwater.Bulk()
    if found and found["kind"] == "stale" and bound is not None:
        return headwater.Stale(bound)
    if found and found["kind"] == "async":
        return headwater.Async(bound)
    raise UsageError(f"--sync {text}: must be bulk, stale:N, async or async:N (N in steps); nothing was started")


def cluster(settings: Training) -> dict[str, Any]:
    """What the launcher is told about the cluster, beside the number of servers."""
    found = {name: getattr(settings, name) for name in CLUSTER}
    return {**found, **{name: Path(found[name]) for name in ("state", "snapshots") if found[name] is not None}}


def check(settings: Training) -> None:
    """Raises ``UsageError`` for a setting, of those that all recipes have, that cannot work."""
    parse_sync(settings.sync)
    for name in ("workers", "servers", "batch", "seq", "log_every", "save_every", "validate_every"):
        if getattr(settings, name) < 1:
            raise UsageError(f"{name}={getattr(settings, name)}: must be 1 or more; nothing was started")
    if settings.publish_every < 0:
        raise UsageError(f"--publish-every {settings.publish_every}: must be 0 (never) or more; nothing was started")
    launch.Shape(settings.servers, **cluster(settings))
    if settings.seq < 2:
        raise UsageError("seq=1: a window needs 2 tokens or more; nothing was started")
    if settings.steps is not None and settings.minutes is not None:
        raise UsageError("--steps and --minutes: give one of them; nothing was started")
    for name in ("lr", "steps", "minutes"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} {value}: must be above 0; nothing was started")
