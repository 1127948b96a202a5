"""What every run is asked to do, and how far it has come: ``trainer.json``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import msgspec
from rich.console import Console

import headwater
from headwater import launch
from headwater.errors import UsageError
from headwater_recipes.common.options import Option, check_bounds

Precision = Literal["auto", "float32", "bfloat16"]

Ack = Literal["memory", "disk"]

CLUSTER = ("shards", "replicas", "min_copies", "ack", "state", "snapshots", "snapshot_every")
"""Settings that are ``headwater.launch.Shape``'s, by the same names."""


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe's settings are these and its own. ``batch`` is per worker; ``minutes`` and ``steps`` are totals.

    A field with an ``Option`` is one of the command line too.
    """

    MINUTES: ClassVar[float] = 2.5
    """How long a run trains that was given neither --minutes nor --steps."""

    data: Annotated[tuple[str, ...], Option("Files or folders to train on.", path=True, fixed=True)] = ()
    workers: Annotated[int, Option("Worker processes. Default: {default}.", short="-w", least=1)] = 2
    servers: Annotated[int, Option("Servers. Default: {default}.", short="-s", least=1)] = 2
    replicas: Annotated[
        int, Option("Copies of every shard; with 2 a server may die. Default: {default}.", short="-r")
    ] = 1
    shards: Annotated[int | None, Option("Slices of the model. Default: as many as servers.")] = None
    min_copies: Annotated[int, Option("Block rather than go on with fewer copies.")] = 1
    ack: Annotated[Ack, Option("memory, or disk: acknowledge what is in logs. Default: {default}.")] = "memory"
    state: Annotated[
        str | None, Option("Folder of what the coordinator remembers (and logs). Default: a private one.", path=True)
    ] = None
    snapshots: Annotated[str | None, Option("Folder that the cluster's snapshots go to.", path=True)] = None
    snapshot_every: Annotated[float | None, Option("Seconds between two snapshots.")] = None
    elastic: Annotated[
        bool, Option("A worker that dies is started again; the others go on meanwhile, each with its own batches.")
    ] = False
    sync: Annotated[str, Option("bulk, stale:N, async or async:N. Default: {default}.")] = "bulk"
    batch: Annotated[int, Option("Samples per worker and step. Default: {default}.", least=1)] = 4
    lr: Annotated[float, Option("Peak learning rate.", above=0)] = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 40
    max_grad_norm: float = 1.0
    steps: Annotated[int | None, Option("Train for so many steps in all.", above=0)] = None
    minutes: Annotated[float | None, Option("Train for so long in all. Default: {settings.MINUTES:g}.", above=0)] = None
    seed: Annotated[int, Option("Of everything that is drawn.", fixed=True)] = 0
    precision: Annotated[Precision, Option("auto, float32 or bfloat16: of the workers' matrix products.")] = "auto"
    publish_every: Annotated[int, Option("Steps between versions that readers can follow. Default: none.")] = 0
    save_every: Annotated[int, Option("Steps between checkpoints.", least=1)] = 200
    validate_every: Annotated[int, Option("Steps between validations.", least=1)] = 200
    log_every: Annotated[int, Option("Steps between rows of metrics.jsonl.", least=1)] = 10

    @property
    def budget(self) -> float | None:
        """Seconds of training in all; None if the run has a number of steps."""
        return None if self.steps is not None else 60 * (self.minutes or self.MINUTES)

    @classmethod
    def of(cls, changes: dict[str, Any]) -> Self:
        """The settings of a new run, from what was given."""
        return cls(**changes)

    @classmethod
    def look_up(cls, changes: dict[str, Any], console: Console) -> dict[str, Any]:
        """What was given, with what a name on the command line stands for; called before torch is loaded."""
        del console
        return changes

    def one_given(self, what: str) -> str:
        """The only ``--data``: ``what``, "the .csv file". Raises ``UsageError``: none, or several, were given."""
        if len(self.data) != 1:
            said = f" {', '.join(self.data)}" if self.data else ""
            raise UsageError(f"--data{said}: give one, {what}; nothing was started")
        return self.data[0]

    def check(self) -> None:
        """Raises ``UsageError`` for a setting that cannot work."""
        parse_sync(self.sync)
        check_bounds(self)
        if self.publish_every < 0:
            raise UsageError(f"--publish-every {self.publish_every}: must be 0 (never) or more; nothing was started")
        launch.Shape(self.servers, **cluster(self))
        if self.steps is not None and self.minutes is not None:
            raise UsageError("--steps and --minutes: give one of them; nothing was started")


AnySettings = TypeVar("AnySettings", bound=Training)


class State(msgspec.Struct, Generic[AnySettings], frozen=True, kw_only=True):
    """``trainer.json``. ``elapsed``: seconds of training; ``progress`` along the learning-rate schedule, 0 to 1."""

    step: int = 0
    elapsed: float = 0.0
    progress: float = 0.0
    seed: int = 0
    settings: AnySettings
    headwater: str = headwater.__version__


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
