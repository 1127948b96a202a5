"""What the tables of a worker's optimizers are called."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Container, Iterator

from headwater.errors import TableConflict

_REMEDY = "nothing was changed. Give each optimizer its own name=…, or none: they are then named in the order of making"


class Names:
    """The names that one worker of one cluster has given in this process. "model", "model2", … by order of making: all
    workers run the same script, so the same optimizer has the same name on each.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._live: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()

    def choose(self, asked: str | None, resume: bool, there: Container[str]) -> str:
        """The name of an optimizer's table; ``there``: tables that this worker uses already.

        Raises ``TableConflict`` for a name that another optimizer has, or had and this one does not ``resume``.
        """
        if asked is None:
            return next(name for name in _defaults() if self._free(name, resume, there))
        if asked in self._live:
            raise TableConflict(f"another optimizer of this process trains table {asked!r}; {_REMEDY}")
        if not self._free(asked, resume, there):
            raise TableConflict(
                f"table {asked!r} holds what was trained in it earlier in this process; nothing was changed. Say "
                "resume=True to go on with that, or give the optimizer another name=… (or none)"
            )
        return asked

    def _free(self, name: str, resume: bool, there: Container[str]) -> bool:
        return name not in self._live and (resume or (name not in self._used and name not in there))

    def take(self, name: str, optimizer: object) -> None:
        """The table is this optimizer's, until it releases it or is gone."""
        self._used.add(name)
        self._live[name] = optimizer

    def release(self, name: str) -> None:
        """Its optimizer is closed."""
        self._live.pop(name, None)


def _defaults() -> Iterator[str]:
    return itertools.chain(["model"], (f"model{number}" for number in itertools.count(2)))
