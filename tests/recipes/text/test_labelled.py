from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from headwater.errors import DataError
from headwater_recipes.text import labelled
from headwater_recipes.text.labelled import Columns, Row

NAMED = Columns()


def _rows(count: int, classes: int = 2) -> list[Row]:
    return [Row(f"text {i}", f"class {i % classes}") for i in range(count)]


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'label,text,group\nfor,"good, and long",1\nagainst,bad,\n'),
        ("a.tsv", "text\tlabel\tgroup\ngood, and long\tfor\t1\nbad\tagainst\t\n"),
        ("a.jsonl", '{"text": "good, and long", "label": "for", "group": 1}\n\n{"text": "bad", "label": "against"}\n'),
    ],
)
def test_a_row_has_a_text_and_a_label(tmp_path: Path, name: str, text: str) -> None:
    found = labelled.read(_write(tmp_path / name, text), NAMED)
    assert found == [Row("good, and long", "for", "1"), Row("bad", "against")]


def test_columns_have_the_names_that_were_given(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", "sentence,mood\nwell,7\n")
    assert labelled.read(path, Columns("sentence", "mood")) == [Row("well", "7")]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "words,label\nx,1\n", "no column 'text'; the first line names 'words', 'label'"),
        ("a.csv", "words,mark\nx,1\n", "no column 'text' and no column 'label'"),
        ("a.csv", "text,label\nx\n", "a.csv:2: 'label' is missing"),
        ("a.csv", "text,label\nx,1,2\n", "a.csv:2: more fields"),
        ("a.csv", 'text,label\n"x" y,1\n', "a.csv:2:"),
        ("a.csv", 'text,"label\nx,1\ny,2\n', "a.csv:1: unexpected end of data"),
        ("a.csv", 'text,label\nx,1\n"y,2\nz,1\n', "a.csv:3: unexpected end of data"),
        ("a.csv", "text,text,label\nx,y,1\n", "two columns are called 'text'"),
        ("a.csv", "label,text,label\n0,y,1\n", "two columns are called 'label'"),
        ("a.jsonl", '{"x":' + "[" * 100_000, "a.jsonl:1: no JSON object"),
        ("a.csv", 'text,label\n"x,1\n', "a.csv:2: unexpected end of data"),
        ("a.csv", "text,label\n ,1\n", "a.csv:2: 'text' is empty"),
        ("a.csv", "text,label\n", "no row in it"),
        ("a.csv", " \n", "the file is empty"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "a.jsonl:2: no JSON object"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: no JSON object"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "a.jsonl:1: 'label' is empty or no label"),
        ("a.jsonl", '{"text": ["x"], "label": 1}\n', "a.jsonl:1: 'text' is empty or no text"),
        ("a.txt", "x\n", "texts with labels are in a .csv, .tsv, .jsonl file"),
    ],
)
def test_what_is_no_row_is_told_by_its_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(DataError, match="Nothing was started") as caught:
        labelled.read(_write(tmp_path / name, text), NAMED)
    assert says in str(caught.value)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        labelled.read(tmp_path / "none.csv", NAMED)
    (tmp_path / "b.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        labelled.read(tmp_path / "b.csv", NAMED)


def test_a_folder_gives_its_own_split(tmp_path: Path) -> None:
    _write(tmp_path / "train.csv", "text,label\na,1\nb,0\n")
    with pytest.raises(DataError, match=r"no file test.\* or validation"):
        labelled.from_paths([tmp_path], NAMED)
    _write(tmp_path / "validation.jsonl", '{"text": "c", "label": 1}\n')
    training, held_out = labelled.from_paths([tmp_path], NAMED)
    assert (training, held_out) == ([Row("a", "1"), Row("b", "0")], [Row("c", "1")])
    found = labelled.settle(training, held_out, "here")
    assert (found.training, found.held_out, found.names) == (tuple(training), tuple(held_out), ("0", "1"))
    with pytest.raises(DataError, match="labels that no training row has: '7'"):
        labelled.settle(training, [Row("c", "7")], "here")


def test_no_text_is_on_both_sides_and_none_is_there_twice() -> None:
    rows = [Row("So good!", "1"), Row("so   GOOD", "1"), Row("Bad.", "0"), Row("bad", "1"), Row("Dull", "0")]
    rows += [Row(f"text {i}", str(i % 2)) for i in range(9)]
    held = [Row("so good", "1"), Row("dull?", "0"), Row("dull", "0")]
    found = labelled.settle(rows, held, "here")
    assert [row.text for row in found.held_out] == ["so good", "dull?"]
    assert [row.text for row in found.training] == [f"text {i}" for i in range(9)]
    assert found.notes[0] == "6 rows left out whose text stands elsewhere too, 1 of the texts with two labels"


def test_one_in_ten_of_every_class_is_held_out_whatever_the_order() -> None:
    rows = [*_rows(200), *(Row(f"rare {i}", "rare") for i in range(3)), Row("alone", "alone")]
    found = labelled.settle(rows, [], "here")
    counts = {name: [row.label for row in found.held_out].count(name) for name in found.names}
    assert counts == {"class 0": 10, "class 1": 10, "rare": 1, "alone": 0}
    assert found.notes == ("nothing is held out of the classes alone",)
    random.Random(0).shuffle(rows)
    again = labelled.settle(rows, [], "here")
    assert set(again.held_out) == set(found.held_out)


def test_a_group_is_never_parted() -> None:
    rows = [row._replace(group=str(i // 7)) for i, row in enumerate(_rows(300))]
    training, held_out = labelled.split(rows)
    assert held_out
    assert not {row.group for row in training} & {row.group for row in held_out}
    assert len(training) + len(held_out) == 300


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([Row("a", "1"), Row("b", "1")], "one class only, '1'"),
        ([Row("a", "1"), Row("a", "0")], "no row is left"),
        ([Row(f"text {i}", f"{i / 7}") for i in range(40)], "40 different labels in 40 rows"),
        ([Row("a", "1"), Row("b", "0")], "too few to hold some out"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(rows: list[Row], says: str) -> None:
    with pytest.raises(DataError, match="Nothing was started") as caught:
        labelled.settle(rows, [], "here")
    assert says in str(caught.value)


def test_classes_that_are_numbers_are_in_their_order() -> None:
    rows = [Row(f"text {i}", str(i % 11)) for i in range(99)]
    assert labelled.settle(rows, [], "here").names == tuple(map(str, range(11)))


def test_texts_that_share_rare_words_are_of_one_subject() -> None:
    common = "the film is good and long "
    texts = [
        common + "kissing jessica",
        common + "of jessica when kissing",
        common + "jessica alone",
        common + "serving sara kissing",
        "nothing",
    ]
    texts += [common] * 9
    found = labelled.same_subject(texts)
    assert found[0] == found[1]
    assert len(set(found[:5])) == 4
    assert len(set(found)) == len(texts) - 1
    # A word of many texts tells nothing.
    assert len(set(labelled.same_subject(["kissing jessica"] * 9))) == 9


def test_letters_of_other_scripts_are_counted() -> None:
    assert labelled.other_scripts([Row("Straße 12, œuvre", "")]) == 0
    assert labelled.other_scripts([Row("да да", ""), Row("yes", "")]) == pytest.approx(4 / 7)
    assert labelled.other_scripts([Row("12", "")]) == 0


def test_a_name_needs_the_library_that_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        labelled.from_hub("nobody/nothing", NAMED)


def test_a_folder_in_the_form_of_datasets_is_read_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "data"
    place.mkdir()
    _write(place / "train.csv", "text,label\na,1\nb,0\n")
    _write(place / "test.csv", "text,label\nc,1\n")
    assert labelled.from_hub(str(place), NAMED) == ([Row("a", "1"), Row("b", "0")], [Row("c", "1")])
    with pytest.raises(DataError, match="has no column 'mood', but text, label"):
        labelled.from_hub(str(place), Columns("text", "mood"))


class _Table:
    """Of ``datasets`` what is asked for."""

    def __init__(self, labels: list[int]) -> None:
        self.columns = {"text": [f"text {i}" for i in range(len(labels))], "label": labels}
        self.column_names = list(self.columns)
        self.features = {"label": type("ClassLabel", (), {"names": ["no", "yes"]})}

    def __getitem__(self, name: str) -> list[object]:
        return list(self.columns[name])


def test_labels_of_the_hub_are_classes_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"train": _Table([0, 1]), "test": _Table([-1, -1]), "validation": _Table([1])}
    library = type("datasets", (), {"load_dataset": staticmethod(lambda path, configuration: found)})
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    training, held_out = labelled.from_hub("owner/name:one", NAMED)
    assert [row.label for row in training] == ["no", "yes"]
    assert held_out == [Row("text 0", "yes")]  # the part without labels is not taken
    found["train"] = _Table([0, 2])
    with pytest.raises(DataError, match="train 1: the label 2 is none of its 2 classes"):
        labelled.from_hub("owner/name", NAMED)
