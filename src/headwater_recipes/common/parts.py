"""A folder of one's own whose files are the parts of a data set: train.* and the one that is held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwater.errors import DataError


def part_file(
    folder: Path, names: Sequence[str], suffixes: Sequence[str], held_out: str, drawn: str = "a part"
) -> Path:
    """The file of a part, by its first name that is there.

    Args:
        names: what the part may be called.
        held_out: how the part that is held out is called, for the message.
        drawn: what is held out of a file that is named by itself, for the message.

    Raises ``DataError``: there is none.
    """
    for name in names:
        for suffix in suffixes:
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    raise DataError(
        f"--data {folder}: no file {' or '.join(f'{name}.*' for name in names)} there ({', '.join(suffixes)}). A "
        f"folder holds train.* and {held_out}.*. Nothing was started; name a file: of one {drawn} is held out."
    )
