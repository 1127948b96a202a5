"""The wanted files out of a package: a wheel, an sdist, a ``.deb``, or one that is installed."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from headwater_recipes.data.carriers import Entries
from headwater_recipes.data.errors import DataDamaged, DataMissing

_BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_CHUNK = 1 << 20


def unpack(entries: Entries, root: str, patterns: tuple[str, ...], place: Path, source: str = "the package") -> None:
    """Write what lies below the package's folder ``root`` and matches a pattern to the same path below ``place``.

    A ``*`` in a pattern stands for slashes too. ``source`` is how messages call the package. Raises ``DataDamaged`` for
    a path that leads out of ``place``, and for a package that cannot be read to its end.
    """
    with closing(entries):
        try:
            _unpack(entries, root, patterns, place)
        except _BROKEN as error:
            raise DataDamaged(
                f"{source}: the package is damaged ({error}); nothing was changed. Fetch it again"
            ) from error


def _unpack(entries: Entries, root: str, patterns: tuple[str, ...], place: Path) -> None:
    for name, opened in entries:
        path = PurePosixPath(name)
        if not path.is_relative_to(root):
            continue
        inside = path.relative_to(root)
        if not any(fnmatchcase(str(inside), pattern) for pattern in patterns):
            continue
        if inside.is_absolute() or ".." in inside.parts:
            raise DataDamaged(f"the package holds {name!r}, a path that leads out of its folder; nothing was unpacked")
        target = place / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as written:
            shutil.copyfileobj(opened, written, _CHUNK)


def archived(archive: Path) -> Entries:
    """The files of a package that is one file, by the paths that they have once installed.

    Raises:
        DataDamaged: it is no package of these kinds.
        DataMissing: there is no such file, or no tool to open it.
    """
    if not archive.is_file():
        raise DataMissing(f"{archive}: there is no such file; nothing was changed")
    name = archive.name.lower()
    if name.endswith((".whl", ".zip")):
        yield from _zipped(archive)
    elif name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        with tarfile.open(archive) as opened:
            yield from _tarred(opened, strip=1)
    elif name.endswith(".deb"):
        yield from _debian(archive)
    else:
        raise DataDamaged(f"{archive}: neither a wheel (.whl), an sdist (.tar.gz) nor a .deb; nothing was unpacked")


def _zipped(archive: Path) -> Entries:
    with zipfile.ZipFile(archive) as opened:
        for each in opened.infolist():
            if not each.is_dir():
                with opened.open(each) as file:
                    yield each.filename, file


def _tarred(opened: tarfile.TarFile, strip: int) -> Entries:
    for each in opened:
        file = opened.extractfile(each) if each.isreg() else None
        if file is not None:
            yield "/".join(PurePosixPath(each.name).parts[strip:]), file


def _debian(archive: Path) -> Entries:
    """dpkg-deb knows every compression that a ``.deb`` of this machine's distribution may have."""
    if shutil.which("dpkg-deb") is None:
        raise DataMissing(
            f"{archive}: this machine has no dpkg-deb, which opens it; nothing was unpacked. Install dpkg"
        )
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as opened:
                yield from _tarred(opened, strip=0)
        finally:
            process.stdout.close() if process.stdout else None
    if process.returncode:
        raise tarfile.ReadError("dpkg-deb cannot read it")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by its path in it, sorted."""
    paths = sorted((str(path.relative_to(folder)), path) for path in folder.rglob("*") if path.is_file())
    return {name: _digest(path.open("rb")) for name, path in paths}


def summary(found: Mapping[str, str]) -> str:
    """The SHA-256 that stands in the catalog: of what ``sha256sum`` writes about all files, sorted by path."""
    return hashlib.sha256(listing(found).encode()).hexdigest()


def listing(found: Mapping[str, str]) -> str:
    """``sha256sum``'s format."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))


def _digest(opened: IO[bytes]) -> str:
    with opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type] # an open file is what it takes
