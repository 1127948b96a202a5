"""The encoder-decoder and its tokens: a small Pegasus from its first values, or one to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.translation.verses import Pair

PAD, END = "<pad>", "</s>"
"""Tokens 0, with which decoding begins too, and 1."""

_SHORT = 512
"""Up to so many positions plain attention is faster on a CPU than the fused kernel."""


def from_scratch(pairs: Sequence[Pair], vocabulary: int, seq: int, seed: int) -> tuple[Any, Any]:
    """A Transformer (Vaswani and others 2017, https://arxiv.org/abs/1706.03762) in the form of Pegasus: norms come
    before the layers, without which it learns nothing in some hundred steps. 3 layers read and 2 write, 256 wide; a
    byte-level BPE is shared by both languages, and all tables of tokens are one.
    """
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    words = train_tokens(pairs, vocabulary)
    config = PegasusConfig(
        vocab_size=len(words),
        d_model=256,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        activation_function="relu",
        dropout=0.0,
        max_position_embeddings=max(128, 2 * seq),
        scale_embedding=True,
        init_std=256**-0.5,  # so that tokens count as much as their places
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
    )
    torch.manual_seed(seed)
    made = PegasusForConditionalGeneration(config)
    words.model_max_length = seq
    return made, words


def train_tokens(pairs: Sequence[Pair], vocabulary: int) -> Any:
    """Learn the tokens of both sides; any text can be written in them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((text for pair in pairs for text in pair), trainer)
    made.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=made, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def from_pretrained(name: str, seq: int) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer. Raises ``DataError``: there is none, or it takes no ``seq`` tokens."""
    words = pretrained.load_tokenizer(name)
    made = _load(name)
    longest = getattr(made.config, "max_position_embeddings", seq)
    if seq > longest:
        raise DataError(f"--seq {seq}: this model takes {longest} tokens at most. Nothing was started; give fewer.")
    if words.pad_token_id is None or made.config.decoder_start_token_id is None:
        raise DataError(f"--model {name}: it has no token to pad with, or to begin with. Nothing was started.")
    words.model_max_length = seq
    return made, words


def read(folder: Path) -> Any:
    """The model of a run or checkpoint folder, in float32. Raises ``DataError`` if it is not whole."""
    return _load(str(folder))


def _load(name: str) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    found = pretrained.load(AutoModelForSeq2SeqLM, name, dtype=torch.float32, use_safetensors=True)
    if getattr(found.config, "max_position_embeddings", _SHORT) <= _SHORT:
        found.set_attn_implementation("eager")
    return found
