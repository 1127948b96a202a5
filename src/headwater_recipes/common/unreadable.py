"""Files that cannot be read: a few are left out and counted; more of them are a mistake in the data, and an error."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.errors import DataError

MOST_UNREADABLE = 0.1
"""Share of the files above which they are not left out any more: something else is wrong."""


def check_unreadable(things: str, total: int, bad: Sequence[str]) -> None:
    """Raises ``DataError`` if too many of the ``total`` files cannot be read.

    Args:
        things: what they are, "images".
        bad: what is wrong with each that cannot be read, beginning with which it is.
    """
    if len(bad) > MOST_UNREADABLE * total:
        raise DataError(
            f"{len(bad)} of {total} {things} cannot be read, above {MOST_UNREADABLE:.0%}; the first is {bad[0]}. "
            f"Nothing was started; mend or remove them."
        )
