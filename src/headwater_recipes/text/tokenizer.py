"""A byte-level BPE, trained on the corpus, and the token arrays that the workers map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.text.corpus import Corpus, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tokens = npt.NDArray[np.uint16]

END = "<|endoftext|>"
"""Token 0: the end of each document, of no bytes."""

SAMPLE = 16_000_000
"""Characters of the training text that the merges are learnt from."""
_BATCH = 256


class Arrays(NamedTuple):
    """Token ids (uint16) of the training and validation text; bytes of each id, ``(vocabulary,)`` int64."""

    training: Tokens
    validation: Tokens
    lengths: npt.NDArray[np.int64]


def train(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Learn ``vocabulary`` tokens (fewer from a small corpus), the 256 bytes and ``END`` among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_sample(corpus.training), trainer)
    return cast(Any, PreTrainedTokenizerFast)(  # type: ignore[no-any-return]
        tokenizer_object=made, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def _sample(documents: Sequence[Document]) -> Iterator[str]:
    """Up to ``SAMPLE`` characters: of a larger corpus the same part of every document."""
    total = sum(len(document.text) for document in documents)
    for document in documents:
        yield document.text if total <= SAMPLE else document.text[: len(document.text) * SAMPLE // total + 1]


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Tokens:
    """All documents one after the other, ``END`` after each."""
    backend = cast(Any, tokenizer).backend_tokenizer
    parts: list[Tokens] = []
    for first in range(0, len(documents), _BATCH):
        texts = [document.text for document in documents[first : first + _BATCH]]
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        parts += [np.array([*encoded.ids, 0], np.uint16) for encoded in found]
    return np.concatenate(parts)


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int64]:
    """How many bytes of text each token stands for: in a byte-level vocabulary, one per character; ``END`` none."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    lengths = np.zeros(len(vocabulary), np.int64)
    for token, index in vocabulary.items():
        lengths[index] = 0 if token == END else len(token)
    return lengths


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, arrays: Arrays) -> None:
    """Into the run folder: what ``AutoTokenizer`` loads, and ``tokens/*.npy`` for the workers."""
    cast(Any, tokenizer).save_pretrained(folder)
    (folder / "tokens").mkdir(exist_ok=True)
    for name, array in arrays._asdict().items():
        np.save(folder / "tokens" / f"{name}.npy", array)


def load_arrays(folder: Path) -> Arrays:
    """Map the arrays of a run folder; the pages are shared by all processes.

    Raises:
        DataError: an array is missing or damaged.
    """
    found = []
    for name in Arrays._fields:
        path = folder / "tokens" / f"{name}.npy"
        try:
            found.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}. The run cannot go on without it; start a new one.") from error
    return Arrays(*found)


def load(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a run folder. Raises ``DataError`` if it cannot be read."""
    return cast("PreTrainedTokenizerFast", pretrained.load_tokenizer(str(folder)))
