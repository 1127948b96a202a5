"""What a worker tells the process that launched it: lines on stdout, each a mark and one JSON object."""

from __future__ import annotations

from typing import Literal

import msgspec

_MARK = "::headwater-recipe "  # no ordinary output starts so


class Started(msgspec.Struct, frozen=True, tag="started"):
    rank: int
    step: int
    parameters: int
    precision: str


class Doing(msgspec.Struct, frozen=True, tag="doing"):
    """What a rank does that is not training, ``loading the model``; nothing: it trains."""

    rank: int
    what: str


class Figures(msgspec.Struct, frozen=True):
    """The steps since the last row: mean ``loss``, rates per second, ``elapsed`` in seconds; units are the recipe's."""

    rank: int
    step: int
    loss: float
    lr: float
    units_per_second: float
    pushed_per_second: float
    pulled_per_second: float
    staleness: int
    grad_norm: float | None
    elapsed: float
    progress: float


class Stepped(Figures, frozen=True, tag="step"):
    """A rank's part of a row of ``metrics.jsonl``."""


class Glanced(Figures, frozen=True, tag="glance"):
    """How it stands between two rows; each rank says so when it likes."""


class Validated(msgspec.Struct, frozen=True, tag="validation"):
    """What one rank's share of the held-out data adds to the sums of the validation; see ``task.Task.measure``."""

    rank: int
    step: int
    elapsed: float
    sums: dict[str, int | float]
    final: bool


class Saved(msgspec.Struct, frozen=True, tag="saved"):
    step: int


class Published(msgspec.Struct, frozen=True, tag="published"):
    """A version that readers can lease from now on."""

    step: int
    name: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """``difference``: the largest between the outputs of the trained model and of the saved one (rank 0 only)."""

    rank: int
    step: int
    elapsed: float
    reason: Literal["done", "stopped"]
    difference: float | None = None


Report = Started | Doing | Stepped | Glanced | Validated | Saved | Published | Finished
_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


def say(report: Report) -> None:
    """Print a report, in one piece."""
    print(_MARK + msgspec.json.encode(report).decode(), flush=True)


def hear(line: str) -> Report | None:
    """The report on a line of a worker's stdout, None for any other line."""
    if not line.startswith(_MARK):
        return None
    try:
        return _decoder.decode(line.removeprefix(_MARK))
    except msgspec.MsgspecError:
        return None
