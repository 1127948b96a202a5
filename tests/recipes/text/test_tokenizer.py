from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from headwater.errors import DataError
from headwater_recipes.text import tokenizer
from headwater_recipes.text.corpus import Corpus, Document


def test_any_text_comes_back_from_its_tokens() -> None:
    documents = (Document("a", "def f(x):\n        return x  # naïve 日本\r\n\t\0"), Document("b", " leading\n\n"))
    made: Any = tokenizer.train(Corpus(documents, documents), 300)
    ids = tokenizer.encode(made, documents)
    assert ids.dtype == np.uint16
    assert made.decode(ids.tolist(), skip_special_tokens=True) == documents[0].text + documents[1].text
    assert (ids == 0).sum() == 2


def test_token_lengths_add_up_to_the_texts_bytes() -> None:
    documents = (Document("a", "grüße an alle " * 30),)
    made = tokenizer.train(Corpus(documents, documents), 300)
    ids = tokenizer.encode(made, documents)
    assert tokenizer.byte_lengths(made)[ids].sum() == len(documents[0].text.encode())


def test_a_large_corpus_is_sampled_from_every_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "SAMPLE", 100)
    documents = [Document("a", "x" * 300), Document("b", "y" * 100)]
    assert [len(part) for part in tokenizer._sample(documents)] == [76, 26]


def test_transformers_loads_the_runs_tokenizer(run: Path) -> None:
    loaded: Any = AutoTokenizer.from_pretrained(run)  # type: ignore[no-untyped-call,unused-ignore]
    assert loaded.eos_token == tokenizer.END
    assert loaded.decode(loaded("alpha beta")["input_ids"]) == "alpha beta"


def test_arrays_are_mapped_and_a_missing_one_is_named(run: Path) -> None:
    arrays = tokenizer.load_arrays(run)
    assert isinstance(arrays.training, np.memmap)
    assert 256 < len(arrays.lengths) <= 300
    (run / "tokens" / "validation.npy").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"validation\.npy"):
        tokenizer.load_arrays(run)
