"""This process's environment: how its threads wait, and variables that are lent for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


def let_threads_sleep() -> None:
    """Threads of a matrix product that wait for each other sleep: to be called before torch is loaded.

    Beside other busy processes spinning costs most of the time, on an idle machine it gains little. What the user has
    set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextlib.contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """``variables`` in this process's environment, for as long as the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
