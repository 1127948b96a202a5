"""The model: a Llama of transformers, in a few sizes, whose first values the servers draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import headwater
from headwater import pretrained
from headwater_recipes.lm.settings import size
from headwater_recipes.text import generation, tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096


def config(preset: str, vocabulary: int = VOCABULARY, context: int = 256) -> LlamaConfig:
    """A ``transformers.LlamaConfig``.

    Args:
        preset: a name in ``PRESETS``.
        vocabulary: number of tokens.
        context: the longest sequence, in tokens, that the model is trained on.

    Raises:
        UsageError: an unknown preset.
    """
    from transformers import LlamaConfig

    shape = size(preset)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def initialisers() -> dict[str, Any]:
    """For ``headwater.Optimizer(init=…)``: by glob pattern of parameter names, the first that fits counts."""
    return {"*norm.weight": headwater.init.ones(), "*": headwater.init.normal(0.02)}


def empty(configuration: LlamaConfig) -> LlamaForCausalLM:
    """The model without values: its parameters are on the meta device, for the servers to fill."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = _quick(LlamaForCausalLM(configuration))
    # The rotary frequencies are a buffer, computed when the module is made: no server holds them.
    model.model.rotary_emb = LlamaRotaryEmbedding(config=configuration)
    return cast("LlamaForCausalLM", model)


def load(folder: Path) -> LlamaForCausalLM:
    """The model of a run or checkpoint folder, in float32. Raises ``DataError`` if it is not whole."""
    from transformers import LlamaForCausalLM

    return cast("LlamaForCausalLM", _quick(pretrained.load(LlamaForCausalLM, str(folder), dtype=torch.float32)))


def generate_text(folder: Path, prompt: str, **choice: Any) -> str:
    """The prompt and its continuation by the model of a run folder; see ``generation.continue_text``.

    Raises:
        DataError: no model there. UsageError: an argument out of range.
    """
    pretrained.quiet()
    return generation.continue_text(load(folder), tokenizer.load(folder), prompt, **choice)


def _quick(model: Any) -> Any:
    # On a CPU and at a few hundred tokens, plain attention is faster than the fused kernel's backward.
    model.set_attn_implementation("eager")
    return model
