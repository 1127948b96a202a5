"""One process of the race: it works until SIGTERM, and what ends it early is in its counters."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from headwater.errors import HeadwaterError
from headwater_bench.races.counters import Counters

Connection = TypeVar("Connection")


class Work(Protocol):
    """``run`` returns soon after ``stopping`` is set."""

    stopping: bool

    def run(self) -> None: ...


def work_until_told(
    path: Path,
    connect: Callable[[], AbstractContextManager[Connection]],
    make: Callable[[Connection, Counters], Work],
) -> int:
    """The process's exit code: 3 if Headwater raised, and the counters in ``path`` say what."""
    with Counters(path) as counters:
        try:
            with connect() as connection:
                work = make(connection, counters)
                signal.signal(signal.SIGTERM, lambda *_: setattr(work, "stopping", True))
                work.run()
        except HeadwaterError as error:
            counters.failed(error.code, str(error))
            counters.say(f"ended by {error.code}: {error}")
            return 3
    return 0
