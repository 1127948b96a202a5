"""Whole runs: sentences that a few rules translate, and verses."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import InferenceClient
from rich.console import Console
from safetensors.torch import load_file

import headwater
from headwater.errors import BadInput, DataError
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.tasks import TaskModel
from headwater_recipes.common import job, schedule
from headwater_recipes.common.trainer import Trainer
from headwater_recipes.translation import decode, report
from headwater_recipes.translation.serving import ServedTranslator
from headwater_recipes.translation.settings import RECIPE, TranslationSettings
from headwater_recipes.translation.verses import Pair
from tests.gateway.http_fakes import PATIENCE, running
from tests.gateway.task_fakes import post
from tests.recipes.runs import SAID, train

NOUNS = {"house": "casa", "table": "mesa", "star": "estrella", "girl": "niña", "door": "puerta", "moon": "luna"}
KINDS = {"white": "blanca", "small": "pequeña", "old": "vieja", "red": "roja", "new": "nueva"}
VERBS = {"falls": "cae", "sleeps": "duerme", "is here": "está aquí", "sings": "canta"}
TINY: dict[str, Any] = {
    "vocabulary": 400,
    "seq": 24,
    "batch": 8,
    "warmup": 6,
    "log_every": 2,
    "save_every": 100,
    "validate_every": 100,
    "precision": "float32",
}


def _sentences(place: Path) -> Path:
    """The adjective comes behind the noun: word by word is not enough."""
    made = [
        (f"The {kind} {noun} {verb}.", f"La {NOUNS[noun]} {KINDS[kind]} {VERBS[verb]}.")
        for noun, kind, verb in itertools.product(NOUNS, KINDS, VERBS)
    ]
    path = place / "pairs.tsv"
    path.write_text("\n".join(["en\tes", *map("\t".join, made)]), encoding="utf-8")
    return path


def _prepare(path: Path, run: Path, **changes: Any) -> Path:
    settings = TranslationSettings.of({"data": (str(path),), **TINY, **changes})
    return job.prepare(RECIPE, settings, run, Console(quiet=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("translation")
    settings = TranslationSettings.of({"data": (str(_sentences(place)),), **TINY, "steps": 60, "publish_every": 30})
    return train(RECIPE, settings, place / "run")


def test_two_workers_and_two_servers_learn_to_translate(trained: Path) -> None:
    found = json.loads((trained / "report.json").read_text(encoding="utf-8"))
    assert found["bleu"] > 70
    baselines = found["baseline"]
    assert baselines["copying"]["bleu"] < baselines["word_by_word"]["bleu"] < found["bleu"] - 20
    assert found["chrf"] > baselines["word_by_word"]["chrf"] > baselines["copying"]["chrf"]
    assert "|tok:13a|" in found["signatures"][0]
    assert found["held_out_pairs"] == found["translated_pairs"] == 6
    text = (trained / SAID).read_text(encoding="utf-8")
    assert "AutoModelForSeq2SeqLM gives the same logits" in text
    assert "Traceback" not in text
    for picture in (*report.PICTURES, "loss.png"):
        assert (trained / picture).read_bytes().startswith(b"\x89PNG")
    assert len((trained / "translations.txt").read_text(encoding="utf-8").split("\n\n")) == 6
    rows = [json.loads(line) for line in (trained / "translations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (
        found["bleu"]
        == report.score([r["output"] for r in rows], [Pair(r["source"], r["target"]) for r in rows])["bleu"]
    )


def test_the_ecosystem_loads_it_and_says_the_same(trained: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, words = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    rows = [json.loads(line) for line in (trained / "translations.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[:3]:
        ids = model.generate(**words([row["source"]], return_tensors="pt"), max_new_tokens=30, num_beams=decode.BEAMS)
        assert words.batch_decode(ids, skip_special_tokens=True)[0].strip() == row["output"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_it_is_asked_as_the_api_of_hugging_face(trained: Path) -> None:
    model, served = ServedTranslator.read(trained)
    wanted = "La casa blanca duerme."
    with running(TaskModel(Live(model, Still("run", 60), retry=0.01), served)) as server:
        client = InferenceClient(model=server.url, timeout=PATIENCE)
        assert client.translation("The white house sleeps.").translation_text == wanted
        named = client.translation("The white house sleeps.", src_lang="en", tgt_lang="es")
        assert named.translation_text == wanted
        assert post(server, {"inputs": "The white house sleeps."}).said == [{"translation_text": wanted}]
        several = post(server, {"inputs": ["The white house sleeps."] * 2})
        assert several.said == [{"translation_text": wanted}] * 2
        beams = {"inputs": "The white house sleeps.", "parameters": {"generate_parameters": {"num_beams": 4}}}
        assert post(server, beams).said == [{"translation_text": wanted}]
        for parameters, said in (
            ({"tgt_lang": "de"}, "'tgt_lang' is \"de\"; this model translates from en into es"),
            ({"top_k": 1}, "there is no parameter 'top_k' here"),
            ({"generate_parameters": {"num_beams": 99}}, "'num_beams' is 99; it must be a whole number from 1 to 8"),
            ({"generate_parameters": {"do_sample": True}}, "there is no parameter 'do_sample' here"),
            ({"generate_parameters": 1}, "must be an object"),
        ):
            answer = post(server, {"inputs": "The house.", "parameters": parameters})
            assert (answer.status, said in answer.said["error"]) == (400, True), answer.said


def test_long_texts_and_other_scripts(trained: Path) -> None:
    model, served = ServedTranslator.read(trained)
    text = " ".join(["The white house sleeps."] * 12)
    said = served.answer(model, served.inputs(text.encode(), "text/plain"), {})
    assert said["translation_text"].count("La casa blanca duerme.") == 12
    cut = decode.pieces(served._tokenizer, "white " * 100, 24, whole=True)
    assert " ".join(cut) == " ".join(["white"] * 100)
    assert all(len(served._tokenizer(piece)["input_ids"]) <= 24 for piece in cut)
    script = decode.pieces(served._tokenizer, "白い家が眠る" * 20, 24, whole=True)  # no space in it
    assert "".join(script) == "白い家が眠る" * 20
    assert all(len(served._tokenizer(piece)["input_ids"]) <= 24 for piece in script)
    with pytest.raises(BadInput, match="this server translates 200 at once") as caught:
        served.inputs(text.encode() * 20, "text/plain")
    assert caught.value.status == 413
    with pytest.raises(BadInput, match=r"the text is in CYRILLIC letters, and this model reads LATIN \(en\)"):
        served.inputs("Белый дом спит.".encode(), "text/plain")
    assert served.inputs("The house of Иван".encode(), "text/plain")
    assert served.inputs(b"1984", "text/plain")


def _train(run: Path, stop: bool = False) -> None:
    with headwater.connect("inproc://", rank=0, world=1, servers=2) as ps:
        worker = Trainer(RECIPE, run, ps)
        worker.stopping = stop
        worker.run()
        worker.optimizer.close()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = _sentences(tmp_path)
    whole, parts = (_prepare(path, tmp_path / name, workers=1, steps=4) for name in ("whole", "parts"))
    _train(whole)
    _train(parts, stop=True)
    (parts / schedule.NAME).unlink()
    _train(parts)
    expected, found = (load_file(run / "model.safetensors") for run in (whole, parts))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    tables = [name for name in expected if "shared" in name or "embed_tokens" in name or "lm_head" in name]
    assert tables == ["model.shared.weight"]  # tied


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_it_goes_on_from_a_model_of_the_ecosystem(trained: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

    words = AutoTokenizer.from_pretrained(trained)
    base = AutoModelForSeq2SeqLM.from_pretrained(trained)
    if kind == "t5":
        config = T5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        base = T5ForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    run = _prepare(_sentences(tmp_path), tmp_path / "run", workers=1, steps=1, model=str(tmp_path / "base"))
    before, first = (load_file(each / "model.safetensors") for each in (tmp_path / "base", run))
    assert [name for name in before if not torch.equal(before[name], first[name])] == []
    _train(run)
    after = load_file(run / "model.safetensors")
    assert [name for name in first if not torch.equal(after[name], first[name])]
    model, served = ServedTranslator.read(run)
    assert "translation_text" in served.answer(model, "The house.", {})
    with pytest.raises(DataError, match="not there: no such folder"):
        _prepare(_sentences(tmp_path), tmp_path / "none", model=str(tmp_path / "nowhere"))


def test_the_headline_can_be_said() -> None:
    out = io.StringIO()
    metrics = RECIPE.load().metrics({"loss": 30.0, "count": 10, "right": 4})
    print(RECIPE.wording.headline.format(**metrics), file=out)
    assert metrics == {"loss": 3.0, "token_accuracy": 0.4}
    assert out.getvalue() == "40.0% of tokens\n"
