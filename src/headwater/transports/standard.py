"""Descriptors 0, 1 and 2: what libraries take for the standard streams, whatever is open there."""

from __future__ import annotations

import os


def occupy() -> None:
    """Open those that are closed (``>&-``) on nothing, so that no socket or shared memory of ours gets their numbers.

    Else a library's warning would be written into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
