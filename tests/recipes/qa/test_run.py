"""Whole runs through servers: spans of real passages, yes and no of made ones; what answers, and who loads it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import InferenceClient
from rich.console import Console

from headwater.errors import BadInput, DataError
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.tasks import TaskModel
from headwater_recipes.common import job, plain
from headwater_recipes.qa import data, spans
from headwater_recipes.qa.serving import ServedAnswers
from headwater_recipes.qa.settings import RECIPE, QaSettings
from headwater_recipes.qa.task import QuestionAnswering, Spans
from tests.gateway.http_fakes import PATIENCE, running
from tests.recipes.data import need
from tests.recipes.runs import SAID, train


def _titles(path: Path, count: int) -> Path:
    """Of passages of an encyclopedia that begin with what they are about: what that is."""
    rows = [json.loads(line) for line in (need("boolq") / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["passage"].startswith(row["title"] + " ")][:count]
    lines = [
        json.dumps({"question": "what is it about", "passage": row["passage"], "answer": row["title"]})
        for row in chosen
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spans, by two workers and two servers."""
    need("minilm")
    folder = tmp_path_factory.mktemp("qa")
    settings = QaSettings(
        data=(str(_titles(folder / "titles.jsonl", 260)),), seq=40, batch=12, steps=24, warmup=4, lr=5e-4,
        log_every=10, publish_every=12,
    )  # fmt: skip
    return train(RECIPE, settings, folder / "run")


def test_spans_are_learnt_and_shown(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    beside = report["baseline"]["sliding_window"]
    assert report["f1"] > 0.6
    assert report["f1"] > beside["f1"] + 0.2
    assert 0 < report["exact_match"] <= report["f1"] <= 1
    assert report["largest_logit_difference_of_saved_model"] < 1e-4
    for picture in (*report["pictures"], "loss.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    said = (run / SAID).read_text(encoding="utf-8")
    assert "answers: spans" in said
    assert "AutoModelForQuestionAnswering gives the same logits" in said
    assert "Traceback" not in said
    assert "Warning" not in said
    told = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert len(told) == report["held_out_questions"]
    assert sum(each["told"] == each["answer"] for each in told) / len(told) == pytest.approx(
        report["exact_match"], abs=0.1
    )


def test_it_answers_as_the_ecosystem_s_model_does(run: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    loaded, tokenizer = AutoModelForQuestionAnswering.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    question, passage = "what is it about", "Blue whale -- The blue whale is the largest animal that there is."
    pair = tokenizer(question, passage, return_tensors="pt", return_offsets_mapping=True)
    offsets = pair.pop("offset_mapping")[0].tolist()
    inside = torch.tensor([side == 1 for side in pair.sequence_ids(0)])
    with torch.no_grad():
        found = loaded(**pair)
    starts, ends = (each[0].softmax(0) * inside for each in (found.start_logits, found.end_logits))
    both = torch.triu(torch.outer(starts, ends)) - torch.triu(torch.outer(starts, ends), spans.LONGEST)
    first, last = divmod(int(both.argmax()), len(offsets))
    model, served = ServedAnswers.read(run)
    with running(TaskModel(Live(model, Still("run", 24), retry=0.01), served)) as server:
        heard: Any = InferenceClient(model=server.url, timeout=PATIENCE).question_answering(
            question=question, context=passage
        )
    assert (heard.start, heard.end) == (offsets[first][0], offsets[last][1])
    assert heard.answer == passage[heard.start : heard.end]
    assert heard.score == pytest.approx(float(both.max()), abs=1e-5)


def test_of_a_long_passage_every_window_is_looked_at(run: Path) -> None:
    model, served = ServedAnswers.read(run)
    passage = "Nothing stands here. " * 60 + "Blue whale -- The blue whale is an animal."
    question = {"question": "blue whale animal " * 40, "context": passage}
    told = served.answer(model, served.inputs(json.dumps(question).encode(), "application/json"), {})
    assert told["answer"] == passage[told["start"] : told["end"]]
    tokenizer = served._tokenizer
    found = spans.windows(tokenizer, [question["question"]], [passage], 40)
    seen = {
        at for each in found.encodings for at, side in zip(each.offsets, each.sequence_ids, strict=True) if side == 1
    }
    assert max(end for _, end in seen) == len(passage)
    assert all(len(each.ids) <= 40 for each in found.encodings)


def test_a_diverged_model_gives_no_answer(run: Path) -> None:
    model, served = ServedAnswers.read(run)
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.ndim == 1).fill_(torch.nan)
    asked = served.inputs(b'{"question": "Who?", "context": "It was Clara."}', "application/json")
    with pytest.raises(ValueError, match="its training has diverged"):
        served.answer(model, asked, {})


def test_what_is_no_question_is_refused(run: Path) -> None:
    model, served = ServedAnswers.read(run)
    with pytest.raises(BadInput, match="'context' is missing"):
        served.inputs(b'{"question": "Who?"}', "application/json")
    asked = served.inputs('{"question": "谁?", "context": "没有人知道。"}'.encode(), "application/json")
    assert served.answer(model, asked, {})["end"] <= 6
    with pytest.raises(BadInput, match="it is true or false"):
        served.answer(model, asked, {"handle_impossible_answer": 1})
    with pytest.raises(BadInput, match="no parameter 'top_k'"):
        served.answer(model, asked, {"top_k": 1})


def test_labels_are_the_tokens_of_the_answer_in_the_window_that_has_it(run: Path) -> None:
    _, served = ServedAnswers.read(run)
    tokenizer = served._tokenizer
    passage = "one two three four five six seven eight nine ten " * 8 + "the river froze in 1703 again"
    asked = [
        data.Question("when", passage, "1703", passage.index("1703"), passage.index("1703") + 4),
        data.Question("who", "nobody", ""),
    ]
    found = spans.encode(tokenizer, asked, 64)
    texts = [tokenizer.decode(_window(found, at)[first : last + 1]) for at, (first, last) in enumerate(found.labels)]
    assert [text.replace(" ", "") for text in texts if text != "[CLS]"] == ["1703"]
    assert texts[-1] == "[CLS]"  # a question without an answer
    assert len(texts) == 3


def _window(found: Any, at: int) -> Any:
    return found.ids[found.ends[at] - found.lengths[at] : found.ends[at]]


def test_yes_and_no_are_two_classes(tmp_path: Path) -> None:
    """What is asked about stands in the passage, or does not. One plain process comes to the same bits."""
    rows = [
        {"question": "есть ли снег", "passage": f"письмо {n // 2} {('снег', 'дождь')[n % 2]}", "answer": n % 2 == 0}
        for n in range(240)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    settings = QaSettings.of(
        {"data": (str(path),), "scratch": True, "seq": 32, "batch": 16, "steps": 100, "warmup": 4, "log_every": 50}
    )
    run = train(RECIPE, settings, tmp_path / "run")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["accuracy"] > 0.9
    assert report["accuracy"] > report["baseline"]["majority"]["accuracy"] + 0.2
    assert "tfidf_logistic_regression" in report["baseline"]
    model, served = ServedAnswers.read(run)
    for word, answer in (("снег", "yes"), ("дождь", "no")):
        asked = {"question": "есть ли снег", "context": f"письмо {word}"}
        told = served.answer(model, served.inputs(json.dumps(asked).encode(), "application/json"), {})
        assert (told["answer"], told["start"], told["end"]) == (answer, 0, len(asked["context"]))
        assert 0.5 <= told["score"] <= 1
    threads = torch.get_num_threads()
    try:
        alone = plain.in_one_process(QuestionAnswering, run, 1, None)
    finally:
        torch.set_num_threads(threads)
    assert alone["largest_difference"] == 0
    assert alone["figures"]["accuracy"] == report["accuracy"]


def test_text_in_another_script_is_refused_or_told(tmp_path: Path) -> None:
    need("minilm")
    out = io.StringIO()
    for name, letters in (("known", "день идёт снег"), ("unknown", "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ ᠨᠢ ᠮᠣᠩᠭᠣᠯ")):
        rows = [
            {"question": f"{letters} {n}", "passage": f"{letters} " * (n + 1), "answer": n % 2 == 0} for n in range(40)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        settings = QaSettings(data=(str(path),), seq=48)
        if name == "unknown":
            with pytest.raises(DataError, match="no word for most of these texts"):
                job.prepare(RECIPE, settings, tmp_path / name, Console(file=out, width=300))
            assert not (tmp_path / name).exists()
        else:
            job.prepare(RECIPE, settings, tmp_path / name, Console(file=out, width=300))
    assert "100% of the letters are not Latin, and MiniLM has learnt English" in out.getvalue()


def test_the_kind_follows_the_folder(run: Path, tmp_path: Path) -> None:
    assert isinstance(QuestionAnswering(QaSettings(), run), Spans)
    settings = QaSettings(data=(str(_titles(tmp_path / "few.jsonl", 12)),), workers=40)
    with pytest.raises(DataError, match="fewer than the 40 workers"):
        job.prepare(RECIPE, settings, tmp_path / "run", Console(quiet=True))
    (tmp_path / "one.jsonl").write_text(
        "\n".join(json.dumps({"question": f"q{n}", "passage": f"p {n}", "answer": True}) for n in range(30)), "utf-8"
    )
    with pytest.raises(DataError, match="all answers are 'yes'"):
        job.prepare(RECIPE, QaSettings(data=(str(tmp_path / "one.jsonl"),)), tmp_path / "run", Console(quiet=True))
