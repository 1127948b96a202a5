"""What the recipe reads: verses, files, data sets in the form of WMT, and what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headwater.errors import DataError, UsageError
from headwater_recipes.common import job
from headwater_recipes.data import cache
from headwater_recipes.data.errors import DataDamaged, DataMissing
from headwater_recipes.translation import clauses, dictionary, pairs, verses
from headwater_recipes.translation.settings import RECIPE, TranslationSettings
from headwater_recipes.translation.verses import Pair, Verse
from tests.recipes.data import need


def _settings(**changes: Any) -> TranslationSettings:
    return TranslationSettings.of(changes)


def _folder(place: Path, **files: str) -> Path:
    place.mkdir(exist_ok=True)
    for name, text in files.items():
        (place / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return place


def _read(path: Path, **changes: Any) -> pairs.Parallel:
    return pairs.read(_settings(data=(str(path),), **changes))


# ---- verses ----------------------------------------------------------------------------------------


def test_notes_and_marks_leave_whole_words() -> None:
    raw = (
        '<title type="psalm">A Psalm.</title><w lemma="strong:H0430">God</w><note place="foot">Elohim: '
        '<w lemma="strong:H0001">x</w></note><w lemma="strong:H1254">created</w><note>a</note>, '
        '<lb/><l sID="a"/>heaven<l eID="a"/><l sID="b"/>and <q marker=""/>earth<q/> .'
    )
    assert verses.plain(raw) == "God created, heaven and earth."


def test_verses_that_do_not_belong_together_are_left_out() -> None:
    def verse(text: str, *strong: str) -> Verse:
        return Verse(text, frozenset(strong))

    ours = {
        ("A", 1, 1): verse("the beginning", "H1", "H2", "H3"),
        ("A", 1, 2): verse("the middle", "H4", "H5", "H6"),
        ("A", 1, 3): verse("the end", "H7"),
        ("A", 2, 1): verse("alone"),
        ("B", 1, 1): verse("longer than the other"),
        ("C", 1, 1): verse("only here"),
    }
    theirs = {
        ("A", 1, 1): verse("el principio", "H1", "H2"),
        ("A", 1, 2): verse("otra cosa", "H7", "H8", "H9"),
        ("A", 1, 3): verse("el fin", "H7"),
        ("A", 2, 1): verse("uno"),
        ("A", 2, 2): verse("dos"),
        ("B", 1, 1): verse("breve"),
    }
    found = verses.align(ours, theirs)
    assert list(found.pairs) == [("A", 1, 1), ("A", 1, 3)]
    assert found.pairs["A", 1, 3] == Pair("the end", "el fin")
    assert [note.split()[0] for note in found.notes] == ["1", "1", "1"]


def test_whole_books_are_held_out_and_verses_are_of_one_place() -> None:
    for name in verses.MODULES.values():
        need(name)
    found = verses.aligned("en", "es").pairs
    assert 28_500 < len(found) < 30_000
    assert found["Genesis", 1, 1].source == "In the beginning, God created the heavens and the earth."
    assert found["Genesis", 1, 1].target == "EN el principio crió Dios los cielos y la tierra."

    assert not [pair for pair in found.values() if "<" in pair.source + pair.target]
    assert not {book for book, *_ in found} & {"Tobit", "Judith", "Sirach"}
    assert ("Numbers", 12, 1) not in found  # 16 verses here, 15 there
    corpus = pairs.read(_settings())
    assert not {*corpus.training} & {*corpus.held_out}
    acts, daniel = found["Acts", 2, 1], found["Daniel", 1, 1]
    assert [acts in part for part in corpus[:3]] == [False, False, True]
    assert [daniel in part for part in corpus[:3]] == [False, True, False]
    back = pairs.read(_settings(source="es", target="en"))
    assert back.held_out[0] == Pair(*reversed(corpus.held_out[0]))


def test_a_bible_that_is_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {name: need(name) for name in verses.MODULES.values()}
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    with pytest.raises(DataMissing, match="headwater data get bible-english"):
        pairs.read(_settings())
    for name, place in here.items():
        shutil.copytree(place, cache.place_of(name))
    text = next(cache.place_of("bible-spanish").rglob("nt.bzz"))
    text.write_bytes(text.read_bytes()[:-9])
    with pytest.raises(DataDamaged, match="headwater data get bible-spanish"):
        pairs.read(_settings())
    text.write_bytes(b"")
    for path in cache.place_of("bible-spanish").rglob("ot.*"):
        path.unlink()
    with pytest.raises(DataError, match="it is damaged"):
        verses.read(cache.place_of("bible-spanish"))
    next(cache.place_of("bible-spanish").rglob("*.conf")).write_text("[x]\n", encoding="utf-8")
    with pytest.raises(DataError, match="no SWORD Bible that can be read"):
        verses.read(tmp_path / "data" / ".." / "data" / "bible-spanish")


# ---- one's own -------------------------------------------------------------------------------------


def test_a_folder_of_two_languages(tmp_path: Path) -> None:
    ours = "".join(f"text {i}\n" for i in range(50))
    theirs = ours.replace("text", "texto")
    place = _folder(tmp_path / "a", train_en=ours + "\n", train_es=theirs + "empty\n", test_en="x\r\n", test_es="y\r\n")
    found = _read(place)
    assert found.held_out == (Pair("x", "y"),)
    assert len(found.training) + len(found.validation) == 50
    assert len(found.validation) == 2
    assert found.notes == ("1 pairs skipped of which a text is empty",)
    assert all(pair.target == pair.source.replace("text", "texto") for pair in found.training)


def test_what_is_held_out_is_nowhere_else(tmp_path: Path) -> None:
    lines = [f"text {i}\ttexto {i}" for i in range(100)]
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["en\tes", *lines, *lines, ""]), encoding="utf-8")
    found = _read(path)
    parts = [set(part) for part in found[:3]]
    assert [len(part) for part in parts] == [91, 4, 5]
    assert len(set.union(*parts)) == 100
    assert found.notes == ("100 left out that stand elsewhere too",)
    path.write_text("\n".join(["en\tes", *reversed(lines)]), encoding="utf-8")
    assert set(_read(path).held_out) == parts[2]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train_en": "a\nb\n", "train_es": "a\n"}, "has 2 lines and train.es 1"),
        ({"train_en": "a\n"}, "train.es beside it is not: one language is missing"),
        ({"train_de": "a\n", "train_es": "a\n"}, "train.en beside it is not"),
        ({"train_de": "a\n"}, "no train.en and train.es"),
        ({"train_en": "a\n\n", "train_es": "\nb\n"}, "0 pairs of two texts, too few"),
        ({"train_en": "a\nb\n", "train_es": "a\nb\n"}, "2 pairs of two texts, too few"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        _read(_folder(tmp_path / "a", **files))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("en\tde\na\tb\n", "no column 'es'; the first line names 'en', 'de'"),
        ("Hello\tHola\n", "no column 'en' and no column 'es'"),
        ("en\tes\na\tb\nc\n", r"a\.tsv:3: 1 columns, and the first line names 2"),
        ("en\tes\na\tb\tc\n", r"a\.tsv:2: 3 columns"),
        ("", "empty"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        _read(path)


class _Table:
    """Of ``datasets`` what is asked for."""

    def __init__(self, rows: list[Any], column: str = "translation") -> None:
        self.column_names = [column]
        self._rows = rows

    def __getitem__(self, column: str) -> list[Any]:
        return self._rows


def test_a_data_set_in_the_form_of_wmt(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"en": f"text {i}", "es": f"texto {i}"} for i in range(40)]
    found: dict[str, Any] = {
        "train": _Table(rows),
        "validation": _Table(rows[:3]),
        "test": _Table([{"en": "a", "es": "b"}]),
    }
    asked: list[Any] = []
    library = type("datasets", (), {"load_dataset": staticmethod(lambda *given: asked.append(given) or found)})
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    corpus = pairs.read(_settings(data=("wmt/some:es-en",)))
    assert asked == [("wmt/some", "es-en")]
    assert (len(corpus.training), len(corpus.validation), corpus.held_out) == (37, 3, (Pair("a", "b"),))
    with pytest.raises(DataError, match="no language 'de' in it, but en, es"):
        pairs.read(_settings(data=("wmt/some",), target="de"))
    found["train"] = _Table(rows, "text")
    with pytest.raises(DataError, match="no column 'translation' as in WMT's data sets, but text"):
        pairs.read(_settings(data=("wmt/some",)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        pairs.read(_settings(data=("wmt/some",)))


def test_nothing_is_made_of_what_cannot_be_used(tmp_path: Path) -> None:
    few = _folder(tmp_path / "a", train_en="a b\nc d\ne f\ng h\n", train_es="a b\nc d\ne f\ng h\n")
    digits = "".join(f"{i**9} {i**8}\n" for i in range(100, 140))
    long = _folder(tmp_path / "b", train_en=digits, train_es=digits)
    run = tmp_path / "run"
    for changes, said in (
        ({"data": (str(few),), "workers": 3}, "2 pairs to train on, fewer than the 3 workers"),
        ({"data": (str(long),), "seq": 4, "vocabulary": 300}, "all but 0 of the 37 pairs .* have more than 4 tokens"),
    ):
        with pytest.raises(DataError, match=said):
            job.prepare(RECIPE, _settings(**changes), run, Console(quiet=True))
    assert not run.exists()
    for given, said in (
        ({"source": "es"}, "--source and --target are both 'es'"),
        ({"target": "sv"}, "the verses are in en .English. and es .Spanish."),
        ({"smoothing": 1.0}, "--smoothing 1"),
        ({"data": ("a", "b")}, "--data was given 2 times"),
    ):
        with pytest.raises(UsageError, match=said):
            _settings(**given).check()


# ---- the dictionary --------------------------------------------------------------------------------


def test_model_1_finds_which_words_go_together() -> None:
    """The example of Koehn's Statistical Machine Translation, figure 4.4: no word always has the same company."""
    known = dictionary.learn([Pair("the house", "das Haus"), Pair("the book", "das Buch"), Pair("a book", "ein Buch")])
    assert known == {"the": "das", "house": "Haus", "book": "Buch", "a": "ein"}
    assert dictionary.translate("the book, Ruth!", known) == "das Buch, Ruth!"


def test_clauses_are_paired_where_both_texts_have_as_many() -> None:
    verse = Pair("God said, “Let there be light;” and it was so.", "Y dijo Dios: Sea la luz; y fué así.")
    assert list(clauses.paired([verse])) == [
        Pair("God said,", "Y dijo Dios:"),
        Pair("“Let there be light;”", "Sea la luz;"),
        Pair("and it was so.", "y fué así."),
    ]
    assert " ".join(clauses.split(verse.source)) == verse.source
    commas = Pair("He, she, and they came here. All went.", "Vinieron aquí todos. Todos se fueron.")
    assert list(clauses.paired([commas])) == [
        Pair("He, she, and they came here.", "Vinieron aquí todos."), Pair("All went.", "Todos se fueron.")
    ]  # fmt: skip
    other = [
        Pair("One, two.", "Uno dos."),
        Pair("Yes, he will come back again to this house.", "El vendrá otra vez á esta casa, sí."),
    ]
    assert list(clauses.paired(other)) == other


def test_scripts_are_named_as_unicode_does() -> None:
    assert pairs.scripts(["Hello, 123", "слово"]) == ["CYRILLIC", "LATIN"]
    assert pairs.scripts(["a" * 1000 + "б"]) == ["LATIN"]
