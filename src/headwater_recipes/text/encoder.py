"""An encoder of ``transformers`` with a head of classes on it: a pretrained one, or a small one from its first values.

Of a pretrained one the words' vectors stay as they are: of MiniLM these are half of the parameters, and a few thousand
texts have little to say about most words. What stays is marked in ``config.json``, so that who reads the folder knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.text import corpus, tokenizer

VOCABULARY = 4096
"""Tokens that a model from its first values learns."""

_SHORT = 512
"""Up to so many tokens plain attention is faster on a CPU than the fused kernel."""

_POOLER = r"(.*\.)?pooler\..*"
"""A head of its own that some encoders bring along, and that not all classifiers have."""


CLASSES, SPANS = "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"
"""Heads, by the class of ``transformers`` that loads them: one class of a text, or the two ends of a span of it."""


def from_pretrained(name: str, classes: Sequence[str], seq: int, seed: int, head: str = CLASSES) -> tuple[Any, Any]:
    """The model, in float32, with a head of its first values; and its tokenizer. ``classes``: none, for spans.

    Raises:
        DataError: there is no such model, it cannot be read, or it takes no texts of ``seq`` tokens.
    """
    import transformers
    from transformers import AutoModel

    words = pretrained.load_tokenizer(name)
    base = pretrained.load(AutoModel, name, dtype=torch.float32, use_safetensors=True, unused=_POOLER)
    config = base.config
    longest = getattr(config, "max_position_embeddings", seq)
    if seq > longest:
        raise DataError(f"--seq {seq}: this model takes {longest} tokens at most. Nothing was started; give fewer.")
    if classes:
        _name_classes(config, classes)
    config.headwater_frozen_embeddings = True
    torch.manual_seed(seed)
    made = getattr(transformers, head).from_config(config)
    made.base_model.load_state_dict(
        {key: value for key, value in base.state_dict().items() if key in made.base_model.state_dict()}
    )
    return made.float(), _padded(words, made)


def from_scratch(
    texts: Sequence[str], classes: Sequence[str], seq: int, seed: int, head: str = CLASSES
) -> tuple[Any, Any]:
    """A BERT of 2 layers, 128 wide, and a byte-level BPE that is learnt from the texts, so of any script."""
    import transformers
    from tokenizers import processors

    documents = tuple(corpus.Document(str(index), text) for index, text in enumerate(texts))
    words = tokenizer.train(corpus.Corpus(documents, ()), VOCABULARY)
    backend = cast(Any, words).backend_tokenizer
    # The first token is what the head reads.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.END} $A",
        pair=f"{tokenizer.END} $A {tokenizer.END}:1 $B:1",
        special_tokens=[(tokenizer.END, 0)],
    )
    words.pad_token = tokenizer.END
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=max(64, seq),
        pad_token_id=0,
    )
    if classes:
        _name_classes(config, classes)
    return getattr(transformers, head).from_config(config), words


def _name_classes(config: Any, classes: Sequence[str]) -> None:
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"


def _padded(words: Any, model: Any) -> Any:
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    model.config.pad_token_id = words.pad_token_id
    return words


def read(folder: Path, head: str = CLASSES) -> Any:
    """The model of a run or checkpoint folder, in float32. Raises ``DataError`` if it is not whole."""
    import transformers

    found = pretrained.load(getattr(transformers, head), str(folder), dtype=torch.float32, use_safetensors=True)
    if getattr(found.config, "headwater_frozen_embeddings", False):
        found.get_input_embeddings().requires_grad_(requires_grad=False)
    if getattr(found.config, "max_position_embeddings", _SHORT) <= _SHORT:
        found.set_attn_implementation("eager")
    return found


def class_names(model: Any) -> list[str]:
    """The names of the classes, in the order of the logits."""
    return [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
