"""Questions of all forms, what of them is refused, and where answers stand."""

from __future__ import annotations

import json
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headwater.errors import DataError
from headwater_recipes.qa import baselines, questions
from headwater_recipes.qa.questions import Question, locate, read
from tests.recipes.data import need


def _lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def _yes_no(count: int = 40) -> list[dict[str, Any]]:
    return [{"question": f"is it {n}", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(count)]


def test_boolq_is_judged_on_its_dev_part_and_no_passage_is_on_both_sides() -> None:
    need("boolq")
    found = read(["boolq"])
    assert not found.spans
    assert len(found.held_out) == 3270
    assert sum(each.answer == "yes" for each in found.held_out) == 2033
    assert len(found.training) == 7732
    assert found.notes == ("1,694 left out of training whose passage, or a version of it, is held out",)
    having: dict[str, set[int]] = {}  # compared again, each with each, for those who only seem to be apart
    runs = [_runs(each.passage) for each in found.training]
    for at, own in enumerate(runs):
        for run in own:
            having.setdefault(run, set()).add(at)
    alike = 0
    for own in (_runs(each.passage) for each in found.held_out):
        shared = Counter(at for run in own for at in having.get(run, ()))
        alike += any(2 * count >= min(len(own), len(runs[at])) for at, count in shared.items())
    assert alike == 0


def _runs(passage: str) -> set[str]:
    words = re.findall(r"\w+", passage.rpartition(" -- ")[2].casefold())
    return {" ".join(words[at : at + 12]) for at in range(max(1, len(words) - 11))}


def test_versions_of_a_text_are_one_passage() -> None:
    text = [f"word{n}" for n in range(60)]
    whole, begun = " ".join(text), " ".join([*text[:30], *(f"more{n}" for n in range(80))])
    edited, half = "It says: " + " ".join(text[10:]), " ".join([*text[30:], *(f"end{n}" for n in range(7))])
    other = " ".join([*text[45:], *(f"far{n}" for n in range(90))])
    found = questions.groups([whole, begun, edited, half, f"Title -- {whole}", other, "short", "short too"])
    assert found[begun] == found[whole] == found[edited] == found[half] == found[f"Title -- {whole}"]
    assert len({found[each] for each in (whole, other, "short", "short too")}) == 4


def test_versions_are_held_out_together_and_never_what_most_is_asked_of(tmp_path: Path) -> None:
    text = " ".join(f"word{n}" for n in range(40))
    rows = [
        {"question": f"is it {n}", "passage": f"{text} and {n}" if n % 2 else f"Number {n}", "answer": n % 4 == 0}
        for n in range(12)
    ]
    found = read([_lines(tmp_path / "a.jsonl", *rows)])
    assert len(found.training) == 11
    assert found.held_out[0].passage.startswith("Number")


def test_of_disflqa_answers_stand_in_their_passages_and_some_questions_have_none() -> None:
    need("disflqa")
    found = read(["disflqa"])
    assert found.spans
    both = [*found.training, *found.held_out]
    assert len(both) == 1000
    assert len(found.held_out) == 194
    assert sum(each.start < 0 for each in both) == 245
    assert all(each.passage[each.start : each.end] == each.answer for each in both if each.start >= 0)
    assert not {each.passage for each in found.training} & {each.passage for each in found.held_out}


def test_squad_s_own_form_and_the_order_of_a_file_does_not_matter(tmp_path: Path) -> None:
    paragraphs = [
        {
            "context": f"In {n} the river froze, and in {n + 1} again.",
            "qas": [
                {"question": "When first?", "answers": [{"text": str(n), "answer_start": 3}]},
                {"question": "When again?", "answers": [{"text": str(n + 1), "answer_start": 32}]},
                {"question": "Who?", "answers": [], "is_impossible": True},
            ],
        }
        for n in range(1500, 1560)
    ]
    found = []
    for order in (paragraphs, paragraphs[::-1]):
        (tmp_path / "train.json").write_text(json.dumps({"data": [{"paragraphs": order}]}), encoding="utf-8")
        found.append(read([str(tmp_path / "train.json")]))
    assert found[0].spans
    assert set(found[0].held_out) == set(found[1].held_out)
    assert 0 < len(found[0].held_out) < 60
    assert len(found[0].training) + len(found[0].held_out) == 180
    assert {each.start for each in found[0].training} == {3, 32, -1}
    assert all(each.passage[each.start : each.end] == each.answer for each in found[0].training if each.answer)


def test_a_folder_keeps_its_parts_and_loses_what_is_on_both_sides(tmp_path: Path) -> None:
    rows = _yes_no()
    _lines(tmp_path / "train.jsonl", *rows)
    _lines(tmp_path / "dev.jsonl", *rows[:5])
    found = read([str(tmp_path)])
    assert (len(found.training), len(found.held_out)) == (35, 5)
    assert found.notes == ("5 left out of training whose passage, or a version of it, is held out",)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{"], r"a\.jsonl:1: no JSON object"),
        (["[1]"], r"a\.jsonl:1: no JSON object"),
        ([{"question": "", "passage": "p", "answer": True}], r"a\.jsonl:1: 'question' is empty or no text"),
        ([{"question": "q", "passage": "  ", "answer": True}], "'passage' is empty or no text"),
        ([{"question": "q", "answer": True}], "'passage' is missing"),
        ([{"question": "q", "passage": "p", "answer": 2.5}], "'answer' is missing, empty or no text"),
        (
            [{"question": "q", "passage": "p", "answer": "word"}],
            "answers of 1 of 1 questions are not in their passages",
        ),
        (
            [*_yes_no(9), {"question": "q", "passage": "p", "answer": "p"}],
            r"answers of two kinds, at .*:1 true or false and at .*:10 neither",
        ),
        ([{"question": "q", "passage": "p", "answers": {"start": [0]}}], "'answer' is missing, empty or no text"),
        ([{"question": "q", "passage": "p", "answers": {"text": [], "answer_start": [1]}}], "'answer' is missing"),
        (
            [{"question": "q", "passage": "p", "answers": {"text": ["p"], "answer_start": 5}}],
            r"a\.jsonl:1: 'answer_start' is no list",
        ),
        (_yes_no(1), "1 questions to train on and 0 held out"),
        ([" "], "the file is empty"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_line(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read([_lines(tmp_path / "a.jsonl", *rows)])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (5, r"got `int` - at `\$.data`"),
        ([5], r"got `int` - at `\$.data\[0\]`"),
        ([{"paragraphs": []}, {"paragraphs": [5]}], r"got `int` - at `\$.data\[1\].paragraphs\[0\]`"),
        ([{"paragraphs": [{"context": "c", "qas": [5]}]}], r"at `\$.data\[0\].paragraphs\[0\].qas\[0\]`"),
        ([{"paragraphs": [{"context": None, "qas": []}]}], r"at `\$.data\[0\].paragraphs\[0\].context`"),
    ],
)
def test_an_entry_of_squad_s_that_cannot_be_is_named(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"a\.json: not in SQuAD's form: .*{said}"):
        read([_lines(tmp_path / "a.json", {"data": data})])


def test_other_files_are_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not in SQuAD's form: .*missing required field `data`"):
        read([_lines(tmp_path / "a.json", {"version": 2})])
    with pytest.raises(DataError, match=r"in a \.jsonl or \.json file"):
        read([_lines(tmp_path / "a.csv", "question,answer")])
    with pytest.raises(DataError, match="no such file"):
        read([str(tmp_path / "b.jsonl")])
    with pytest.raises(DataError, match=r"no file train\.\*"):
        read([str(tmp_path)])


def test_a_few_answers_that_are_not_in_their_passages_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": "When?", "passage": f"It froze in {n}.", "answer": str(n)} for n in range(1500, 1540)]
    found = read([_lines(tmp_path / "a.jsonl", *rows, {"question": "When?", "passage": "Never.", "answer": "1600"})])
    assert found.notes == ("1 questions left out whose answer is not in the passage",)
    assert len(found.training) + len(found.held_out) == 40


def test_a_name_of_the_library_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """``google/boolq`` and ``squad`` as the library gives them."""
    rows = {
        "google/boolq": [{**row, "passage": row["passage"] + " " * (n % 2)} for n, row in enumerate(_yes_no())],
        "squad": [
            {"question": "When?", "context": f"In {n}.", "answers": {"text": [str(n)], "answer_start": [3]}}
            for n in range(1500, 1540)
        ],
    }
    library = types.ModuleType("datasets")
    library.load_dataset = lambda path, _: {"train": rows[path][:30], "validation": rows[path][30:]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = [read([name]) for name in rows]
    assert [each.spans for each in found] == [False, True]
    assert [(len(each.training), len(each.held_out)) for each in found] == [(30, 10), (30, 10)]
    assert found[1].held_out[0] == Question("When?", "In 1530.", "1530", 3, 7)


@pytest.mark.parametrize(
    ("answer", "passage", "found"),
    [
        ("19.3%", "30 , 547 ( 19 . 3 % ) had", "19 . 3 %"),
        ("north", "The Northern one is north.", "north"),
        ("C++", "They wrote c++ then.", "c++"),
        ("era", "The opera.", "era"),  # inside a word, where it stands nowhere else
        ("absent", "Nothing.", None),
    ],
)
def test_an_answer_is_found_whatever_the_spaces_in_it(answer: str, passage: str, found: str | None) -> None:
    place = locate(answer, passage)
    assert (place and passage[slice(*place)]) == found


def test_of_several_right_answers_the_first_is_learnt_and_the_best_counts(tmp_path: Path) -> None:
    texts = ["the grey wolf", "wolf", "grey wolf", "fox"]
    answers = {"text": texts, "answer_start": [0, 9]}  # the library's form, its starts cut short
    rows = [{"question": "Who?", "passage": f"the grey wolf ran {n}", "answers": answers} for n in range(20)]
    found = read([_lines(tmp_path / "a.jsonl", *rows)]).held_out[0]
    assert (found.answer, found.start, found.end) == ("the grey wolf", 0, 13)
    assert found.others == ("wolf", "grey wolf")  # a fox is not in the passage
    assert baselines.squad(["wolf"], [found]) == {"exact_match": 1.0, "f1": 1.0}


def test_figures_in_quotes_are_words_of_a_passage(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "passage": f"{n % 2} of {n}", "answer": str(n % 2)} for n in range(20)]
    assert read([_lines(tmp_path / "a.jsonl", *rows)]).spans
    numbers = [{**row, "answer": int(row["answer"])} for row in rows]
    assert not read([_lines(tmp_path / "b.jsonl", *numbers)]).spans


def test_a_start_that_is_wrong_is_looked_for(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "passage": f"{n} an owl", "answers": [{"text": "owl", "answer_start": at}]}
        for n, at in enumerate((5, -3, 99, None, 1.5), start=10)
    ]
    found = read([_lines(tmp_path / "a.jsonl", *rows)])
    assert {(each.start, each.end) for each in (*found.training, *found.held_out)} == {(6, 9)}


def test_exact_match_and_f1_are_those_of_squad() -> None:
    asked = [Question("q", "the grey wolf", "grey wolf", 4, 13), Question("q", "In 1600.", "1600", 3, 7)]
    assert baselines.squad(["The Grey Wolf!", "1601"], asked) == {"exact_match": 0.5, "f1": 0.5}
    assert baselines.squad(["wolf", "1600"], asked)["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert baselines.squad([""], [Question("q", "p", "")]) == {"exact_match": 1.0, "f1": 1.0}


def test_the_sliding_window_finds_what_stands_beside_the_question_s_words() -> None:
    passage = "Clara painted the bridge in the autumn of 1703. Long before, others had mended a road in 1650."
    assert baselines.sliding_window("When was the bridge painted by Clara?", passage) == "1703"
    assert baselines.sliding_window("bridge", "bridge") == ""


def test_a_dash_in_a_passage_is_no_title() -> None:
    same = " ".join(f"word{n}" for n in range(40))
    other = " ".join(f"other{n}" for n in range(40))
    found = questions.groups([f"{same} -- he said so", f"{other} -- he said so", f"A title -- {same}"])
    assert found[f"{same} -- he said so"] == found[f"A title -- {same}"]
    assert found[f"{other} -- he said so"] != found[f"{same} -- he said so"]
